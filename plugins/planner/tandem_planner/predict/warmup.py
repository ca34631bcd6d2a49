# SPDX-License-Identifier: Apache-2.0
"""A trace as the past of a planner that starts: its intervals as points, the last of them ending when the planner starts."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tandem_planner.predict.forecast import TrafficHistory
from tandem_planner.predict.series import MOST_POINTS, Point
from tandem_planner.traces import read_requests


def read_history(trace: Path, step_s: float, end_s: float) -> TrafficHistory:
    """The trace as a history that ends at `end_s` (Unix time). Raises ConfigError for a file that is no trace."""
    return history_of(((one.timestamp / 1e3, one.input_length, one.output_length) for one in read_requests(trace)), step_s, end_s)


def history_of(arrivals: Iterable[tuple[float, float, float]], step_s: float, end_s: float) -> TrafficHistory:
    """From (seconds, prompt tokens, generated tokens). The last, partial interval is left out; empty ones have no point, but for rate."""
    bins: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for at_s, isl, osl in arrivals:
        sums = bins[int(at_s // step_s)]
        sums[0], sums[1], sums[2] = sums[0] + 1, sums[1] + isl, sums[2] + osl
    last = max(bins, default=0)
    rows = [(end_s - (last - 1 - place) * step_s, bins[place]) for place in sorted(bins) if place < last][-MOST_POINTS:]
    return TrafficHistory(
        requests_per_s=tuple(Point(at_s, sums[0] / step_s) for at_s, sums in rows),
        isl=tuple(Point(at_s, sums[1] / sums[0]) for at_s, sums in rows),
        osl=tuple(Point(at_s, sums[2] / sums[0]) for at_s, sums in rows),
    )
