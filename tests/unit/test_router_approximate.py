# SPDX-License-Identifier: Apache-2.0
"""Beliefs about caches: they begin at a decision, and end by time, for lack of room, or with their worker."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from router_fleet import Clock, prompt
from tandem_router.approximate import Beliefs
from tandem_router.chains import Keys

SMALL = st.integers(0, 4)


def beliefs(clock: Clock, max_blocks: int = 1000, ttl_s: float = 120) -> Beliefs:
    """Beliefs that are pruned to 0.8."""
    return Beliefs(ttl_s=ttl_s, max_blocks=max_blocks, prune_ratio=0.8, clock=clock)


def match(held: Beliefs, keys: Keys, slots: int = 3) -> list[int]:
    """Depth per slot."""
    return held.match(keys, np.arange(slots)).tolist()


def test_a_prompt_is_believed_to_be_where_it_was_sent() -> None:
    """Whole there, in part where a prompt with the same beginning was sent, nowhere else."""
    held = beliefs(Clock())
    held.believe(0, prompt(3, 5, 1))
    held.believe(2, prompt(3, 5, 2))
    assert match(held, prompt(3, 5, 1)) == [8, 0, 3]
    assert match(held, prompt(0, 0, 1)) == [0, 0, 0]


def test_beliefs_end_after_their_time() -> None:
    """To the second; a renewal starts it anew, and a prefix lives as long as what renewed it."""
    clock = Clock(0)
    held = beliefs(clock)
    held.believe(0, prompt(3, 5, 1))
    clock.now = 60
    held.believe(0, prompt(3, 5, 2))
    clock.now = 119.9
    assert match(held, prompt(3, 5, 1)) == [8, 0, 0]
    clock.now = 120
    assert match(held, prompt(3, 5, 1)) == [3, 0, 0]
    held.believe(0, prompt(3, 5, 2))
    clock.now = 239
    assert match(held, prompt(3, 5, 2)) == [8, 0, 0]
    clock.now = 240
    assert match(held, prompt(3, 5, 2)) == [0, 0, 0]
    assert (len(held), held.ended.expired) == (0, 13)


def test_room_is_made_by_the_earliest() -> None:
    """Above 100 blocks the oldest go until 80 are left."""
    held = beliefs(Clock(), max_blocks=100)
    for seed in range(11):
        held.believe(0, prompt(0, 10, seed))
    assert (len(held), held.ended.pruned) == (80, 30)
    assert [match(held, prompt(0, 10, seed))[0] for seed in range(11)] == [0] * 3 + [10] * 8


def test_room_is_made_in_steps() -> None:
    """A thousand short prompts don't all go in one call, but the bound holds after each and the target is reached."""
    held = beliefs(Clock(), max_blocks=1000)
    for seed in range(1001):
        held.believe(0, prompt(0, 1, seed))
    assert len(held) == 1001 - 64
    sizes = []
    for seed in range(2000, 2003):
        held.believe(0, prompt(0, 1, seed))
        sizes.append(len(held))
    assert sizes == [874, 811, 800]
    held.check_integrity()


def test_expiry_after_a_pause_is_spread() -> None:
    """Sixty-four beliefs a call, until nothing old is left."""
    clock = Clock(0)
    held = beliefs(clock)
    for seed in range(100):
        held.believe(0, prompt(0, 1, seed))
    clock.now = 1000
    held.expire()
    assert len(held) == 36
    held.expire()
    assert len(held) == 0


def test_a_renewed_belief_takes_no_more_room() -> None:
    """A burst of equal prompts is one belief."""
    held = beliefs(Clock())
    for _ in range(1000):
        held.believe(0, prompt(0, 10, 1))
    assert len(held) == 10
    assert len(held._beliefs) == 1


def test_a_gone_worker_is_forgotten() -> None:
    """And only that one."""
    held = beliefs(Clock())
    held.believe(0, prompt(0, 10, 1))
    held.believe(1, prompt(0, 10, 1))
    held.remove(0)
    held.remove(2)
    assert match(held, prompt(0, 10, 1)) == [0, 10, 0]
    held.check_integrity()


@given(st.lists(st.tuples(SMALL, SMALL, SMALL, st.integers(0, 60), st.booleans()), max_size=40))
def test_beliefs_agree_with_a_plain_model(steps: list[tuple[int, int, int, int, bool]]) -> None:
    """After each step every block is believed in for as long as the latest prompt that had it says."""
    clock = Clock(0)
    held = beliefs(clock)
    ends: dict[tuple[int, int], float] = {}
    for system, own, seed, wait, remove in steps:
        clock.now += wait
        slot, keys = seed % 3, prompt(system, own, seed)
        if remove:
            held.remove(slot)
            ends = {place: end for place, end in ends.items() if place[0] != slot}
        held.believe(slot, keys)
        ends |= {(slot, key): clock.now + 120 for key in keys.tolist()}
        held.check_integrity()
        live = {place for place, end in ends.items() if end > clock.now}
        assert len(held) == len(live)
        assert match(held, keys) == [sum((one, key) in live for key in keys.tolist()) for one in range(3)]
