# SPDX-License-Identifier: Apache-2.0
"""What a run was worth: latencies per interval, attainment of the targets, goodput per GPU, oscillations, how fast it scaled. Pure.

A request is good when its TTFT and its mean ITL are both within their targets. An interval is within the SLA when the 95th
percentiles of both are, over the requests that arrived in it. All GPU time counts, from the decision to start a worker until it is
gone, until the last request has ended.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from tandem_planner.simulate.run import Run, Tick
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role

_PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Targets:
    """The SLA."""

    ttft_s: float = 0.5
    itl_s: float = 0.05

    def __post_init__(self) -> None:
        """Raises ConfigError for targets that nothing can meet."""
        if min(self.ttft_s, self.itl_s) <= 0:
            raise ConfigError("TTFT and ITL targets must be above 0")


class Interval(msgspec.Struct, frozen=True):
    """Requests that arrived in one interval; latencies in seconds, [p50, p95, p99], empty when nobody came."""

    begin_s: float
    requests: int
    good: int
    ttft_s: list[float]
    itl_s: list[float]
    attained: bool
    workers: dict[str, float]
    """Ready ones by role, mean."""


class Summary(msgspec.Struct, frozen=True):
    """A run in figures."""

    policy: str
    load: str
    requests: int
    refused: int
    unfinished: int
    good: int
    goodput_per_s: float
    """Good requests per second of the load."""
    goodput_per_gpu_hour: float
    gpu_hours: float
    mean_gpus: float
    request_attainment: float
    """Share of requests that are good."""
    sla_attainment: float
    """Share of intervals within the SLA, of those in which somebody came."""
    ttft_s: list[float]
    itl_s: list[float]
    oscillations: int
    """Changes of direction in the number of wanted workers, all roles."""
    scale_up_s: float | None
    """From the load's first jump until enough workers for it were asked for; None without a jump or if that never happened."""
    intervals: list[Interval]


def summarize(policy: str, run: Run, targets: Targets, interval_s: float = 60.0, settled_s: float = 0.0) -> Summary:
    """All figures of a run. Changes before `settled_s` are no oscillations: the fleet is finding its size."""
    table = _Table(run, targets)
    good = int(table.good.sum())
    intervals = _intervals(run, table, targets, interval_s)
    busy = [interval for interval in intervals if interval.requests]
    return Summary(
        policy=policy, load=run.load.name, requests=len(run.requests), refused=sum(request.refused for request in run.requests),
        unfinished=int(np.isnan(table.end).sum()), good=good, goodput_per_s=good / run.load.duration_s,
        goodput_per_gpu_hour=good / run.gpu_seconds * 3600, gpu_hours=run.gpu_seconds / 3600, mean_gpus=run.gpu_seconds / run.end_s,
        request_attainment=good / len(run.requests), sla_attainment=sum(interval.attained for interval in busy) / len(busy),
        ttft_s=_percentiles(table.ttft), itl_s=_percentiles(table.itl),
        oscillations=oscillations(run.ticks, settled_s), scale_up_s=scale_up_s(run), intervals=intervals,
    )


def oscillations(ticks: Sequence[Tick], since_s: float = 0.0) -> int:
    """How often a pool's wanted size turned from growing to shrinking or back."""
    late = [tick for tick in ticks if tick.at_s >= since_s]
    roles = late[0].wanted if late else ()
    return sum(_turns([tick.wanted[role] for tick in late]) for role in roles)


def scale_up_s(run: Run) -> float | None:
    """Seconds from the load's first jump until enough workers were wanted, in all.

    Enough is what was wanted in the middle of the second half of the time up to the next jump, or to the load's end.
    """
    if not run.load.changes_s:
        return None
    jump, until = (*run.load.changes_s, run.load.duration_s)[:2]
    before = [sum(tick.wanted.values()) for tick in run.ticks if tick.at_s <= jump]
    after = [(tick.at_s, sum(tick.wanted.values())) for tick in run.ticks if jump < tick.at_s <= until]
    late = [wanted for at, wanted in after if at > (jump + until) / 2]
    enough = float(np.median(late)) if late else 0.0
    if not before or enough <= before[-1]:
        return None
    return next((at - jump for at, wanted in after if wanted >= enough), None)


class _Table:
    """The requests as arrays [requests]; what never ended is infinitely late."""

    def __init__(self, run: Run, targets: Targets) -> None:
        self.at = run.load.at_s
        self.end = np.array([request.end_s for request in run.requests])
        self.ttft = _late([request.ttft_s for request in run.requests])
        self.itl = _late([request.itl_s for request in run.requests])
        self.good = (self.ttft <= targets.ttft_s) & (self.itl <= targets.itl_s)


def _late(seconds: list[float]) -> npt.NDArray[np.float64]:
    values = np.array(seconds)
    return np.where(np.isnan(values), np.inf, values)


def _intervals(run: Run, table: _Table, targets: Targets, interval_s: float) -> list[Interval]:
    edges = np.arange(0, run.load.duration_s + interval_s, interval_s)
    bounds = np.searchsorted(table.at, edges)
    spans = zip(edges[:-1].tolist(), itertools.pairwise(bounds.tolist()), strict=True)
    return [_interval(run, table, targets, begin_s, begin_s + interval_s, slice(*span)) for begin_s, span in spans]


def _interval(run: Run, table: _Table, targets: Targets, begin_s: float, end_s: float, span: slice) -> Interval:
    ttft, itl = _percentiles(table.ttft[span]), _percentiles(table.itl[span])
    attained = bool(ttft) and ttft[1] <= targets.ttft_s and itl[1] <= targets.itl_s
    ticks = [tick for tick in run.ticks if begin_s < tick.at_s <= end_s]
    workers = {str(role): _mean_ready(ticks, role) for role in (ticks[0].ready if ticks else ())}
    return Interval(begin_s, span.stop - span.start, int(table.good[span].sum()), ttft, itl, attained, workers)


def _mean_ready(ticks: Sequence[Tick], role: Role) -> float:
    return sum(tick.ready[role] for tick in ticks) / len(ticks)


def _percentiles(seconds: npt.NDArray[np.float64]) -> list[float]:
    """Of no interpolation, since some are infinite."""
    return [float(value) for value in np.percentile(seconds, _PERCENTILES, method="inverted_cdf")] if len(seconds) else []


def _turns(sizes: Sequence[int]) -> int:
    moves = [after > before for before, after in itertools.pairwise(sizes) if after != before]
    return sum(first is not second for first, second in itertools.pairwise(moves))


def to_json(summary: Summary) -> dict[str, Any]:
    """As JSON has it: times that never came are null."""
    found: dict[str, Any] = msgspec.to_builtins(summary)
    return dict(_finite(found))


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {name: _finite(item) for name, item in value.items()}
        case list():
            return [_finite(item) for item in value]
        case float() if not np.isfinite(value):
            return None
    return value
