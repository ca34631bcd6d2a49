# SPDX-License-Identifier: Apache-2.0
"""When the planner looks at what. Pure: times in, whether it is time out."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rhythm:
    """Seconds."""

    start_delay_s: float
    load_s: float
    """Between two looks at the workers' load."""
    adjustment_s: float
    """Between two looks at the traffic, which are over so long a time."""
    step_s: float = 60.0
    """For one look and decision, all in all."""
    retry_s: float = 30.0
    """After a change of the fleet failed, until the same is tried again."""

    @property
    def slack_s(self) -> float:
        """By so much the traffic may be looked at early: looks are never quite evenly spaced, and a late one would be a whole look late."""
        return min(self.load_s / 2, self.adjustment_s / 25)


def next_adjustment(last_at_s: float | None, now_s: float, interval_s: float) -> float:
    """When the traffic is due (Unix time): an interval after the last time, also over a restart, or after the start if there was none.

    A last time in the future, of a clock that was set back, counts as none.
    """
    if last_at_s is None or last_at_s > now_s:
        return now_s + interval_s
    return max(now_s, last_at_s + interval_s)
