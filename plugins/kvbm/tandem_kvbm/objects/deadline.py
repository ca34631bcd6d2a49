# SPDX-License-Identifier: Apache-2.0
"""How long an operation may still take, all its attempts together."""

from collections.abc import Callable


class DeadlineError(Exception):
    """The time is over."""


class Deadline:
    """A point in time."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left_s(self) -> float:
        """Seconds left; never negative."""
        return max(0.0, self._end - self._clock())

    def check(self) -> None:
        """Raises DeadlineError when the time is over."""
        if self.left_s() <= 0:
            raise DeadlineError("out of time")
