# SPDX-License-Identifier: Apache-2.0
"""Sharing of books: the stream's decisions, and whole routers' sides over real sockets that lose what they are told to lose."""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import pytest
import zmq

from tandem_protocol.discovery import open_collection
from tandem_protocol.errors import ConfigError
from tandem_protocol.routers import RouterRecord
from tandem_router.book_events import Add, BookEvent, Free
from tandem_router.books import Books, PlacedPrompt
from tandem_router.replica_sockets import Announcer, ReplicaLink
from tandem_router.replica_stream import ReplicaStream
from tandem_router.replicas import Replicas

WAIT_S = 30.0


def freed(ticket: int) -> list[BookEvent]:
    """A batch."""
    return [Free(replica="r", pool="decode", ticket=ticket)]


@dataclass
class Notes:
    """A sink that writes down what it is told."""

    asked: list[int] = field(default_factory=list)
    states: int = 0
    tickets: list[int] = field(default_factory=list)

    def ask(self, number: int) -> None:
        """A question."""
        self.asked.append(number)

    def replace(self, requests: Sequence[Add]) -> None:
        """A state."""
        self.states += 1

    def apply(self, events: Sequence[BookEvent]) -> None:
        """Changes."""
        self.tickets += [event.ticket for event in events]


def test_changes_after_the_state_are_applied_once_each() -> None:
    """Those that came before it are in it; those that it had to wait for come in order."""
    notes = Notes()
    stream = ReplicaStream(notes)
    stream.joined(0)
    for seq in (4, 5, 6):
        stream.batch(seq, freed(seq), 0)
    assert not stream.synced
    stream.state(notes.asked[-1], 4, (), 0)
    stream.batch(7, freed(7), 0)
    stream.batch(7, freed(7), 0)
    assert (stream.synced, notes.tickets, stream.counts.batches) == (True, [5, 6, 7], 3)


@pytest.mark.parametrize(("seq", "events", "lost"), [(3, freed(3), 1), (2, [], 1), (9, freed(9), 7)])
def test_a_missing_number_asks_for_the_state_again(seq: int, events: list[BookEvent], lost: int) -> None:
    """A sign of life shows a loss at the end; what comes after the gap waits."""
    notes = Notes()
    stream = ReplicaStream(notes)
    stream.joined(0)
    stream.state(1, 1, (), 0)
    stream.batch(seq, events, 0)
    assert (notes.asked, stream.synced, stream.counts.lost, stream.counts.resyncs) == ([1, 2], False, lost, 1)
    stream.state(2, seq, (), 0)
    assert (stream.synced, notes.states, notes.tickets) == (True, 2, [])


def test_a_late_answer_to_an_earlier_question_is_nothing() -> None:
    """It may be older than what the books hold."""
    notes = Notes()
    stream = ReplicaStream(notes)
    stream.joined(0)
    stream.joined(0)
    stream.state(1, 10, (), 0)
    assert not stream.synced
    stream.state(2, 12, (), 0)
    assert stream.synced


def test_an_answer_that_does_not_come_is_asked_for_again() -> None:
    """After a second, and counted."""
    notes = Notes()
    stream = ReplicaStream(notes)
    stream.joined(0)
    stream.tick(0.5)
    stream.tick(1.0)
    assert (notes.asked, stream.counts.unanswered) == ([1, 2], 1)


def test_what_piles_up_before_a_state_is_bounded() -> None:
    """Beyond the bound batches are dropped and counted, and the gap brings another state."""
    notes = Notes()
    stream = ReplicaStream(notes)
    stream.joined(0)
    for seq in range(1, 4200):
        stream.batch(seq, freed(seq), 0)
    assert stream.counts.dropped == 4199 - 4096
    stream.state(1, 0, (), 0)
    assert (notes.asked, notes.tickets) == ([1, 2], [])


@dataclass
class Side:
    """One router's side: its books and what shares them."""

    books: Books
    replicas: Replicas

    def add(self, ticket: int) -> None:
        """A request of four blocks on one of three workers."""
        self.books.add(ticket, f"w{ticket % 3}", 0, PlacedPrompt([ticket, ticket + 1], 64, 16, 40))

    def picture(self) -> dict[tuple[str, int], tuple[str, int]]:
        """(replica, ticket) -> worker and prefill tokens, of all requests."""
        return {key: (held.add.worker, held.prefill_tokens) for key, held in self.books._held.items()}


