# SPDX-License-Identifier: Apache-2.0
"""The ZMQ sockets to one publisher of KV events (vllm/distributed/kv_events.py, `ZmqEventPublisher`).

Live frames come as `[topic, seq, payload]`, seq 8 bytes big-endian. A replay is asked for with `[b"", start]` and answered with
`[b"", topic, seq, payload]` per batch (older releases leave the topic out), and a last one whose seq is -1.

A connection that broke is not reused: the subscription is opened anew, so that whatever comes over the new one was published
after it stood. ZMQ's own reconnecting would splice a restarted publisher's frames onto the old one's.
"""

import contextlib
import struct
from dataclasses import dataclass
from enum import Enum, auto

import zmq

from tandem_protocol.errors import ConfigError
from tandem_protocol.workers import EventSource

_QUEUED_FRAMES = 100_000
"""Per socket, as vLLM's own high-water mark. A smaller one on the replay socket makes vLLM's ROUTER drop answers."""
_RECONNECT_MS, _RECONNECT_LIMIT_MS = 50, 2_000
_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 2_000, 6_000
"""A host that vanished without a word is noticed after the second."""
DUMP_TOPIC = b"tandem.dump"
"""Topic of the frames of an answer that together are the publisher's whole state: no loss, although they don't begin at 0."""
_END = (1 << 64) - 1
_EVENT = struct.Struct("=hi")
"""First frame of a message of ZMQ's socket monitor: the event, and a value that nobody needs here."""
_WATCHED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


class Change(Enum):
    """What happened to the connection."""

    JOINED = auto()
    PARTED = auto()


@dataclass(frozen=True)
class Frame:
    """One numbered batch, not yet decoded; `seq` is None for the end of a replay."""

    seq: int | None
    payload: bytes
    whole: bool = False
    """Part of a dump: nothing is missing before the first of them, whatever its number."""


def parse_live(parts: list[bytes]) -> Frame | None:
    """None for what isn't a frame of a publisher."""
    if len(parts) != 3 or len(parts[1]) != 8:
        return None
    return Frame(int.from_bytes(parts[1], "big"), parts[2])


def parse_replayed(parts: list[bytes]) -> Frame | None:
    """None for what isn't part of an answer."""
    if len(parts) not in (3, 4) or len(parts[-2]) != 8:
        return None
    seq = int.from_bytes(parts[-2], "big")
    return Frame(None if seq == _END else seq, parts[-1], whole=len(parts) == 4 and parts[1] == DUMP_TOPIC)


class Link:
    """Subscription and replay socket of one publisher.

    Made in any thread, then used by one. Resource handling: `close` frees all; nothing lingers. Raises ConfigError at
    construction for an endpoint that ZMQ can't connect to.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", source: EventSource) -> None:
        self._context = context
        self._source = source
        self._replay: zmq.Socket[bytes] | None = None
        self._answer_due = False
        self._joined = False
        self.version = 0
        """Changes whenever `sockets` does."""
        self._subscribe()
        if source.replay_endpoint:
            self._replay = self._connect(zmq.DEALER, source.replay_endpoint)

    def changes(self) -> list[Change]:
        """What happened to the subscription since the last call. After PARTED it is a new one, with nothing received yet."""
        seen = []
        while _readable(self._monitor):
            seen.append(_EVENT.unpack(self._monitor.recv_multipart()[0])[0])
        if zmq.EVENT_DISCONNECTED in seen and (self._joined or zmq.EVENT_HANDSHAKE_SUCCEEDED in seen):
            self.reopen()
            return [Change.PARTED]
        if zmq.EVENT_HANDSHAKE_SUCCEEDED in seen:
            self._joined = True
            return [Change.JOINED]
        return []

    def reopen(self) -> None:
        """Subscribes anew; what was received and not yet read is dropped."""
        self._unsubscribe()
        self._subscribe()

    def sockets(self) -> "list[zmq.Socket[bytes]]":
        """All that a poller should watch now; others when `version` is another."""
        known = [self._sub, self._monitor, *([] if self._replay is None else [self._replay])]
        return [socket for socket in known if not socket.closed]  # closed ones are left by a subscription that failed

    def live(self, limit: int) -> list[list[bytes]]:
        """Up to `limit` messages of the subscription, without waiting."""
        return _receive(self._sub, limit)

    def replayed(self) -> list[bytes] | None:
        """The next message of the answer asked for last, without waiting."""
        received = [] if self._replay is None else _receive(self._replay, 1)
        return received[0] if received else None

    def ask(self, start: int) -> None:
        """Asks for all from `start` on. An answer still under way is cut off: it would mix with the new one."""
        if self._replay is None:
            return
        if self._answer_due:
            self._replay.close(0)
            self._replay = self._connect(zmq.DEALER, self._source.replay_endpoint)
        with contextlib.suppress(zmq.Again):  # whoever asked has a deadline, and asks again
            self._replay.send_multipart([b"", start.to_bytes(8, "big")], zmq.DONTWAIT)
        self._answer_due = True

    def answered(self) -> None:
        """The last answer came in full."""
        self._answer_due = False

    def close(self) -> None:
        """Frees the sockets; may be called twice."""
        self._unsubscribe()
        if self._replay is not None:
            self._replay.close(0)

    def _subscribe(self) -> None:
        self._joined = False
        self._sub: zmq.Socket[bytes] = self._context.socket(zmq.SUB)
        self._monitor: zmq.Socket[bytes] = self._sub.get_monitor_socket(_WATCHED)
        self._sub.subscribe(b"")
        self._sub = self._connect_socket(self._sub, self._source.endpoint)

    def _unsubscribe(self) -> None:
        if not self._sub.closed:
            self._sub.disable_monitor()
            self._monitor.close(0)
            self._sub.close(0)

    def _connect(self, kind: int, endpoint: str) -> "zmq.Socket[bytes]":
        return self._connect_socket(self._context.socket(kind), endpoint)

    def _connect_socket(self, socket: "zmq.Socket[bytes]", endpoint: str) -> "zmq.Socket[bytes]":
        self.version += 1
        socket.set(zmq.RCVHWM, _QUEUED_FRAMES)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.RECONNECT_IVL, _RECONNECT_MS)
        socket.set(zmq.RECONNECT_IVL_MAX, _RECONNECT_LIMIT_MS)
        socket.set(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        socket.set(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as exc:
            self.close()
            socket.close(0)
            raise ConfigError(f"KV-event endpoint {endpoint!r} can't be connected to ({exc}): give tcp://host:port or ipc://path") from exc
        return socket


def _readable(socket: "zmq.Socket[bytes]") -> bool:
    """Asks the socket itself: a poller, or an exception from a fruitless read, costs many times as much, and that per frame."""
    return bool(int(socket.get(zmq.EVENTS)) & zmq.POLLIN)


def _receive(socket: "zmq.Socket[bytes]", limit: int) -> list[list[bytes]]:
    received: list[list[bytes]] = []
    while len(received) < limit and _readable(socket):
        received.append(socket.recv_multipart(zmq.DONTWAIT))
    return received
