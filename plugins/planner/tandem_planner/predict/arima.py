# SPDX-License-Identifier: Apache-2.0
"""ARIMA by statsmodels, the edge to it. The order is the one of a small grid with the least AIC, chosen anew every `CHOOSE_EVERY` points.

Orders are compared by Hannan and Rissanen's regressions, some 20 ms each instead of up to a second by maximum likelihood; only
the best is then fitted by that. As in the reference a constant series is its own forecast, and a series in which only noise is found
(0, d, 0) is tried once more in logarithms. Between two choices the parameters stay, and new points are only filtered. Where BLAS has
many threads these tiny matrices wait for them: OPENBLAS_NUM_THREADS=1, which the planner's process sets at its start, makes a choice ten
times as fast on a busy host.
"""

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from tandem_planner.predict.series import Point, Predictor, evenly_spaced

ORDERS = tuple((p, d, q) for p, d, q in itertools.product((0, 1, 2), (0, 1), (0, 1)) if p + q <= 2)
CHOOSE_EVERY = 10
WINDOW = 100
"""Intervals that are fitted: a daily pattern is Prophet's part."""
MOST_ITERATIONS = 50
_FREE: dict[str, bool] = {"enforce_stationarity": False, "enforce_invertibility": False}


class ArimaPredictor(Predictor):
    """Remembers the order and parameters that it chose, which is a cache: without it the next forecast only takes longer."""

    least_points: ClassVar[int] = 5

    def __init__(self) -> None:
        self._chosen: tuple[tuple[int, int, int], bool, Any] | None = None
        self._chosen_at: tuple[float, int] = (math.inf, 0)

    def predict(self, history: Sequence[Point], step_s: float) -> float:
        """One interval ahead. Raises what statsmodels raises for a series that it can't fit."""
        return self.ahead(history, step_s, 1.0)

    def ahead(self, history: Sequence[Point], step_s: float, steps: float) -> float:
        """So many intervals ahead, rounded up."""
        values = np.array(evenly_spaced(history, step_s)[-WINDOW:])
        seen = values[np.isfinite(values)]
        if seen.size < self.least_points or np.ptp(seen) == 0:
            return float(seen[-1])
        import statsmodels.tsa.arima.model  # noqa: F401 - here, since it sets filters of its own when it is imported

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of starting values and convergence: a worse fit has a worse AIC
            if self._due(history):
                self._chosen, self._chosen_at = self._choose(values), (history[0].at_s, len(history))
            return self._forecast(values, math.ceil(steps))

    def _due(self, history: Sequence[Point]) -> bool:
        first, points = self._chosen_at
        return self._chosen is None or first > history[0].at_s or not points <= len(history) < points + CHOOSE_EVERY

    def _choose(self, values: Any) -> tuple[tuple[int, int, int], bool, Any]:
        order, params = _best(values)
        if order[0] == order[2] == 0 and np.nanmin(values) >= 0:
            order, params = _best(np.log1p(values))
            return order, True, params
        return order, False, params

    def _forecast(self, values: Any, steps: int) -> float:
        order, in_logs, params = self._chosen or ((0, 1, 0), False, None)
        model = _model(np.log1p(values) if in_logs else values, order)
        found = float(np.asarray((model.filter(params) if params is not None else model.fit()).forecast(steps))[-1])
        return math.expm1(min(found, 700.0)) if in_logs else found


def _best(values: Any) -> tuple[tuple[int, int, int], Any]:
    """The order with the least AIC among those that can be fitted, with its parameters."""
    places = np.arange(values.size)
    seen = np.isfinite(values)
    filled = np.interp(places, places[seen], values[seen])  # regressions need every interval
    found = [(aic, order) for order in ORDERS if math.isfinite(aic := _quick_aic(filled, order))]
    if not found:
        raise ValueError("no order of ARIMA fits the series")
    order = min(found)[1]
    return order, _model(values, order).fit(method_kwargs={"maxiter": MOST_ITERATIONS, "disp": 0}).params


def _quick_aic(values: Any, order: tuple[int, int, int]) -> float:
    """Infinite for an order that the series is too short or too odd for."""
    try:
        return float(_model(values, order).fit(method="hannan_rissanen").aic)
    except (ValueError, IndexError, np.linalg.LinAlgError):
        return math.inf


def _model(values: Any, order: tuple[int, int, int]) -> Any:
    from statsmodels.tsa.arima.model import ARIMA

    return ARIMA(values, order=order, **_FREE)
