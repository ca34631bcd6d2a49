# SPDX-License-Identifier: Apache-2.0
"""The sockets by which routers share their books, and what travels on them. Edge module: knows ZMQ.

Every router binds a PUB for its changes, `[name, number (8 bytes, big-endian), msgpack list of events]`, and a ROUTER for its state:
asked `[question (8 bytes)]`, it answers `[question, name, number, msgpack list of Adds]`. PUB greets each subscription with one
frame, so a subscriber knows from when on nothing can pass it by. Everything runs on one event loop; no call waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import zmq

from tandem_protocol.errors import ConfigError
from tandem_protocol.routers import RouterRecord
from tandem_router.book_events import Add, BookEvent

_QUEUED = 100_000
"""Messages per peer, both ways; what does not fit is dropped, and found by its number."""
_RECONNECT_MS, _RECONNECT_LIMIT_MS = 50, 1_000
_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 2_000, 6_000
_GREETING = b"welcome"
"""ZMQ sends no empty one."""
_EVENTS: msgspec.msgpack.Decoder[list[BookEvent]] = msgspec.msgpack.Decoder(list[BookEvent])
_ADDS: msgspec.msgpack.Decoder[list[Add]] = msgspec.msgpack.Decoder(list[Add])
_ENCODER = msgspec.msgpack.Encoder()

@dataclass(frozen=True)
class Batch:
    """Changes of one router's books."""

    seq: int
    events: list[BookEvent]


@dataclass(frozen=True)
class State:
    """The answer to a question: all of a router's requests as of batch `seq`."""

    number: int
    seq: int
    requests: list[Add]


class Greeting:
    """The subscription stands."""


Received = Batch | State | Greeting | None
"""None for what is nothing of the router that was expected: malformed, or of another at its address."""


class Announcer:
    """A router's own sockets. Resource handling: `close` frees them.

    Raises ConfigError at construction for an address that can't be bound.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", name: str, host: str, port: int) -> None:
        """Binds two ports from `port` on, or any two for 0."""
        self._name = name.encode()
        self._changes = _socket(context, zmq.PUB)
        self._changes.set(zmq.XPUB_WELCOME_MSG, _GREETING)
        self._state = _socket(context, zmq.ROUTER)
        try:
            self.events_endpoint = _bind(self._changes, host, port)
            self.state_endpoint = _bind(self._state, host, port and port + 1)
        except ConfigError:
            self.close()
            raise

    @property
    def descriptors(self) -> tuple[int, int]:
        """What becomes readable when `greet` or `questions` should be called."""
        return self._changes.fileno(), self._state.fileno()

    def publish(self, seq: int, events: Sequence[BookEvent]) -> None:
        """Sends a batch to every subscriber that has room for it."""
        self._changes.send_multipart((self._name, _number(seq), _ENCODER.encode(events)), zmq.DONTWAIT)

    def greet(self) -> None:
        """Lets ZMQ take new subscriptions: PUB does it only when it is called."""
        self._changes.get(zmq.EVENTS)

    def questions(self, limit: int) -> list[list[bytes]]:
        """Who wants the state: what `answer` takes."""
        return [parts for parts in _receive(self._state, limit) if len(parts) == 2 and len(parts[1]) == 8]

    def answer(self, question: list[bytes], seq: int, requests: Sequence[Add]) -> None:
        """Sends the state; whoever has no room for it asks again."""
        self._state.send_multipart((*question, self._name, _number(seq), _ENCODER.encode(requests)), zmq.DONTWAIT)

    def close(self) -> None:
        """At once; may be called twice."""
        self._changes.close(0)
        self._state.close(0)


class ReplicaLink:
    """The sockets to one other router. Resource handling and errors as for `Announcer`."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", record: RouterRecord) -> None:
        self._name = record.id.encode()
        self._changes = _socket(context, zmq.SUB)
        self._changes.subscribe(b"")
        self._state = _socket(context, zmq.DEALER)
        try:
            _connect(self._changes, record.events_endpoint)
            _connect(self._state, record.state_endpoint)
        except ConfigError:
            self.close()
            raise

    @property
    def descriptors(self) -> tuple[int, int]:
        """What becomes readable when `received` should be called."""
        return self._changes.fileno(), self._state.fileno()

    def received(self, limit: int) -> list[Received]:
        """Up to `limit` messages of either socket; the changes first, since a state settles what came before it."""
        return [*map(self._parse_change, _receive(self._changes, limit)), *map(self._parse_state, _receive(self._state, limit))]

    def ask(self, number: int) -> None:
        """Asks for the state."""
        try:
            self._state.send_multipart((_number(number),), zmq.DONTWAIT)
        except zmq.Again:
            return  # the other side is away; the stream asks again

    def close(self) -> None:
        """At once; may be called twice."""
        self._changes.close(0)
        self._state.close(0)

    def _parse_change(self, parts: list[bytes]) -> Received:
        if parts == [_GREETING]:
            return Greeting()
        if len(parts) != 3 or parts[0] != self._name or len(parts[1]) != 8:
            return None
        try:
            return Batch(int.from_bytes(parts[1], "big"), _EVENTS.decode(parts[2]))
        except msgspec.DecodeError:
            return None

    def _parse_state(self, parts: list[bytes]) -> Received:
        if len(parts) != 4 or parts[1] != self._name or len(parts[0]) != 8 or len(parts[2]) != 8:
            return None
        try:
            return State(int.from_bytes(parts[0], "big"), int.from_bytes(parts[2], "big"), _ADDS.decode(parts[3]))
        except msgspec.DecodeError:
            return None


def _socket(context: "zmq.Context[zmq.Socket[bytes]]", kind: int) -> "zmq.Socket[bytes]":
    socket = context.socket(kind)
    socket.set_hwm(_QUEUED)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.RECONNECT_IVL, _RECONNECT_MS)
    socket.set(zmq.RECONNECT_IVL_MAX, _RECONNECT_LIMIT_MS)
    socket.set(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    socket.set(zmq.IPV6, 1)
    return socket


def _bind(socket: "zmq.Socket[bytes]", host: str, port: int) -> str:
    address = f"tcp://{f'[{host}]' if ':' in host else host}"
    try:
        socket.bind(f"{address}:{port or '*'}")
    except zmq.ZMQError as exc:
        raise ConfigError(f"routers can't be listened to at {host}:{port} ({exc}): set TANDEM_ROUTER_REPLICA_HOST to an address of this "
                          "host, and TANDEM_ROUTER_REPLICA_PORT to the first of two free ports per instance, or 0") from exc
    return f"{address}:{socket.get_string(zmq.LAST_ENDPOINT).rpartition(':')[2]}"


def _connect(socket: "zmq.Socket[bytes]", endpoint: str) -> None:
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as exc:
        raise ConfigError(f"a router's endpoint {endpoint!r} can't be connected to ({exc}): check its TANDEM_ROUTER_REPLICA_HOST") from exc


def _receive(socket: "zmq.Socket[bytes]", limit: int) -> list[list[bytes]]:
    received: list[list[bytes]] = []
    try:
        while len(received) < limit:
            received.append(socket.recv_multipart(zmq.DONTWAIT))
    except zmq.Again:
        pass
    return received


def _number(value: int) -> bytes:
    return value.to_bytes(8, "big")
