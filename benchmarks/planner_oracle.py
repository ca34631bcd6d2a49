# SPDX-License-Identifier: Apache-2.0
"""What was possible: a planner that knows every arrival beforehand, with the same start times, on the same simulated fleet.

Its need at a moment is the planner's own model's, for the arrivals around that moment; it asks for workers so long before that they are
ready in time, and keeps those that it would have to start again within a start's time. How much headroom is best depends on what is
wanted, so schedules of several are run, uphill from the model's own, and the best one counts. It is what a clairvoyant planner of this kind
reaches, not a proof that nothing more is possible.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tandem_planner.capacity import Demand
from tandem_planner.simulate.load import Load
from tandem_planner.sla_plan import SlaModel
from tandem_planner.terms import Decision, Observation
from tandem_protocol.roles import Role

Counts = npt.NDArray[np.int64]
"""Workers, every `STRIDE_S`."""
WINDOW_S = 30.0
"""Around a moment, over which arrivals are counted: less is chance."""
STRIDE_S = 5.0
FACTORS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.25)
"""Of the traffic, for which the model is asked: below 1 fewer workers than it advises."""
_BEGIN = (FACTORS.index(1.0), FACTORS.index(1.0))


@dataclass(frozen=True)
class OraclePolicy:
    """A schedule made beforehand."""

    schedule: Mapping[Role, tuple[int, ...]]
    """Workers wanted, every `STRIDE_S` from 0 on; the last holds for ever."""

    def decide(self, observation: Observation) -> Decision:
        """What the schedule has for now."""
        at = max(0, int(observation.at_s / STRIDE_S + 1e-6))
        target = {role: counts[min(at, len(counts) - 1)] for role, counts in self.schedule.items()}
        return Decision(observation.at_s, target, "as known beforehand")

    def beginning(self) -> dict[Role, int]:
        """Workers before the first request."""
        return {role: counts[0] for role, counts in self.schedule.items()}


def make_oracle(load: Load, model: SlaModel, start_s: float, factors: Mapping[Role, float], budget: int) -> OraclePolicy:
    """A schedule of a disaggregated fleet for a load with these headrooms, within a budget of workers."""
    demands = list(_demands(load))
    needs = {role: np.array([_need(model, role, demand, factor) for demand in demands]) for role, factor in factors.items()}
    ahead = 1 + int(np.ceil(start_s / STRIDE_S))
    kept = {role: _highest_ahead(counts, ahead) for role, counts in needs.items()}
    return OraclePolicy(_within(kept, budget))


def _demands(load: Load) -> Iterator[Demand | None]:
    """The traffic around each moment; None where nobody comes."""
    for at_s in np.arange(0, load.duration_s, STRIDE_S):
        low, high = max(0.0, at_s - WINDOW_S / 2), min(load.duration_s, at_s + WINDOW_S / 2)
        span = slice(*np.searchsorted(load.at_s, (low, high)))
        count = span.stop - span.start
        if not count:
            yield None
            continue
        tokens = load.input_tokens[span]
        yield Demand(count / (high - low), float(tokens.mean()), float(load.output_tokens[span].mean()),
                     float(load.cached_tokens[span].sum() / tokens.sum()))


def _need(model: SlaModel, role: Role, demand: Demand | None, factor: float) -> int:
    return 1 if demand is None else max(1, model.need(role, demand.times(factor)).workers)


def _highest_ahead(counts: Counts, ahead: int) -> Counts:
    """The most that is needed from each moment to a start's time later."""
    padded = np.concatenate((counts, np.full(ahead, counts[-1])))
    windows = np.lib.stride_tricks.sliding_window_view(padded, ahead + 1)[: len(counts)]
    highest: Counts = windows.max(axis=1)
    return highest


def _within(kept: Mapping[Role, Counts], budget: int) -> dict[Role, tuple[int, ...]]:
    """Where the budget is too small, the larger pool gives way."""
    rows = {role: counts.tolist() for role, counts in kept.items()}
    for at in range(min(map(len, rows.values()))):
        while sum(row[at] for row in rows.values()) > budget:
            largest = max(rows, key=lambda role: rows[role][at])
            rows[largest][at] -= 1
    return {role: tuple(row) for role, row in rows.items()}


def uphill(worth: Callable[[float, float], float]) -> tuple[float, float]:
    """The factors of prefill and decode whose schedule is worth most: from the model's own to a neighbour while one is better."""
    best = _BEGIN
    while (better := max(_neighbours(best), key=lambda at: worth(FACTORS[at[0]], FACTORS[at[1]]))) != best:
        best = better
    return FACTORS[best[0]], FACTORS[best[1]]


def _neighbours(at: tuple[int, int]) -> list[tuple[int, int]]:
    """Itself first, so that equals don't move."""
    steps = [(0, 0), *((step, 0) for step in (-1, 1)), *((0, step) for step in (-1, 1))]
    found = [(at[0] + first, at[1] + second) for first, second in steps]
    return [one for one in found if all(0 <= place < len(FACTORS) for place in one)]
