# SPDX-License-Identifier: Apache-2.0
"""A Kalman filter of a level with a slope (local linear trend): F = [[1, 1], [0, 1]], H = [1, 0], P = 1000 I at first.

Written out in scalars, since matrices of two rows would cost a hundred times as much; an interval without a point is a step without an
update, so that time always advances by what passed.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tandem_planner.predict.series import Point, Predictor, steps_between

FIRST_VARIANCE = 1000.0
LATELY, CREDIT = 5, 1.5
"""Changes from interval to interval that are looked at; what the filter, which has less noise, may see beyond their median."""
_MEDIAN_ERROR = 1.4826 * 1.2533
"""Standard error of a median, from the median distance to it: times this, over the root of the count (normal noise)."""


@dataclass(frozen=True)
class _Belief:
    """Level and slope per interval, with the covariance [[a, b], [b, c]]."""

    level: float
    slope: float
    a: float = FIRST_VARIANCE
    b: float = 0.0
    c: float = FIRST_VARIANCE

    def stepped(self, q_level: float, q_trend: float) -> "_Belief":
        """One interval later."""
        return _Belief(self.level + self.slope, self.slope, self.a + 2 * self.b + self.c + q_level, self.b + self.c, self.c + q_trend)

    def told(self, value: float, r: float) -> "_Belief":
        """After an observation with variance `r`."""
        gain, slope_gain = self.a / (self.a + r), self.b / (self.a + r)
        miss = value - self.level
        left = 1 - gain
        return _Belief(self.level + gain * miss, self.slope + slope_gain * miss, left * self.a, left * self.b, self.c - slope_gain * self.b)


@dataclass(frozen=True)
class KalmanPredictor(Predictor):
    """Variances per interval, in squared units of the series."""

    q_level: float = 1.0
    q_trend: float = 0.1
    r: float = 10.0
    min_points: int = 5

    def predict(self, history: Sequence[Point], step_s: float) -> float:
        """Level plus slope; the last value while there are fewer than `min_points`."""
        return self.ahead(history, step_s, 1.0)

    def ahead(self, history: Sequence[Point], step_s: float, steps: float) -> float:
        """Level plus so many times the slope."""
        if len(history) < self.min_points:
            return history[-1].value
        belief = _Belief(history[0].value, 0.0).told(history[0].value, self.r)
        for earlier, later in itertools.pairwise(history):
            for _ in range(steps_between(earlier, later, step_s)):
                belief = belief.stepped(self.q_level, self.q_trend)
            belief = belief.told(later.value, self.r)
        return belief.level + steps * (belief.slope if steps <= 1 else borne_out(belief.slope, history, step_s))


def borne_out(slope: float, history: Sequence[Point], step_s: float) -> float:
    """The slope as far as the last intervals bear it out, for looking further than one: a jump is no slope.

    At most `CREDIT` times the median of the last changes, and none against its direction. Of a fall the median's own error is taken off,
    since too many workers for an interval cost less than too few.
    """
    last = history[-LATELY - 1:]
    changes = [(later.value - earlier.value) / steps_between(earlier, later, step_s) for earlier, later in itertools.pairwise(last)]
    middle = statistics.median(changes)
    if middle >= 0:
        return min(max(slope, 0.0), CREDIT * middle)
    error = _MEDIAN_ERROR * statistics.median([abs(change - middle) for change in changes]) / math.sqrt(len(changes))
    return max(min(slope, 0.0), CREDIT * min(0.0, middle + error))
