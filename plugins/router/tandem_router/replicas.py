# SPDX-License-Identifier: Apache-2.0
"""Routers of the same workers share their books: own changes go out, the others' come in, the dead are forgotten.

Everything runs on the router's event loop. Placement never waits for any of it: a router that hears nothing of the others places
by its own books, as one without replicas does.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import msgspec
import zmq

from tandem_protocol.discovery import Discovery
from tandem_protocol.errors import ConfigError, UnavailableError
from tandem_protocol.routers import RouterRecord
from tandem_router.book_events import Add, BookEvent
from tandem_router.books import Books
from tandem_router.replica_sockets import Announcer, Batch, Greeting, Received, ReplicaLink, State
from tandem_router.replica_stream import ReplicaStream

log = logging.getLogger(__name__)

_TICK_S = 0.25
"""Between two signs of life, and how late a lost batch may be noticed when nothing follows it."""
_BURST = 256
"""Messages per socket and turn, so that a busy router doesn't keep requests waiting."""
_RETRY_S = 1.0


class ReplicaState(msgspec.Struct, frozen=True, kw_only=True):
    """One other router, as metrics and `/fleet` show it; for the counters see `replica_stream.StreamCounts`."""

    id: str
    synced: bool
    requests: int
    """Of it, in our books."""
    malformed: int
    batches: int
    lost: int
    dropped: int
    resyncs: int
    unanswered: int


class Sharing(Protocol):
    """What a router needs of its replicas. The null object is `Alone`."""

    def publish(self, event: BookEvent) -> None:
        """Tells the others of a change of the own books."""

    async def start(self, model: str, books: Iterable[Books]) -> None:
        """Makes this router known and follows the others."""

    def states(self) -> tuple[ReplicaState, ...]:
        """The other routers, ordered by id."""

    async def close(self) -> None:
        """Leaves."""


class Alone:
    """A router without replicas."""

    def publish(self, event: BookEvent) -> None:
        """Nobody wants to know."""

    async def start(self, model: str, books: Iterable[Books]) -> None:
        """There is nobody to follow."""

    def states(self) -> tuple[ReplicaState, ...]:
        """None."""
        return ()

    async def close(self) -> None:
        """There is nothing to leave."""


