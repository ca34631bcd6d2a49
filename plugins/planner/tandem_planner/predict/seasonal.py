# SPDX-License-Identifier: Apache-2.0
"""What comes again: the value one period ago, shifted by what the last points lie above it. Without a period, the Kalman filter.

The period is the shortest lag at which the series resembles itself (Pearson's r of the overlapping parts) after a lag at which it
doesn't: a smooth series resembles itself at every short lag. One and a half periods must have been seen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tandem_planner.predict.kalman import KalmanPredictor
from tandem_planner.predict.series import Point, Predictor, evenly_spaced

LEAST_LAG = 4
"""Intervals; fewer are noise."""
ALIKE, UNLIKE = 0.85, 0.3
"""Correlations from which a lag counts as a period, and below which the series has turned away from itself in between."""
LATELY = 4
"""Points by which the shift is told."""
_SMOOTHING = np.array([0.25, 0.5, 0.25])

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SeasonalPredictor(Predictor):
    """Stateless, as all: the period is found anew each time."""

    trend: KalmanPredictor = field(default_factory=KalmanPredictor)

    def predict(self, history: Sequence[Point], step_s: float) -> float:
        """One interval ahead."""
        return self.ahead(history, step_s, 1.0)

    def ahead(self, history: Sequence[Point], step_s: float, steps: float) -> float:
        """So many intervals ahead, by the season as far as there is one."""
        values = _filled(evenly_spaced(history, step_s))
        period = found_period(values)
        if period is None:
            return self.trend.ahead(history, step_s, steps)
        places = np.arange(len(values), dtype=np.float64)
        smooth = _smoothed(values)
        recent = places[-LATELY:]
        shift = float(np.mean(values[-LATELY:] - np.interp(recent - period, places, smooth)))
        at = len(values) - 1 + steps
        while at > len(values) - 1:
            at -= period
        return max(0.0, float(np.interp(at, places, smooth)) + shift)


def found_period(values: Values) -> int | None:
    """Intervals after which the series comes again; None if it doesn't, or was not seen for long enough."""
    likeness = [_likeness(values, lag) for lag in range(len(values) * 2 // 3 + 1)]
    turned = next((lag for lag in range(LEAST_LAG, len(likeness)) if likeness[lag] < UNLIKE), None)
    if turned is None:
        return None
    alike = [lag for lag in range(turned, len(likeness)) if likeness[lag] >= ALIKE]
    if not alike:
        return None
    first = [lag for lag in alike if lag < alike[0] * 1.5]  # the hill around the first period, not the second one's
    return max(first, key=likeness.__getitem__)


def _likeness(values: Values, lag: int) -> float:
    if lag < LEAST_LAG:
        return 1.0
    early, late = values[:-lag], values[lag:]
    if np.ptp(early) == 0 or np.ptp(late) == 0:
        return 0.0
    found = float(np.corrcoef(early, late)[0, 1])
    return found if math.isfinite(found) else 0.0


def _filled(values: Sequence[float]) -> Values:
    """Gaps by what lies on both sides."""
    array = np.array(values, dtype=np.float64)
    seen = np.isfinite(array)
    places = np.arange(array.size)
    return np.interp(places, places[seen], array[seen])


def _smoothed(values: Values) -> Values:
    """By the neighbours, the ends kept."""
    if values.size < len(_SMOOTHING):
        return values
    inner = np.convolve(values, _SMOOTHING, mode="valid")
    return np.concatenate((values[:1], inner, values[-1:]))
