# SPDX-License-Identifier: Apache-2.0
"""Prophet, the edge to it: an optional package, fitted anew to the last intervals each time.

Points keep their own times, and the forecast is for one interval after the last; Dynamo's asked for so many *seconds* after the start.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from tandem_planner.predict.series import Point, Predictor
from tandem_protocol.errors import ConfigError


class ProphetPredictor(Predictor):
    """Raises ConfigError if the package is not there."""

    least_points: ClassVar[int] = 2

    def __init__(self, window: int) -> None:
        self._window = window
        self._prophet, self._pandas = _import()

    def predict(self, history: Sequence[Point], step_s: float) -> float:
        """At the end of the next interval."""
        return self.ahead(history, step_s, 1.0)

    def ahead(self, history: Sequence[Point], step_s: float, steps: float) -> float:
        """At the end of so many intervals."""
        points = history[-self._window:]
        frame = self._frame([point.at_s for point in points])
        frame["y"] = [point.value for point in points]
        model = self._prophet().fit(frame)
        return float(model.predict(self._frame([points[-1].at_s + steps * step_s]))["yhat"].iloc[0])

    def _frame(self, times: Sequence[float]) -> Any:
        return self._pandas.DataFrame({"ds": self._pandas.to_datetime(times, unit="s")})


def _import() -> tuple[Any, Any]:
    try:
        import pandas as pd
        from prophet import Prophet
    except ImportError as exc:
        raise ConfigError("the load predictor prophet needs a package that is missing: `pip install prophet`, or choose kalman") from exc
    return Prophet, pd
