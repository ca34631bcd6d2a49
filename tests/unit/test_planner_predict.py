# SPDX-License-Identifier: Apache-2.0
"""Predictors: what they foresee, and that nothing they are fed becomes a decision that nobody could serve."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_planner.config import PlannerConfig, PredictorName
from tandem_planner.predict.arima import ArimaPredictor
from tandem_planner.predict.forecast import HIGHEST, Forecaster, TrafficHistory
from tandem_planner.predict.kalman import KalmanPredictor
from tandem_planner.predict.series import MOST_POINTS, ConstantPredictor, Point, Predictor, appended, evenly_spaced
from tandem_planner.predict.warmup import history_of, read_history
from tandem_protocol.errors import ConfigError

STEP_S = 60.0


def _points(values: Sequence[float], step_s: float = STEP_S) -> tuple[Point, ...]:
    return tuple(Point(at * step_s, value) for at, value in enumerate(values, 1))


def _history(values: Sequence[float]) -> TrafficHistory:
    return TrafficHistory(_points(values), _points([3000.0] * len(values)), _points([300.0] * len(values)))


def _config(name: PredictorName, *, log1p: bool = False) -> PlannerConfig:
    return PlannerConfig(load_predictor=name, adjustment_interval=STEP_S, load_predictor_log1p=log1p)


def test_kalman_is_the_filter_of_the_reference() -> None:
    """F = [[1, 1], [0, 1]], H = [1, 0], P = 1000 I, q 1 and 0.1, r 10: against the same in matrices."""
    values = [300.0, 320.0, 345.0, 360.0, 390.0, 405.0, 380.0]
    f, h, q, r = np.array([[1.0, 1.0], [0.0, 1.0]]), np.array([[1.0, 0.0]]), np.diag([1.0, 0.1]), 10.0
    x, p = np.array([[values[0]], [0.0]]), 1000.0 * np.eye(2)
    for at, value in enumerate(values):
        if at:
            x, p = f @ x, f @ p @ f.T + q
        gain = p @ h.T / (h @ p @ h.T + r)
        x, p = x + gain * (value - h @ x), (np.eye(2) - gain @ h) @ p
    assert KalmanPredictor().predict(_points(values), STEP_S) == pytest.approx(float((h @ f @ x)[0, 0]))


@pytest.mark.parametrize("predictor", [KalmanPredictor(), ArimaPredictor()])
def test_a_slope_is_followed(predictor: Predictor) -> None:
    """A line goes on as a line."""
    assert predictor.predict(_points([10.0 + 2 * at for at in range(12)]), STEP_S) == pytest.approx(34.0, abs=0.6)


@pytest.mark.parametrize("predictor", [ConstantPredictor(), KalmanPredictor(), ArimaPredictor()])
@pytest.mark.parametrize("length", [5, 30])
def test_a_constant_stays(predictor: Predictor, length: int) -> None:
    """Whatever the predictor."""
    assert predictor.predict(_points([7.0] * length), STEP_S) == pytest.approx(7.0, abs=1e-6)


def test_intervals_without_traffic_are_time_that_passed() -> None:
    """A line with holes is the same line: timestamps count, not the number of points."""
    line = _points([10.0 + 2 * at for at in range(30)])
    holes = tuple(point for at, point in enumerate(line) if at not in {4, 5, 11, 12, 13, 20})
    assert KalmanPredictor().predict(holes, STEP_S) == pytest.approx(KalmanPredictor().predict(line, STEP_S), rel=0.02)
    assert ArimaPredictor().predict(holes, STEP_S) == pytest.approx(70.0, abs=2.0)
    spaced = evenly_spaced(holes, STEP_S)
    assert len(spaced) == 30
    assert [at for at, value in enumerate(spaced) if math.isnan(value)] == [4, 5, 11, 12, 13, 20]


def test_arima_finds_autocorrelation() -> None:
    """An alternating series is foreseen to alternate, which the last value would miss by all of it."""
    rng = np.random.default_rng(3)
    values = [100.0 + 30.0 * (-1) ** at + float(rng.normal(0, 1)) for at in range(40)]
    assert ArimaPredictor().predict(_points(values), STEP_S) == pytest.approx(130.0, abs=8)


def test_arima_keeps_its_order_between_choices() -> None:
    """A new point is only filtered."""
    predictor, values = ArimaPredictor(), [10.0 + at % 3 for at in range(24)]
    predictor.predict(_points(values[:20]), STEP_S)
    chosen = predictor._chosen
    predictor.predict(_points(values), STEP_S)
    assert predictor._chosen is chosen
    predictor.predict(_points([10.0 + at % 3 for at in range(31)]), STEP_S)
    assert predictor._chosen is not chosen


class _Broken(Predictor):
    """Answers what it is told, or raises."""

    def __init__(self, answer: float | None) -> None:
        self._answer = answer

    def predict(self, history: Sequence[Point], step_s: float) -> float:
        """The answer."""
        if self._answer is None:
            raise np.linalg.LinAlgError("singular")
        return self._answer


@pytest.mark.parametrize("answer", [None, math.nan, math.inf, -math.inf, 1e300])
def test_a_predictor_that_fails_gives_way_to_the_last_value(answer: float | None, caplog: pytest.LogCaptureFixture) -> None:
    """Flagged each time, and said once."""
    forecaster = Forecaster(_config(PredictorName.CONSTANT))
    forecaster._predictors["requests_per_s"] = _Broken(answer)
    with caplog.at_level(logging.WARNING):
        answers = [forecaster.next(_history([5.0, 6.0])) for _ in range(3)]
    assert [(demand.requests_per_s, degraded) for demand, degraded in answers] == [(6.0, True)] * 3
    assert len([record for record in caplog.records if "predictor_degraded" in record.message]) == 1


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.booleans())
@settings(max_examples=150, deadline=None)
def test_kalman_stays_within_bounds(values: list[float], log1p: bool) -> None:
    """Any series: finite, not negative, at most four times the largest; lengths within those seen."""
    points = _points(values)
    demand, _ = Forecaster(_config(PredictorName.KALMAN, log1p=log1p)).next(TrafficHistory(points, points, points))
    assert 0 <= demand.requests_per_s <= HIGHEST * max(values) * (1 + 1e-9)
    assert 1 <= demand.isl <= max(1.0, *values)


@pytest.mark.parametrize("values", [
    [1.0, 0.0, 0.0, 0.0, 0.0, 1e6], [2.0**at for at in range(8)], [1e9, 1.0, 1e-9, 5.0, 1e9],
])
def test_arima_stays_within_bounds(values: list[float]) -> None:
    """The same, over series that statsmodels finds hard."""
    demand, _ = Forecaster(_config(PredictorName.ARIMA)).next(_history(values))
    assert 0 <= demand.requests_per_s <= HIGHEST * max(values)


def test_garbage_never_enters_a_history() -> None:
    """Not finite, before the last, or zero before anything came; a long silence begins anew, and the length is bounded."""
    history: tuple[Point, ...] = ()
    for point in (Point(60, 0.0), Point(120, math.nan), Point(math.inf, 1.0)):
        history = appended(history, point, STEP_S)
    assert history == ()
    history = appended(appended(history, Point(180, 4.0), STEP_S), Point(170, 9.0), STEP_S)
    assert history == (Point(180, 4.0),)
    assert appended(history, Point(180 + 40 * STEP_S, 5.0), STEP_S) == (Point(180 + 40 * STEP_S, 5.0),)
    for at in range(2 * MOST_POINTS):
        history = appended(history, Point(240 + at * STEP_S, 1.0), STEP_S)
    assert len(history) == MOST_POINTS


def test_prophet_is_refused_with_the_sentence_how_to_install_it() -> None:
    """It is optional; asking for it without having it is the operator's to mend."""
    pytest.importorskip("tandem_planner.predict.prophet")
    try:
        import prophet  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="pip install prophet"):
            Forecaster(_config(PredictorName.PROPHET))


