# SPDX-License-Identifier: Apache-2.0
"""Two routers in front of the same mock workers, each in a process of its own: they see each other's requests, and either may die."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from models import make_tiny_model
from router_process import OtherRouter, other_router
from routers import LocalRouter, mocks, router, until
from servers import get_text

SYNC = {"DYN_ROUTER_REPLICA_SYNC": "true"}
LONG = 6000
"""Tokens: longer than any test here takes, in the mock's time."""


def prompt(seed: int) -> list[int]:
    """Token ids of eight blocks of 16, and one more."""
    return [(seed * 7919 + i * 31) % 30000 + 1 for i in range(129)]


def loads(local: LocalRouter) -> list[int]:
    """Requests in flight per worker, as the router's books have them, in ascending order."""
    return sorted(load.active_requests for load in local.router.fleet.generating.loads())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's."""
    return make_tiny_model(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Four workers; their discovery folder."""
    folder = tmp_path_factory.mktemp("discovery")
    with mocks(folder, "--workers", "4", "--speedup", "1"):
        yield folder


@pytest.fixture(scope="module")
def living(workers: Path, tokenizer: Path) -> Iterator[OtherRouter]:
    """A router in a process of its own; the last test kills it."""
    with other_router(workers, 4, tokenizer, **SYNC) as one:
        yield one


@pytest.fixture
def other(living: OtherRouter) -> Iterator[OtherRouter]:
    """That router, with nothing in flight before and after."""
    yield living
    if living.process.poll() is None:
        living.abort()
        until(lambda: living.fleet["active"] == 0, "the requests of this test to be gone")


@pytest.fixture
def local(workers: Path, other: OtherRouter, tokenizer: Path) -> Iterator[LocalRouter]:
    """The router that lives on; it came up after the other one and follows it."""
    with router(workers, 4, tokenizer, **SYNC) as one:
        until(lambda: [state.synced for state in one.router.replicas.states()] == [True], "the other router to be followed")
        yield one


def test_a_router_places_around_what_the_other_one_placed(other: OtherRouter, local: LocalRouter) -> None:
    """Two requests through one, two through the other: each worker has one, in the books of both."""
    for seed in (1, 2):
        other.send(prompt(seed), LONG)
    until(lambda: loads(local) == [0, 0, 1, 1], "the other router's requests")
    sent = [local.send(prompt(seed), max_tokens=LONG) for seed in (3, 4)]
    until(lambda: all(one.responses for one in sent), "both streams to have begun")
    assert loads(local) == [1, 1, 1, 1]
    until(lambda: sorted(worker["active_requests"] for worker in other.fleet["workers"]) == [1, 1, 1, 1], "the other router to see ours")
    local.router.fleet.generating.books.check_integrity()


def test_a_late_router_learns_what_is_in_flight(workers: Path, other: OtherRouter, tokenizer: Path) -> None:
    """And hears how it ends."""
    for seed in range(3):
        other.send(prompt(seed), LONG)
    until(lambda: other.fleet["active"] == 3, "three requests in flight")
    with router(workers, 4, tokenizer, **SYNC) as late:
        until(lambda: sum(loads(late)) == 3, "the requests that were there before")
        [state] = late.router.replicas.states()
        assert (state.id, state.synced, state.requests) == (other.name, True, 3)
        other.abort()
        until(lambda: sum(loads(late)) == 0, "the end of them")
        assert late.router.replicas.states()[0].lost == 0
        assert f'tandem_router_replica{{replica="{other.name}",what="synced"}} 1.0' in get_text(f"{late.admin}/metrics")


def test_routers_that_do_not_sync_ignore_each_other(workers: Path, other: OtherRouter, tokenizer: Path) -> None:
    """The default."""
    with router(workers, 4, tokenizer) as alone:
        other.send(prompt(1), LONG)
        until(lambda: other.fleet["active"] == 1, "a request in flight")
        assert alone.router.replicas.states() == ()
        assert alone.router.name not in {replica["id"] for replica in other.fleet["replicas"]}
        assert loads(alone) == [0, 0, 0, 0]


def test_a_killed_router_is_forgotten_and_ours_goes_on(other: OtherRouter, local: LocalRouter) -> None:
    """kill -9 with requests in flight at both: its load leaves the books, our streams end whole."""
    unbroken = [local.send(prompt(seed), max_tokens=150).text for seed in (11, 12)]
    for seed in range(4):
        other.send(prompt(seed), LONG)
    sent = [local.send(prompt(seed), max_tokens=150) for seed in (11, 12)]
    until(lambda: sum(loads(local)) == 6, "six requests in flight")
    other.kill()
    until(lambda: local.router.replicas.states() == (), "the dead router to leave")
    assert sum(loads(local)) <= 2
    assert [one.text for one in sent] == unbroken
    until(lambda: loads(local) == [0, 0, 0, 0], "empty books")
    local.router.fleet.generating.books.check_integrity()