class Replicas:
    """Shares the books from `start` to `close`. Changes before `start` are in the state that the others ask for."""

    def __init__(self, name: str, host: str, port: int, discovery: Discovery[RouterRecord]) -> None:
        """Binds at once, so that a wrong address ends the start: raises ConfigError. Closes the discovery in the end."""
        self._name, self._discovery = name, discovery
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._announcer = Announcer(self._context, name, host, port)
        self._books: dict[str, Books] = {}
        self._peers: dict[str, _Peer] = {}
        self._model = ""
        self._seq = 0
        self._unsent: list[BookEvent] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, model: str, books: Iterable[Books]) -> None:
        """Returns at once; registering goes on in the background."""
        self._model = model
        self._books = {one.pool: one for one in books}
        self._loop = asyncio.get_running_loop()
        changes, questions = self._announcer.descriptors
        self._loop.add_reader(changes, self._announcer.greet)
        self._loop.add_reader(questions, self._answer)
        self._tasks = [asyncio.create_task(step) for step in (self._register(), self._follow(), self._tick_for_ever())]

    def publish(self, event: BookEvent) -> None:
        """All changes of one turn of the event loop travel together."""
        if not self._tasks:
            return
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append(event)

    def states(self) -> tuple[ReplicaState, ...]:
        """A copy of all figures."""
        return tuple(peer.report() for _, peer in sorted(self._peers.items()))

    async def close(self) -> None:
        """The others forget our requests as soon as our record is gone."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._discovery.close()
        for name in tuple(self._peers):
            self._leave(name)
        if tasks:
            for descriptor in self._announcer.descriptors:
                self._loop.remove_reader(descriptor)
        self._announcer.close()
        self._context.destroy(0)

    def apply(self, records: Sequence[RouterRecord]) -> None:
        """Takes the routers as discovery has them now."""
        others = {record.id: record for record in records if record.id != self._name and record.model == self._model}
        for name in self._peers.keys() - others.keys():
            self._leave(name)
        for name in others.keys() - self._peers.keys():
            self._join(others[name])

    def tick(self, now: float) -> None:
        """One sign of life, and what is overdue."""
        self._flush()
        self._announcer.publish(self._seq, ())
        for peer in tuple(self._peers.values()):
            peer.tick(now)

    def _join(self, record: RouterRecord) -> None:
        try:
            self._peers[record.id] = _Peer(ReplicaLink(self._context, record), record.id, self._books, self._loop)
        except ConfigError:
            log.exception("replicas.unreachable router=%s", record.id)
        else:
            log.info("replicas.joined router=%s", record.id)

    def _leave(self, name: str) -> None:
        self._peers.pop(name).close()
        forgotten = sum(books.forget_replica(name) for books in self._books.values())
        log.info("replicas.left router=%s requests=%d", name, forgotten)

    def _flush(self) -> None:
        if self._unsent and not self._context.closed:
            events, self._unsent = self._unsent, []
            self._seq += 1
            self._announcer.publish(self._seq, events)

    def _answer(self) -> None:
        """The state is that of the last number: what is not sent yet goes first."""
        self._flush()
        for question in self._announcer.questions(_BURST):
            self._announcer.answer(question, self._seq, tuple(self._own_requests()))

    def _own_requests(self) -> Iterator[Add]:
        for books in self._books.values():
            yield from books.own_requests()

    async def _register(self) -> None:
        record = RouterRecord(id=self._name, model=self._model, events_endpoint=self._announcer.events_endpoint,
                              state_endpoint=self._announcer.state_endpoint)
        while True:
            try:
                await self._discovery.register(record)
            except UnavailableError as exc:
                log.warning("replicas.unregistered %s: the other routers don't see this one yet", exc)
                await asyncio.sleep(_RETRY_S)
            else:
                return

    async def _follow(self) -> None:
        while True:
            try:
                async for snapshot in self._discovery.watch():
                    self.apply(snapshot.records)
            except Exception:  # the view that we have stays valid; discovery is asked again
                log.exception("replicas.watch_failed")
            await asyncio.sleep(_RETRY_S)

    async def _tick_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self.tick(time.monotonic())


class _Peer:
    """One other router: its sockets, its stream, and our books as the stream's sink."""

    def __init__(self, link: ReplicaLink, name: str, books: dict[str, Books], loop: asyncio.AbstractEventLoop) -> None:
        self._link, self._name, self._books, self._loop = link, name, books, loop
        self._stream = ReplicaStream(self)
        self._malformed = 0
        self._closed = False
        for descriptor in link.descriptors:
            loop.add_reader(descriptor, self._turn)

    def report(self) -> ReplicaState:
        """Its figures."""
        requests = sum(books.count_of(self._name) for books in self._books.values())
        return ReplicaState(id=self._name, synced=self._stream.synced, requests=requests, malformed=self._malformed,
                            **vars(self._stream.counts))

    def tick(self, now: float) -> None:
        """Acts on deadlines, and looks for messages that no descriptor told of."""
        self._stream.tick(now)
        self._turn()

    def close(self) -> None:
        """Ends it; its requests stay in the books."""
        self._closed = True
        for descriptor in self._link.descriptors:
            self._loop.remove_reader(descriptor)
        self._link.close()

    def ask(self, number: int) -> None:
        """ZMQ may take the answer in while it sends, and then its descriptor stays silent."""
        self._link.ask(number)
        self._loop.call_soon(self._turn)

    def replace(self, requests: Sequence[Add]) -> None:
        """Every pool anew."""
        for books in self._books.values():
            books.forget_replica(self._name)
        self.apply(requests)

    def apply(self, events: Sequence[BookEvent]) -> None:
        """Into the books of each event's pool."""
        for event in events:
            books = self._books.get(event.pool)
            if books is None or event.replica != self._name:
                self._malformed += 1
            else:
                books.apply_remote(event)

    def _turn(self) -> None:
        if self._closed:
            return
        received = self._link.received(_BURST)
        now = time.monotonic()
        for message in received:
            self._take(message, now)
        if len(received) >= _BURST:
            self._loop.call_soon(self._turn)

    def _take(self, message: Received, now: float) -> None:
        match message:
            case Batch():
                self._stream.batch(message.seq, message.events, now)
            case State():
                self._stream.state(message.number, message.seq, message.requests, now)
            case Greeting():
                self._stream.joined(now)
            case None:
                self._malformed += 1
