# SPDX-License-Identifier: Apache-2.0
"""Pairs of prefill and decode workers between which handoffs stay silent."""

from router_fleet import Clock
from tandem_router import doubts
from tandem_router.doubts import Doubts


def test_a_silent_pair_is_doubted_for_a_while_and_no_other() -> None:
    """The same prefill worker may be fine for another decode worker."""
    clock = Clock()
    found = Doubts(60.0, clock)
    found.silent("p", "d")
    assert (found.about("d"), found.about("other")) == (frozenset({"p"}), frozenset())
    clock.now += 60.0
    assert found.about("d") == frozenset()


def test_one_request_tries_a_doubted_pair_again() -> None:
    """Others wait for its end: a first token ends the doubt, silence renews it, and so does a client that leaves."""
    clock = Clock()
    found = Doubts(60.0, clock)
    found.silent("p", "d")
    clock.now += 61.0
    found.tried("p", "d")
    assert found.about("d") == frozenset({"p"})
    found.delivered("p", "d")
    assert found.about("d") == frozenset()
    found.tried("p", "d")
    assert found.about("d") == frozenset()


def test_doubts_are_bounded() -> None:
    """The oldest go first."""
    found = Doubts(60.0, Clock())
    for number in range(doubts._MAX_PAIRS + 1):
        found.silent(f"p{number}", "d")
    left = found.about("d")
    assert len(left) == doubts._MAX_PAIRS
    assert "p0" not in left
