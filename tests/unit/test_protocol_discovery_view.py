# SPDX-License-Identifier: Apache-2.0
"""What a watcher believes of a store that comes and goes."""

import pytest

from discovery_contract import ids, worker
from tandem_protocol.discovery import Counts
from tandem_protocol.discovery.view import View
from tandem_protocol.workers import WorkerState

GRACE_S = 10.0
A, B = {"a": worker("a")}, {"b": worker("b")}


@pytest.fixture
def counts() -> Counts:
    """Of this test."""
    return Counts()


@pytest.fixture
def view(counts: Counts) -> View:
    """That has seen `a` and `b` at revision 5."""
    view = View(counts, GRACE_S)
    view.listed({**A, **B}, 5, now=0.0)
    return view


def test_who_left_is_gone_at_once(view: View) -> None:
    """The store never went away, so it is right."""
    assert ids(view.listed(A, 6, now=1.0)) == ["a"]


def test_away_keeps_everything(view: View, counts: Counts) -> None:
    """However often it is tried; it counts once."""
    snapshots = [view.lost("refused") for _ in range(3)]
    assert [(ids(snapshot), snapshot.current) for snapshot in snapshots] == [(["a", "b"], False)] * 3
    assert counts.losses == 1


@pytest.mark.parametrize(("now", "believed"), [(100.0, ["a", "b"]), (109.9, ["a", "b"]), (110.1, ["a"])])
def test_who_is_missing_after_it_came_back_has_one_lease(view: View, now: float, believed: list[str]) -> None:
    """The grace begins with the return, however long it was away."""
    view.lost("refused")
    view.listed(A, 6, now=100.0)
    snapshot = view.listed(A, 7, now=now)
    assert (ids(snapshot), snapshot.current) == (believed, True)


def test_a_store_that_began_anew_counts_as_back(view: View, counts: Counts) -> None:
    """Its revision went backwards: wiped and started between two looks."""
    assert ids(view.listed({}, 1, now=1.0)) == ["a", "b"]
    assert ids(view.listed({}, 2, now=12.0)) == []
    assert counts.graced == 2


def test_registering_again_ends_the_grace(view: View) -> None:
    """From then on the store's word counts again, also that it left."""
    view.lost("refused")
    view.listed({}, 6, now=0.0)
    again = {"b": worker("b", state=WorkerState.DRAINING)}
    assert view.listed(again, 7, now=1.0).records == (worker("a"), again["b"])
    assert ids(view.listed({}, 8, now=2.0)) == ["a"]


def test_going_away_again_does_not_prolong_the_grace(view: View) -> None:
    """Else a store that comes and goes would keep the dead for ever."""
    view.lost("refused")
    view.listed(A, 6, now=0.0)
    view.lost("refused")
    view.listed(A, 7, now=9.0)
    assert ids(view.listed(A, 8, now=10.1)) == ["a"]
