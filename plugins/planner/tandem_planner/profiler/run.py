# SPDX-License-Identifier: Apache-2.0
"""A whole profile: every point of the grid that the journal doesn't have yet, then the files that the planner reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tandem_planner.profile_data import DecodePoints, PrefillPoints, Profile
from tandem_planner.profiler.grid import DecodePoint, GridPlan
from tandem_planner.profiler.journal import Journal
from tandem_planner.profiler.measuring import Prompts, Streams, measure_decode, measure_prefill
from tandem_protocol.errors import EngineError

Say = Callable[[str], None]
_BAR = 20
"""Characters of the progress bar."""


@dataclass(frozen=True)
class Measuring:
    """How points are measured."""

    prompts: Prompts
    repeats: int = 3
    prefill: bool = True
    decode: bool = True


async def measure(plan: GridPlan, journal: Journal, streams: Streams, how: Measuring, say: Say) -> None:
    """Fills the journal. A decode point that never gets steady is left out and said; everything else that fails is raised.

    May be cancelled at any time: what was measured until then is in the journal.
    """
    prefill = plan.prefill() if how.prefill else []
    rows = plan.rows() if how.decode else []
    count = _Count(len(prefill) + sum(map(len, rows)), say)
    for point in prefill:
        if point not in journal.prefill:
            journal.add_prefill(point, await measure_prefill(point, streams, how.prompts, how.repeats))
        count.say(f"prefill {point.isl} tokens: TTFT {journal.prefill[point].ttft_s * 1e3:.1f} ms")
    for row in rows:
        await _measure_row(row, journal, streams, how.prompts, count)


async def _measure_row(row: Sequence[DecodePoint], journal: Journal, streams: Streams, prompts: Prompts, count: "_Count") -> None:
    """Points of one context share their prompts."""
    most = max((point.requests for point in row if point not in journal.decode), default=0)
    batch = [prompts.draw(row[0].isl) for _ in range(most)]
    for point in row:
        try:
            if point not in journal.decode:
                journal.add_decode(point, await measure_decode(point, streams, batch[: point.requests]))
            found = journal.decode[point]
            outcome = f"ITL {found.itl_s * 1e3:.2f} ms, {found.tokens_per_s:.0f} tokens/s"
        except EngineError as exc:
            outcome = f"left out: {exc}"
        count.say(f"decode {point.requests} x {point.isl} tokens: {outcome}")


@dataclass
class _Count:
    """Progress: a bar, and what was measured last."""

    total: int
    out: Say
    done: int = 0

    def say(self, text: str) -> None:
        """One point more."""
        self.done += 1
        full = round(_BAR * self.done / self.total)
        self.out(f"[{'#' * full}{'.' * (_BAR - full)}] {self.done}/{self.total} {text}")


def profile_of(plan: GridPlan, journal: Journal, gpus: int) -> Profile:
    """What the journal has of this grid; a role without any point is None."""
    return Profile(_prefill(plan, journal, gpus), _decode(plan, journal, gpus))


def _prefill(plan: GridPlan, journal: Journal, gpus: int) -> PrefillPoints | None:
    points = [point for point in plan.prefill() if point in journal.prefill]
    if not points:
        return None
    isl = np.array([point.isl for point in points], dtype=np.float64)
    ttft = np.array([journal.prefill[point].ttft_s for point in points])
    return PrefillPoints(isl, ttft * 1e3, isl / ttft / gpus)


def _decode(plan: GridPlan, journal: Journal, gpus: int) -> DecodePoints | None:
    """Rows have the context that was asked for, so that they stay rows; KV use is that of the window that was measured."""
    points = [point for point in plan.decode() if point in journal.decode]
    if not points:
        return None
    results = [journal.decode[point] for point in points]
    use = np.array([point.requests * result.context for point, result in zip(points, results, strict=True)]) / plan.max_kv_tokens
    return DecodePoints(
        np.minimum(use, 1.0), np.array([point.context for point in points]), np.array([result.itl_s * 1e3 for result in results]),
        np.array([result.tokens_per_s / gpus for result in results]), float(plan.max_kv_tokens),
    )
