# SPDX-License-Identifier: Apache-2.0
"""The ZMQ sockets of the consolidated stream: PUB for what is new, ROUTER for what is asked for, as vLLM's `ZmqEventPublisher`.

Used by one thread. Answers are sent a slice at a time, so that a long one doesn't hold up the stream.
"""

from collections.abc import Iterator

import zmq

from tandem_kvbm.consolidator.history import Frame
from tandem_protocol.errors import ConfigError

_QUEUED_FRAMES = 100_000
"""Per subscriber, as vLLM's own high-water mark."""
_SLICE = 128
"""Frames of one answer per round."""
_MOST_ANSWERS = 64
_END = (1 << 64) - 1
_REQUESTS = 16


class Outlet:
    """Binds two endpoints. Resource handling: `close` frees them. Raises ConfigError where one can't be bound."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, replay_endpoint: str, topic: bytes = b"") -> None:
        self._topic = topic
        self._answers: dict[bytes, Iterator[Frame]] = {}
        self.refused = 0
        """Questions beyond the bound; whoever asked has a deadline, and asks again."""
        self.broken_off = 0
        """Answers whose reader went away or didn't read."""
        self._pub = context.socket(zmq.PUB)
        self.replay = context.socket(zmq.ROUTER)
        self.replay.set(zmq.ROUTER_MANDATORY, 1)
        self._bind(self._pub, endpoint)
        self._bind(self.replay, replay_endpoint)

    @property
    def busy(self) -> bool:
        """Whether there are answers to go on with."""
        return bool(self._answers)

    def publish(self, seq: int, payload: bytes) -> None:
        """Sends one batch to all subscribers. ZMQ drops it for one that is 100,000 behind: that one sees the gap, and asks."""
        self._pub.send_multipart([self._topic, seq.to_bytes(8, "big"), payload])

    def requests(self) -> list[tuple[bytes, int]]:
        """Who asks, and from which number on; without waiting."""
        received: list[tuple[bytes, int]] = []
        try:
            while len(received) < _REQUESTS:
                parts = self.replay.recv_multipart(zmq.DONTWAIT)
                if len(parts) == 3 and len(parts[2]) == 8:
                    received.append((parts[0], int.from_bytes(parts[2], "big")))
        except zmq.Again:
            pass
        return received

    def answer(self, client: bytes, frames: Iterator[Frame]) -> None:
        """Begins an answer; an earlier one to the same reader is dropped."""
        if client not in self._answers and len(self._answers) >= _MOST_ANSWERS:
            self.refused += 1
            return
        self._answers[client] = frames

    def go_on(self) -> None:
        """Sends the next slice of each answer."""
        for client, frames in list(self._answers.items()):
            try:
                self._send_slice(client, frames)
            except zmq.ZMQError:  # full, or gone
                self.broken_off += 1
                del self._answers[client]

    def close(self) -> None:
        """Frees the sockets; nothing lingers."""
        self._pub.close(0)
        self.replay.close(0)

    def _send_slice(self, client: bytes, frames: Iterator[Frame]) -> None:
        for _ in range(_SLICE):
            frame = next(frames, None)
            if frame is None:
                self._send(client, b"", _END, b"")
                del self._answers[client]
                return
            self._send(client, frame.topic or self._topic, frame.seq, frame.payload)

    def _send(self, client: bytes, topic: bytes, seq: int, payload: bytes) -> None:
        self.replay.send_multipart([client, b"", topic, seq.to_bytes(8, "big"), payload], zmq.DONTWAIT)

    def _bind(self, socket: "zmq.Socket[bytes]", endpoint: str) -> None:
        socket.set(zmq.SNDHWM, _QUEUED_FRAMES)
        socket.set(zmq.LINGER, 0)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as exc:
            self.close()
            raise ConfigError(f"the consolidated KV events can't be published at {endpoint} ({exc}): "
                              "set DYN_KVBM_LEADER_ZMQ_PUB_PORT or TANDEM_CONSOLIDATOR_PORT to a free one") from exc
