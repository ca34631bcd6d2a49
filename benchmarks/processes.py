# SPDX-License-Identifier: Apache-2.0
"""CPU time by kind of process, and what a measurement was limited by."""

import os
from collections.abc import Iterable, Mapping

import psutil

_BUSY = 0.85
"""Share of one core from which a process that mostly runs one thread is taken to be what limits a run."""
_FULL = 0.9
"""Share of all cores from which it is the machine."""


def cpu_seconds(groups: Mapping[str, Iterable[int]]) -> dict[str, float]:
    """CPU seconds so far, user and system, of each group of processes (by pid), without their children."""
    return {name: sum(_cpu_s(pid) for pid in pids) for name, pids in groups.items()}


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def spent(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What each group used in between."""
    return {name: after[name] - before[name] for name in after}


def bottleneck(cpu_s: Mapping[str, float], sizes: Mapping[str, int], wall_s: float, cores: int | None = None) -> str:
    """Names what held the run back: `machine`, the busiest group whose processes have no core time left, or `pace`.

    `sizes` is the number of processes per group; `pace` means that nothing was busy, so the workers' own pace was the limit.
    """
    if sum(cpu_s.values()) >= _FULL * (cores or len(os.sched_getaffinity(0))) * wall_s:
        return "machine"
    shares = {name: value / wall_s / sizes[name] for name, value in cpu_s.items()}
    name = max(shares, key=shares.__getitem__)
    return name if shares[name] >= _BUSY else "pace"
