# SPDX-License-Identifier: Apache-2.0
"""Which leases run, told by when they were seen to change; the clock is the test's."""

import pytest

from tandem_protocol.discovery.sightings import Lease, Sightings


def lease(name: str = "a", version: str = "1", uid: str = "u", duration_s: float = 10.0, record: bytes = b"r") -> Lease:
    """Of ten seconds."""
    return Lease(name, uid, version, duration_s, record)


@pytest.fixture
def seen() -> Sightings:
    """That has seen `a` and `b` at 0."""
    seen = Sightings()
    seen.listed([lease("a"), lease("b")], 0.0)
    return seen


def test_a_lease_that_does_not_change_ends(seen: Sightings) -> None:
    """After its term, not before; one that changed runs on."""
    seen.listed([lease("a"), lease("b", "2")], 9.9)
    assert sorted(seen.running) == ["a", "b"]
    seen.listed([lease("a"), lease("b", "2")], 10.1)
    assert sorted(seen.running) == ["b"]


def test_each_lease_has_its_own_term(seen: Sightings) -> None:
    """A fleet may change its own one worker after the other."""
    seen.listed([lease("a"), lease("long", duration_s=60.0)], 5.0)
    seen.listed([lease("a"), lease("long", duration_s=60.0)], 50.0)
    assert sorted(seen.running) == ["long"]


def test_an_ended_lease_comes_back_with_a_change(seen: Sightings) -> None:
    """Its worker stood still; another object of the same name is another start."""
    seen.listed([lease("a"), lease("b")], 11.0)
    assert seen.running == {}
    assert seen.changed(lease("a", "2"), 12.0)
    seen.listed([lease("a", "2"), lease("b", uid="other")], 13.0)
    assert sorted(seen.running) == ["a", "b"]


def test_only_a_read_judges(seen: Sightings) -> None:
    """We stood still for a minute: events of workers that live wait unread, and the first of them condemns nobody."""
    assert seen.overdue(60.0)
    assert not seen.changed(lease("a", "20"), 60.0)
    assert sorted(seen.running) == ["a", "b"]
    seen.listed([lease("a", "20"), lease("b", "20")], 60.1)
    assert sorted(seen.running) == ["a", "b"]


def test_silence_counts_only_while_the_store_was_there(seen: Sightings) -> None:
    """After its return every lease has one term; who had ended before stays ended."""
    seen.listed([lease("a", "2"), lease("b")], 11.0)
    seen.excuse(100.0)
    seen.listed([lease("a", "2"), lease("b")], 100.0)
    assert sorted(seen.running) == ["a"]
    seen.listed([lease("a", "2"), lease("b")], 110.1)
    assert seen.running == {}


def test_what_is_more_than_a_sign_of_life(seen: Sightings) -> None:
    """A renewal is no news; another record, a newcomer, a removal are."""
    assert not seen.changed(lease("a", "2"), 1.0)
    assert seen.changed(lease("a", "3", record=b"other"), 2.0)
    assert seen.changed(lease("new"), 2.0)
    seen.gone("new")
    assert sorted(seen.running) == ["a", "b"]


def test_only_the_long_dead_may_be_removed(seen: Sightings) -> None:
    """In the version in which they died."""
    seen.listed([lease("a"), lease("b", "2")], 11.0)
    assert seen.long_dead(69.0) == ()
    assert seen.long_dead(71.0) == (lease("a"),)