def test_a_trace_becomes_the_past(tmp_path: Path) -> None:
    """Whole intervals only, the last of them ending now; mean lengths of each."""
    trace = tmp_path / "trace.jsonl"
    rows = [(0, 100, 10), (30_000, 300, 30), (61_000, 50, 5), (200_000, 7, 7), (241_000, 9, 9)]
    requests = [{"timestamp": at, "input_length": isl, "output_length": osl, "hash_ids": [1]} for at, isl, osl in rows]
    trace.write_text("".join(json.dumps(request) + "\n" for request in requests))
    history = read_history(trace, STEP_S, end_s=1e6)
    assert history.requests_per_s == (Point(1e6 - 180, 2 / 60), Point(1e6 - 120, 1 / 60), Point(1e6, 1 / 60))
    assert [point.value for point in history.isl] == [200, 50, 7]
    assert history_of([], STEP_S, 0.0) == TrafficHistory()


def test_a_file_that_is_no_trace_is_refused_with_its_line(tmp_path: Path) -> None:
    """Line and reason."""
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 1, "output_length": 1}\n\n{"timestamp": "soon"}\n')
    with pytest.raises(ConfigError, match="line 3"):
        read_history(trace, STEP_S, 0.0)
    with pytest.raises(ConfigError, match="can't be read"):
        read_history(tmp_path / "none", STEP_S, 0.0)
