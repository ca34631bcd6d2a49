# SPDX-License-Identifier: Apache-2.0
"""What of a wish the GPUs allow.

Dynamo's formula is `reference.budgeted`: it scales prefill down in proportion and gives decode all the rest, which may be more than was
asked for, while prefill starves. Here the pool that is worst off sets the pace, since a request needs both: the counts that raise the
smaller granted share, of what was asked, as high as it goes, and then use as many GPUs as were asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tandem_protocol.roles import Role


@dataclass(frozen=True)
class Ask:
    """What a pool wants."""

    workers: int
    gpus: int
    """Of one worker."""
    floor: int
    """Granted in any case: the configuration proves that all floors fit together."""


def within_budget(asks: Mapping[Role, Ask], budget: int | None) -> dict[Role, int]:
    """Workers per role: at least its floor, at most the larger of floor and wish, all within `budget` GPUs (None: no bound)."""
    wishes = {role: max(ask.workers, ask.floor) for role, ask in asks.items()}
    if budget is None or sum(wishes[role] * ask.gpus for role, ask in asks.items()) <= budget:
        return wishes
    if len(asks) == 1:
        ((role, ask),) = asks.items()
        return {role: max(ask.floor, min(wishes[role], budget // ask.gpus))}
    return _shared(asks, wishes, budget)


def _shared(asks: Mapping[Role, Ask], wishes: Mapping[Role, int], budget: int) -> dict[Role, int]:
    (first, one), (second, two) = asks.items()
    best, best_key = (one.floor, two.floor), (-1.0, -1)
    for mine in range(one.floor, min(wishes[first], (budget - two.floor * two.gpus) // one.gpus) + 1):
        yours = min(wishes[second], (budget - mine * one.gpus) // two.gpus)
        key = (min(_share(mine, wishes[first]), _share(yours, wishes[second])), mine * one.gpus + yours * two.gpus)
        if key > best_key:
            best, best_key = (mine, yours), key
    return {first: best[0], second: best[1]}


def _share(granted: int, asked: int) -> float:
    return granted / asked if asked else 1.0
