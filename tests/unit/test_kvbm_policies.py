# SPDX-License-Identifier: Apache-2.0
"""What goes first, and what is worth writing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_kvbm.policies.admission import Admission
from tandem_kvbm.policies.eviction import POLICIES, ByPriority, EvictionPolicy, LeastRecentlyUsed, Sketch, TinyLfu
from tandem_protocol.errors import ConfigError


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def name(number: int) -> bytes:
    return b"block-%d" % number


@pytest.fixture(params=sorted(POLICIES))
def policy(request: pytest.FixtureRequest) -> EvictionPolicy:
    return POLICIES[request.param]()


def test_every_policy_passes_over_protected_blocks(policy: EvictionPolicy) -> None:
    for number in range(4):
        policy.add(name(number))
    protected = {name(number) for number in range(3)}
    assert policy.victim(protected) == name(3)
    assert policy.victim(protected | {name(3)}) is None


def test_every_policy_forgets_what_is_removed(policy: EvictionPolicy) -> None:
    for number in range(10):
        policy.add(name(number))
    for number in range(10):
        policy.remove(name(number))
    assert len(policy) == 0
    assert policy.victim(()) is None
    with pytest.raises(KeyError):
        policy.remove(name(1))


@given(st.lists(st.tuples(st.sampled_from(["add", "touch", "evict"]), st.integers(0, 12)), max_size=200), st.sampled_from(sorted(POLICIES)))
def test_every_policy_knows_exactly_its_blocks(steps: list[tuple[str, int]], which: str) -> None:
    policy, held = POLICIES[which](), set[bytes]()
    for step, number in steps:
        key = name(number)
        if step == "add" and key not in held:
            policy.add(key)
            held.add(key)
        elif step == "touch" and key in held:
            policy.touch(key)
        elif step == "evict":
            victim = policy.victim({key})
            assert victim is None or victim in held - {key}
            assert (victim is None) == (not held - {key})
            if victim is not None:
                policy.remove(victim)
                held.discard(victim)
        assert len(policy) == len(held)


def test_lru_gives_up_the_longest_unused() -> None:
    policy = LeastRecentlyUsed()
    for number in range(3):
        policy.add(name(number))
    policy.touch(name(0))
    assert policy.victim(()) == name(1)


def test_tinylfu_keeps_what_is_used_often_through_a_flood() -> None:
    policy, capacity = TinyLfu(), 100
    for number in range(capacity):
        policy.add(name(number))
    for _ in range(3):
        for number in range(50):
            policy.touch(name(number))
    for number in range(1000, 1500):
        victim = policy.victim(())
        assert victim is not None
        policy.remove(victim)
        policy.add(name(number))
    assert all(name(number) in policy for number in range(50))


def test_lru_loses_the_same_blocks_to_the_flood() -> None:
    policy, capacity = LeastRecentlyUsed(), 100
    for number in range(capacity):
        policy.add(name(number))
    for number in range(1000, 1500):
        victim = policy.victim(())
        assert victim is not None
        policy.remove(victim)
        policy.add(name(number))
    assert not any(name(number) in policy for number in range(capacity))


def test_the_sketch_counts_and_forgets() -> None:
    sketch = Sketch(1024)
    for _ in range(6):
        sketch.add(b"a")
    assert sketch.count(b"a") == 6
    for number in range(10 * 1024 - 6):
        sketch.add(name(number))
    assert 3 <= sketch.count(b"a") <= 7


def test_lower_priorities_go_first_and_higher_ones_stay() -> None:
    blocks = ByPriority("lru")
    blocks.add(b"high", 9)
    blocks.add(b"old", 0)
    blocks.add(b"new", 0)
    assert blocks.victim((), 0) == b"old"
    blocks.remove(b"old")
    blocks.remove(b"new")
    assert blocks.victim((), 5) is None
    assert blocks.victim((), 9) == b"high"
    blocks.check_integrity()


def test_an_unknown_policy_names_the_known() -> None:
    with pytest.raises(ConfigError, match="lru, tinylfu"):
        ByPriority("fifo")


def test_a_block_is_admitted_when_it_comes_back() -> None:
    admission = Admission(clock=Clock())
    assert not admission.sees(b"a")
    assert not admission.admits(b"a")
    assert admission.sees(b"a")
    assert admission.admits(b"a")
    assert not admission.admits(b"b")


def test_counts_double_and_decay() -> None:
    clock = Clock()
    admission = Admission(minimum=4, decay_s=600.0, clock=clock)
    assert [admission.sees(b"a") for _ in range(3)] == [False, False, True]
    clock.now += 600.0
    assert not admission.admits(b"a")
    clock.now += 3 * 600.0
    assert not admission.sees(b"a")
    assert [admission.sees(b"a") for _ in range(2)] == [False, True]


def test_a_block_that_comes_back_too_late_starts_anew() -> None:
    clock = Clock()
    admission = Admission(clock=clock)
    admission.sees(b"a")
    clock.now += 601.0
    assert not admission.sees(b"a")


def test_the_filter_forgets_the_longest_unseen_when_it_is_full() -> None:
    admission = Admission(capacity=2, clock=Clock())
    admission.sees(b"a")
    admission.sees(b"b")
    admission.sees(b"c")
    assert len(admission) == 2
    assert not admission.sees(b"a")
    assert admission.sees(b"c")
