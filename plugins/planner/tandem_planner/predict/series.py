# SPDX-License-Identifier: Apache-2.0
"""One figure over time, one point per interval in which it was seen, and what predicts it."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import msgspec

MOST_POINTS = 256
"""Kept per series: 12 hours of 180 s."""
MOST_STEPS = 16
"""Intervals without a point that are bridged; beyond, the series begins anew."""


class Point(msgspec.Struct, frozen=True, array_like=True):
    """What was seen in the interval that ended at `at_s` (Unix time)."""

    at_s: float
    value: float


class Predictor(ABC):
    """Foresees one figure. Stateless: the history is all that it knows, so a restart changes nothing."""

    least_points: ClassVar[int] = 1

    @abstractmethod
    def predict(self, history: Sequence[Point], step_s: float) -> float:
        """The value one step after the last point. Not thread-safe; may raise whatever its library raises.

        `history` holds at least `least_points` finite points in order of time, about `step_s` or multiples of it apart.
        """

    def ahead(self, history: Sequence[Point], step_s: float, steps: float) -> float:
        """The value so many steps after the last point, at least 1. What can only see one step is asked for that one."""
        return self.predict(history, step_s)


class ConstantPredictor(Predictor):
    """The next is as the last: the baseline, and what the others fall back to."""

    def predict(self, history: Sequence[Point], step_s: float) -> float:
        """The last value."""
        return history[-1].value


def appended(history: Sequence[Point], point: Point, step_s: float) -> tuple[Point, ...]:
    """The history with a point more, bounded. Leading zeros, points that are not finite, and time that stands still are left out."""
    if not (math.isfinite(point.value) and math.isfinite(point.at_s)) or (not history and point.value == 0):
        return tuple(history)
    if history and point.at_s <= history[-1].at_s:
        return tuple(history)
    if history and point.at_s - history[-1].at_s > (MOST_STEPS + 0.5) * step_s:
        return (point,)
    return (*history, point)[-MOST_POINTS:]


def steps_between(earlier: Point, later: Point, step_s: float) -> int:
    """Intervals from one point to the next: above 1 where some had no point."""
    return max(1, min(MOST_STEPS, round((later.at_s - earlier.at_s) / step_s)))


def evenly_spaced(history: Sequence[Point], step_s: float) -> list[float]:
    """Values one interval apart; NaN for intervals that had no point."""
    values = [history[0].value]
    for earlier, later in itertools.pairwise(history):
        values += [math.nan] * (steps_between(earlier, later, step_s) - 1) + [later.value]
    return values
