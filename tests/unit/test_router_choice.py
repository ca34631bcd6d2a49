# SPDX-License-Identifier: Apache-2.0
"""Which candidate is chosen, in every mode."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_protocol.errors import RequestError
from tandem_router.choice import Field, choose
from tandem_router.config import RouterMode

COSTS = st.lists(st.floats(0, 1e6), min_size=1, max_size=20)


def field(cost: list[float], requests: list[int] | None = None, blocks: list[float] | None = None, last: list[int] | None = None) -> Field:
    """Candidates; what is left out is all alike."""
    zeros = [0] * len(cost)
    return Field(np.array(cost, float), np.array(requests or zeros), np.array(blocks or zeros, float), np.array(last or zeros))


def draws(mode: RouterMode, candidates: Field, temperature: float = 0.0, count: int = 4000) -> Counter[int]:
    """How often each candidate is chosen by one seeded generator."""
    rng = random.Random(7)
    return Counter(choose(mode, candidates, temperature, rng) for _ in range(count))


@pytest.mark.parametrize(
    ("mode", "chosen"),
    [(RouterMode.KV, 1), (RouterMode.ROUND_ROBIN, 2), (RouterMode.LEAST_LOADED, 0)],
)
def test_modes_without_chance(mode: RouterMode, chosen: int) -> None:
    """The cheapest, the one whose turn it is, the one with the least in flight."""
    assert draws(mode, field([3, 1, 2], [1, 3, 2], [9, 9, 9], [3, 2, 1])) == {chosen: 4000}


@pytest.mark.parametrize("mode", [RouterMode.KV, RouterMode.LEAST_LOADED])
def test_ties_go_to_the_smallest_load_then_to_the_least_recent(mode: RouterMode) -> None:
    """Requests first, then blocks, then whose turn it is."""
    rng = random.Random(1)
    assert choose(mode, field([5, 5, 5], [2, 1, 1], [0, 8, 7], [0, 0, 0]), 0, rng) == 2
    assert choose(mode, field([5, 5 + 1e-12, 5], [1, 1, 1], [7, 7, 7], [9, 4, 6]), 0, rng) == 1


def test_random_is_even() -> None:
    """Cost and load don't matter."""
    counts = draws(RouterMode.RANDOM, field([0, 9, 9, 9], [9, 0, 0, 0]))
    assert all(900 < counts[at] < 1100 for at in range(4))


def test_the_better_of_two() -> None:
    """The most loaded is never chosen, the least loaded in half of all pairs of four; a single candidate takes all."""
    counts = draws(RouterMode.POWER_OF_TWO, field([0] * 4, [1, 2, 3, 4]))
    assert counts[3] == 0
    assert counts[0] == pytest.approx(2000, rel=0.1)
    assert draws(RouterMode.POWER_OF_TWO, field([1])) == {0: 4000}


def test_direct_needs_a_name() -> None:
    """Nobody is guessed."""
    with pytest.raises(RequestError, match="worker_id"):
        choose(RouterMode.DIRECT, field([1, 2]), 0, random.Random(1))


def test_temperature_follows_the_softmax_of_normalised_costs() -> None:
    """Costs 0, 1/2 and 1 of the spread at T = 0.5: weights 1, e^-1, e^-2, whatever the unit of the cost."""
    weights = np.exp([0, -1, -2])
    for scale in (1, 1000):
        counts = draws(RouterMode.KV, field([10 * scale, 15 * scale, 20 * scale]), 0.5)
        assert [counts[at] / 4000 for at in range(3)] == pytest.approx((weights / weights.sum()).tolist(), abs=0.03)


def test_equal_costs_are_drawn_alike_at_any_temperature() -> None:
    """All equal is uniform."""
    assert all(800 < count < 1200 for count in draws(RouterMode.KV, field([3, 3, 3, 3]), 0.01).values())


@given(COSTS, st.floats(0.001, 100), st.integers(0, 1000), st.sampled_from([mode for mode in RouterMode if mode is not RouterMode.DIRECT]))
def test_the_chosen_one_is_a_candidate(cost: list[float], temperature: float, seed: int, mode: RouterMode) -> None:
    """In every mode, at any temperature."""
    assert 0 <= choose(mode, field(cost), temperature, random.Random(seed)) < len(cost)


@given(COSTS, st.integers(0, 1000))
def test_cold_means_cheapest(cost: list[float], seed: int) -> None:
    """At temperature 0 nothing cheaper is passed over."""
    assert cost[choose(RouterMode.KV, field(cost), 0, random.Random(seed))] <= min(cost) + 1e-6
