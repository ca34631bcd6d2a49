# SPDX-License-Identifier: Apache-2.0
"""The three series of the traffic, each foreseen by itself: requests per second, prompt tokens, generated tokens.

Whatever a predictor does, a forecast is finite, not negative and at most `HIGHEST` times the largest value seen lately; a predictor that
fails or leaves those bounds gives way to the last value for this step, which is said once in the log and flagged each time.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from tandem_planner.capacity import Demand
from tandem_planner.config import PlannerConfig, PredictorName
from tandem_planner.predict.arima import ArimaPredictor
from tandem_planner.predict.kalman import KalmanPredictor
from tandem_planner.predict.prophet import ProphetPredictor
from tandem_planner.predict.seasonal import SeasonalPredictor
from tandem_planner.predict.series import ConstantPredictor, Point, Predictor, appended
from tandem_planner.terms import Traffic

HIGHEST = 4.0
"""Times the largest value of the history: a slope may not run away."""
LATELY = 16
"""Points over which that is looked at."""

_log = logging.getLogger(__name__)


class TrafficHistory(msgspec.Struct, frozen=True):
    """What was seen, one point per interval with traffic."""

    requests_per_s: tuple[Point, ...] = ()
    isl: tuple[Point, ...] = ()
    osl: tuple[Point, ...] = ()

    def with_interval(self, at_s: float, traffic: Traffic, step_s: float) -> "TrafficHistory":
        """One interval more."""
        rate = traffic.requests / traffic.interval_s
        return TrafficHistory(
            appended(self.requests_per_s, Point(at_s, rate), step_s),
            appended(self.isl, Point(at_s, traffic.isl), step_s),
            appended(self.osl, Point(at_s, traffic.osl), step_s),
        )


@dataclass(frozen=True)
class Foreseen:
    """One figure of the next interval."""

    value: float
    degraded: bool = False
    """Whether it is the last value only because the predictor could not do better."""


class Forecaster:
    """Predicts each series by a predictor of its own. Keeps nothing that a restart would miss."""

    def __init__(self, config: PlannerConfig) -> None:
        self._step_s = config.adjustment_interval
        self._steps = 1 + config.worker_start / config.adjustment_interval
        self._log1p = config.load_predictor_log1p
        self._predictors: dict[str, Predictor] = {name: make_predictor(config) for name in ("requests_per_s", "isl", "osl")}
        self._warned = False

    def next(self, history: TrafficHistory, cached_fraction: float = 0.0) -> tuple[Demand, bool]:
        """The demand of the interval in which workers that are asked for now would serve, and whether some series was degraded.

        The history has at least one point.
        """
        rate, isl, osl = (self._foresee(name, getattr(history, name)) for name in ("requests_per_s", "isl", "osl"))
        demand = Demand(rate.value, _as_seen(isl, history.isl), _as_seen(osl, history.osl), cached_fraction)
        return demand, rate.degraded or isl.degraded or osl.degraded

    def _foresee(self, name: str, points: Sequence[Point]) -> Foreseen:
        predictor = self._predictors[name]
        if not points:
            return Foreseen(0.0)
        if len(points) < predictor.least_points:
            return Foreseen(points[-1].value)
        try:
            found = self._predict(predictor, points, self._steps if name == "requests_per_s" else 1.0)
        except Exception as exc:  # numerics of a library may raise anything, and the last value is better than no plan
            return self._degraded(name, points, f"{type(exc).__name__}: {exc}")
        highest = HIGHEST * max(point.value for point in points[-LATELY:])
        if not math.isfinite(found) or found > highest:
            return self._degraded(name, points, f"it foresaw {found:g}")
        return Foreseen(max(0.0, found))

    def _predict(self, predictor: Predictor, points: Sequence[Point], steps: float) -> float:
        if not self._log1p:
            return predictor.ahead(points, self._step_s, steps)
        logs = [Point(point.at_s, math.log1p(max(0.0, point.value))) for point in points]
        return math.expm1(min(predictor.ahead(logs, self._step_s, steps), 700.0))

    def _degraded(self, name: str, points: Sequence[Point], why: str) -> Foreseen:
        if not self._warned:
            self._warned = True
            _log.warning("planner.predictor_degraded series=%s predictor=%s: %s; the last value stands for the next", name,
                         type(self._predictors[name]).__name__, why)
        return Foreseen(max(0.0, points[-1].value), degraded=True)


def _as_seen(length: Foreseen, points: Sequence[Point]) -> float:
    """A length within those seen lately: prompts don't grow along a line as traffic does."""
    lately = [point.value for point in points[-LATELY:]] or [1.0]
    return max(1.0, min(lately), min(length.value, max(lately)))


def make_predictor(config: PlannerConfig) -> Predictor:
    """As configured. Raises ConfigError if its package is not installed."""
    if config.load_predictor is PredictorName.ARIMA:
        return ArimaPredictor()
    if config.load_predictor is PredictorName.PROPHET:
        return ProphetPredictor(config.prophet_window_size)
    kalman = KalmanPredictor(config.kalman_q_level, config.kalman_q_trend, config.kalman_r, config.kalman_min_points)
    if config.load_predictor in (PredictorName.KALMAN, PredictorName.SEASONAL):
        return kalman if config.load_predictor is PredictorName.KALMAN else SeasonalPredictor(kalman)
    return ConstantPredictor()
