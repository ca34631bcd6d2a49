# SPDX-License-Identifier: Apache-2.0
"""Streams from workers: their end, their errors, their silence; a gRPC server that follows a script."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from fake_triton import FakeModel, FakeTriton, Script, abort_with, answer, delta, failure, silence_after
from tandem_protocol.errors import EngineError, RequestError
from tandem_router import wire
from tandem_router.connections import Connections, Patience, Silence, WorkerLostError

WAIT_S = 10.0
MOMENT_S = 0.2
PATIENT = Patience(WAIT_S, WAIT_S)


@dataclass
class Timer:
    """As asyncio's."""

    cancelled: bool = False

    def cancel(self) -> None:
        """It won't ring."""
        self.cancelled = True


@dataclass
class Clock:
    """The part of an event loop that `Silence` uses, with a time that is set by hand."""

    now: float = 100.0
    timers: list[tuple[float, Timer, Callable[[], None]]] = field(default_factory=list)

    def time(self) -> float:
        """The time."""
        return self.now

    def call_later(self, seconds: float, ring: Callable[[], None]) -> Timer:
        """Notes the timer."""
        self.timers.append((self.now + seconds, Timer(), ring))
        return self.timers[-1][1]

    def advance(self, seconds: float) -> None:
        """Rings what is due on the way."""
        end = self.now + seconds
        while due := [entry for entry in self.timers if not entry[1].cancelled and entry[0] <= end]:
            entry = min(due, key=lambda one: one[0])
            self.timers.remove(entry)
            self.now = entry[0]
            entry[2]()
        self.now = end


def test_silence_before_the_first_response_ends_a_stream_after_its_own_limit() -> None:
    """Not earlier."""
    clock, cancelled = Clock(), []
    silence: Any = Silence(lambda: cancelled.append(clock.now), Patience(30, 5), clock)  # type: ignore[arg-type]
    clock.advance(29)
    assert (cancelled, silence.exceeded_s) == ([], None)
    clock.advance(1)
    assert (cancelled, silence.exceeded_s) == ([130.0], 30)


def test_after_the_first_response_the_other_limit_holds() -> None:
    """Every response begins it anew, with one timer for all of them."""
    clock, cancelled = Clock(), []
    silence: Any = Silence(lambda: cancelled.append(clock.now), Patience(30, 5), clock)  # type: ignore[arg-type]
    clock.advance(20)
    for _ in range(10):
        silence.heard()
        clock.advance(4)
    assert not cancelled
    assert len(clock.timers) <= 2
    clock.advance(1)
    assert (cancelled, silence.exceeded_s) == ([161.0], 5)


def test_a_closed_silence_rings_no_more() -> None:
    """The stream is over."""
    clock, cancelled = Clock(), []
    silence: Any = Silence(lambda: cancelled.append(clock.now), Patience(3, 3), clock)  # type: ignore[arg-type]
    silence.close()
    clock.advance(100)
    assert not cancelled


@pytest.fixture
async def connections() -> AsyncIterator[Connections]:
    """Closed at the end."""
    opened = Connections()
    yield opened
    await opened.close()


async def texts(connections: Connections, script: Script) -> list[bytes]:
    """The texts that a model with this script streams."""
    found = []
    async with FakeTriton({"m": FakeModel(script)}) as server, asyncio.timeout(WAIT_S):
        async for response in connections.stream(server.url, wire.abort_message("m", "r"), PATIENT):
            arrays = wire.response_arrays(response)
            found += [arrays["text_output"][0]] if arrays else []
    return found


async def test_a_stream_ends_with_its_final_response(connections: Connections) -> None:
    """A server that then leaves the stream open is not waited for longer than a moment."""
    script = silence_after(delta("a"), delta("b"), delta(final=True))
    assert await texts(connections, script) == [b"a", b"b"]


async def test_a_stream_is_not_cancelled_between_its_final_response_and_its_end(connections: Connections) -> None:
    """tritonserver would keep the request for ever. This server takes a moment to end the stream."""
    ended = asyncio.Event()

    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        yield delta("a", final=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(MOMENT_S):
                await asyncio.Event().wait()
        ended.set()

    model = FakeModel(script)
    async with FakeTriton({"m": model}) as server, asyncio.timeout(WAIT_S):
        async for _ in connections.stream(server.url, wire.abort_message("m", "r"), PATIENT):
            pass
    assert ended.is_set()
    assert not model.cancelled.is_set()


async def test_a_stream_without_an_end_is_a_lost_worker(connections: Connections) -> None:
    """It may go on elsewhere."""
    with pytest.raises(WorkerLostError, match="without a final response"):
        await texts(connections, answer(delta("a")))


async def test_a_silent_worker_is_lost(connections: Connections) -> None:
    """And its call is cancelled, so that it doesn't go on for nobody."""
    model = FakeModel(silence_after(delta("a")))
    async with FakeTriton({"m": model}) as server, asyncio.timeout(WAIT_S):
        with pytest.raises(WorkerLostError, match=r"sent nothing for 0\.05 s"):
            async for _ in connections.stream(server.url, wire.abort_message("m", "r"), Patience(WAIT_S, 0.05)):
                pass
        await model.cancelled.wait()


async def test_a_cancelled_reader_is_cancelled_and_not_told_of_a_lost_worker(connections: Connections) -> None:
    """The client went away: nobody wants the answer from another worker."""
    model, begun = FakeModel(silence_after(delta("a"))), asyncio.Event()
    async with FakeTriton({"m": model}) as server, asyncio.timeout(WAIT_S):

        async def read() -> None:
            async for _ in connections.stream(server.url, wire.abort_message("m", "r"), PATIENT):
                begun.set()

        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await model.cancelled.wait()


@pytest.mark.parametrize(
    ("script", "kind"),
    [(failure("boom"), EngineError), (failure("Request for unknown model: 'vllm' has no available versions"), WorkerLostError),
     (abort_with(grpc.StatusCode.UNAVAILABLE, "gone"), WorkerLostError),
     (abort_with(grpc.StatusCode.INVALID_ARGUMENT, "bad"), RequestError), (abort_with(grpc.StatusCode.INTERNAL, "bad"), EngineError),
     (abort_with(grpc.StatusCode.INTERNAL, "Stub process 'vllm_0_0' is not healthy."), WorkerLostError)],
)
async def test_an_error_of_the_worker_keeps_its_kind(connections: Connections, script: Any, kind: type[Exception]) -> None:
    """What is the request's own fault is not retried."""
    with pytest.raises(kind):
        await texts(connections, script if callable(script) else answer(script))