async def until(condition: Callable[[], bool]) -> None:
    """Looks at every turn of the loop."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - the condition has no event
            await asyncio.sleep(0.01)


@pytest.fixture
async def make() -> AsyncIterator[Callable[[str], Side]]:
    """Makes sides that find each other; closed at the end."""
    sides: list[Side] = []
    url = f"memory:{uuid.uuid4().hex}"

    def make_side(name: str) -> Side:
        replicas = Replicas(name, "127.0.0.1", 0, open_collection(url, RouterRecord))
        sides.append(Side(Books(pool="decode", replica=name, publish=replicas.publish), replicas))
        return sides[-1]

    yield make_side
    for side in sides:
        await side.replicas.close()


async def test_books_agree_whatever_is_lost(make: Callable[[str], Side], monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of one side's batches never leave it: after every loss the other side's books are as if nothing had happened."""
    chance = random.Random(5)
    one, other = make("r1"), make("r2")
    for side in (one, other):
        await side.replicas.start("m", [side.books])
    await until(lambda: all(state.synced for side in (one, other) for state in side.replicas.states()) and bool(one.replicas.states()))
    announcer = one.replicas._announcer
    publish = announcer.publish
    monkeypatch.setattr(announcer, "publish", lambda seq, events: None if events and chance.random() < 0.3 else publish(seq, events))
    for ticket in range(300):
        for side in (one, other):
            side.add(ticket)
            if ticket % 3:
                side.books.prefill_done(ticket)
            if ticket % 2:
                side.books.free(ticket - 1)
        await asyncio.sleep(0)
    await until(lambda: one.picture() == other.picture() and other.replicas.states()[0].synced)
    assert len(one.books) == 300
    [state] = other.replicas.states()
    assert state.resyncs > 0
    assert state.lost > 0
    for side in (one, other):
        side.books.check_integrity()


async def test_a_late_side_gets_the_state_and_a_leaving_one_is_forgotten(make: Callable[[str], Side]) -> None:
    """Its requests leave with it; ours stay."""
    one = make("r1")
    await one.replicas.start("m", [one.books])
    one.add(1)
    late = make("r2")
    late.add(7)
    await late.replicas.start("m", [late.books])
    await until(lambda: len(one.books) == len(late.books) == 2)
    await one.replicas.close()
    await until(lambda: late.replicas.states() == ())
    assert list(late.picture()) == [("r2", 7)]


async def test_routers_of_another_model_are_no_replicas(make: Callable[[str], Side]) -> None:
    """They place on other workers."""
    one, other = make("r1"), make("r2")
    await one.replicas.start("m", [one.books])
    await other.replicas.start("another", [other.books])
    third = make("r3")
    await third.replicas.start("m", [third.books])
    await until(lambda: [state.id for state in one.replicas.states()] == ["r3"])
    assert other.replicas.states() == ()


async def test_strangers_are_counted_and_left_alone(make: Callable[[str], Side]) -> None:
    """Whatever sits at an address where a router was."""
    one = make("r1")
    with zmq.Context() as context:
        stranger = Announcer(context, "stranger", "127.0.0.1", 0)
        await one.replicas.start("m", [one.books])
        await one.replicas._discovery.register(RouterRecord(
            id="r9", model="m", events_endpoint=stranger.events_endpoint, state_endpoint=stranger.state_endpoint))

        def heard() -> bool:
            stranger.greet()
            stranger.publish(1, freed(1))
            return any(state.malformed > 3 for state in one.replicas.states())

        try:
            await until(heard)
            assert not one.replicas.states()[0].synced
            assert one.picture() == {}
        finally:
            stranger.close()


def test_an_address_of_another_host_ends_the_start() -> None:
    """With the settings to change."""
    record = RouterRecord(id="r", model="m", events_endpoint="nonsense", state_endpoint="nonsense")
    with zmq.Context() as context:
        with pytest.raises(ConfigError, match="TANDEM_ROUTER_REPLICA_HOST"):
            Announcer(context, "r", "192.0.2.1", 0)
        with pytest.raises(ConfigError, match="can't be connected"):
            ReplicaLink(context, record)
