# SPDX-License-Identifier: Apache-2.0
"""Publishes a mock worker's KV events as vLLM's ZmqEventPublisher does: PUB with three frames, ROUTER that replays.

Runs on the event loop. PUB never blocks: beyond the high-water mark ZMQ drops, and subscribers see the gap and ask for a replay.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import Any

import zmq
from zmq import asyncio as zmq_asyncio

from tandem_protocol import kv_events
from tandem_protocol.errors import ConfigError
from tandem_protocol.kv_events import Event
from tandem_protocol.workers import EventSource

_HIGH_WATER_MARK = 100_000
_BUFFERED_BATCHES = 10_000
_END = (-1).to_bytes(8, "big", signed=True)


class EventPublisher:
    """One worker's sockets. Resource handling: `close` closes them; the context is the process's."""

    def __init__(self, host: str, port: int = 0, replay_port: int = 0) -> None:
        """Binds both sockets, to free ports for 0. Raises ConfigError when a port is taken."""
        self.published = 0
        context = zmq_asyncio.Context.instance()
        self._publish = zmq.Context(context).socket(zmq.PUB)
        self._publish.set_hwm(_HIGH_WATER_MARK)
        self._replay = context.socket(zmq.ROUTER)
        endpoint, replay_endpoint = _bind(self._publish, host, port), _bind(self._replay, host, replay_port)
        self.source = EventSource(dp_rank=0, endpoint=endpoint, replay_endpoint=replay_endpoint)
        self._numbers = count()
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=_BUFFERED_BATCHES)
        self._task = asyncio.create_task(self._answer_replays())

    def publish(self, events: Sequence[Event]) -> None:
        """Sends one batch, if there are events."""
        if not events or self._publish.closed:
            return
        number, payload = next(self._numbers), kv_events.encode(events, time.time(), 0)
        self._buffer.append((number, payload))
        self.published += len(events)
        self._publish.send_multipart((b"", number.to_bytes(8, "big"), payload), flags=zmq.NOBLOCK)

    async def close(self) -> None:
        """Closes both sockets at once, unsent batches are dropped: as a worker that dies."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self._publish.close(linger=0)
        self._replay.close(linger=0)

    async def _answer_replays(self) -> None:
        while True:
            frames = await self._replay.recv_multipart()
            if len(frames) == 3 and len(frames[2]) == 8:
                await self._answer(frames[0], int.from_bytes(frames[2], "big"))

    async def _answer(self, client: bytes, first: int) -> None:
        for number, payload in list(self._buffer):
            if number >= first:
                await self._replay.send_multipart((client, b"", b"", number.to_bytes(8, "big"), payload))
        await self._replay.send_multipart((client, b"", b"", _END, b""))


def _bind(socket: Any, host: str, port: int) -> str:
    try:
        socket.bind(f"tcp://{host}:{port or '*'}")
    except zmq.ZMQError as exc:
        raise ConfigError(f"the event port {host}:{port} can't be opened ({exc}): choose another --event-port, 0 for any") from exc
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))
