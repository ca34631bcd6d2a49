# SPDX-License-Identifier: Apache-2.0
"""Which candidate takes a request. Ties go to the smallest load, then to the least recently chosen.

So without any hit the least loaded worker wins, and equals take turns: nothing herds on the first of the list.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tandem_protocol.errors import RequestError
from tandem_router.config import RouterMode

_SAME = 1e-9
"""Costs this close are equal: they are sums of the same few numbers in another order."""


@dataclass(frozen=True)
class Field:
    """n candidates (n >= 1); every array has shape (n,)."""

    cost: NDArray[np.float64]
    requests: NDArray[np.int64]
    """Requests in flight: the load."""
    blocks: NDArray[np.float64]
    """Blocks in flight, which tells apart candidates with as many requests."""
    last_chosen: NDArray[np.int64]
    """Number of the decision that last chose the candidate; 0 for never."""


def choose(mode: RouterMode, field: Field, temperature: float, rng: random.Random) -> int:
    """Position of the chosen candidate. RequestError in mode direct, where a request names its worker and so never comes here."""
    return _CHOICES[mode](field, temperature, rng)


def _cheapest(field: Field, temperature: float, rng: random.Random) -> int:
    if temperature > 0:
        return _sampled(field.cost, temperature, rng)
    ties = np.flatnonzero(field.cost <= field.cost.min() + _SAME)
    return int(ties[0]) if len(ties) == 1 else _least_loaded_of(field, ties)


def _sampled(cost: NDArray[np.float64], temperature: float, rng: random.Random) -> int:
    """Softmax over -cost / (max - min) / T, so that a temperature means the same at any load; equal costs are drawn alike."""
    low = float(cost.min())
    spread = float(cost.max()) - low
    if spread <= _SAME:
        return rng.randrange(len(cost))
    cumulated = np.cumsum(np.exp((low - cost) / spread / temperature))
    return min(int(np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right")), len(cost) - 1)


def _least_loaded_of(field: Field, among: NDArray[np.int64]) -> int:
    order = np.lexsort((field.last_chosen[among], field.blocks[among], field.requests[among]))
    return int(among[order[0]])


def _least_loaded(field: Field, _temperature: float, _rng: random.Random) -> int:
    return _least_loaded_of(field, np.arange(len(field.requests)))


def _next_in_turn(field: Field, _temperature: float, _rng: random.Random) -> int:
    """The least recently chosen: round-robin that stays fair while candidates come and go."""
    return int(field.last_chosen.argmin())


def _any(field: Field, _temperature: float, rng: random.Random) -> int:
    return rng.randrange(len(field.requests))


def _better_of_two(field: Field, _temperature: float, rng: random.Random) -> int:
    count = len(field.requests)
    return _least_loaded_of(field, np.array(rng.sample(range(count), min(2, count))))


def _named(_field: Field, _temperature: float, _rng: random.Random) -> int:
    raise RequestError("in router mode direct every request names its worker: set worker_id, or another DYN_ROUTER_MODE")


_CHOICES: dict[RouterMode, Callable[[Field, float, random.Random], int]] = {
    RouterMode.KV: _cheapest,
    RouterMode.ROUND_ROBIN: _next_in_turn,
    RouterMode.RANDOM: _any,
    RouterMode.POWER_OF_TWO: _better_of_two,
    RouterMode.LEAST_LOADED: _least_loaded,
    RouterMode.DIRECT: _named,
}
