# SPDX-License-Identifier: Apache-2.0
"""A trace as the past of a planner that starts: its intervals as points, the last of them ending when the planner starts.

Lines are JSON objects as in Mooncake's traces: `timestamp` (ms), `input_length`, `output_length` (tokens); other fields are ignored.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from tandem_planner.predict.forecast import TrafficHistory
from tandem_planner.predict.series import MOST_POINTS, Point
from tandem_protocol.errors import ConfigError


class _Arrival(msgspec.Struct, frozen=True):
    timestamp: float
    input_length: float
    output_length: float


def read_history(trace: Path, step_s: float, end_s: float) -> TrafficHistory:
    """The trace as a history that ends at `end_s` (Unix time). Raises ConfigError for a file that is no trace."""
    try:
        with trace.open("rb") as lines:
            return history_of(_arrivals(lines, trace), step_s, end_s)
    except OSError as exc:
        raise ConfigError(f"the warm-up trace can't be read: {exc}") from exc


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


def _arrivals(lines: Iterable[bytes], trace: Path) -> Iterator[tuple[float, float, float]]:
    decoder = msgspec.json.Decoder(_Arrival)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            one = decoder.decode(line)
        except msgspec.MsgspecError as exc:
            raise ConfigError(f"{trace}, line {number} is not a request of a trace: {exc}") from exc
        if one.timestamp < 0:
            raise ConfigError(f"{trace}, line {number}: timestamp is {one.timestamp}, but must not be negative")
        yield one.timestamp / 1e3, one.input_length, one.output_length
