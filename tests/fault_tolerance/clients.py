# SPDX-License-Identifier: Apache-2.0
"""Clients: each asks one request after another and notes what it saw, over gRPC or of a router in this process."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import tritonclient.grpc.aio as grpcclient

from calls import Call, responses
from fault_tolerance.fleets import Fleet
from fault_tolerance.outcomes import Sample
from fault_tolerance.scenarios import Load
from routers import LocalRouter
from tandem_protocol.errors import TandemError
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.streams import Arrays
from tandem_router.overrides import Overrides

_CHANNEL = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]
"""A server that is back is found at once; gRPC's own backoff grows to two minutes."""
_SHUNNED_S = 5.0
"""After a failure a router gets nothing for so long, as with any load balancer's passive health check."""
_SAMPLING = {"temperature": 0, "ignore_eos": True}


class Front(Protocol):
    """Where requests go."""

    def ask(self, start: int, prompt: list[int], tokens: int) -> AsyncIterator[list[int]]:
        """Token ids as they come. `start` chooses among several routers."""

    async def close(self) -> None:
        """Ends its connections."""


@dataclass
class GrpcFront:
    """The routers that the fleet's load balancer knows."""

    fleet: Fleet
    _clients: dict[str, Any] = field(default_factory=dict)
    _shunned: dict[str, float] = field(default_factory=dict)
    """Until when."""

    async def ask(self, start: int, prompt: list[int], tokens: int) -> AsyncIterator[list[int]]:
        """As Front says."""
        url, whole = self._choose(start), False
        if url not in self._clients:
            self._clients[url] = grpcclient.InferenceServerClient(url, channel_args=_CHANNEL)
        call = Call("router", prompt, {**_SAMPLING, "max_tokens": tokens}, returns=("output_ids",))
        try:
            async with aclosing(responses(self._clients[url], call)) as answers:  # type: ignore[type-var]
                async for answer in answers:
                    yield answer.get("output_ids", [])
            whole = True
        finally:
            if not whole:
                self._shunned[url] = time.monotonic() + _SHUNNED_S

    def _choose(self, start: int) -> str:
        now, known = time.monotonic(), self.fleet.urls
        urls = [url for url in known if self._shunned.get(url, now) <= now] or known
        return urls[start % len(urls)]

    async def close(self) -> None:
        """As Front says."""
        for client in self._clients.values():
            await client.close()


@dataclass
class _Sink:
    """Hands a stream from the router's threads to the event loop."""

    loop: asyncio.AbstractEventLoop
    queue: "asyncio.Queue[list[int] | TandemError | None]" = field(default_factory=asyncio.Queue)
    gone: bool = False

    def send(self, arrays: Arrays, *, final: bool) -> None:
        ids = arrays["output_ids"].tolist() if "output_ids" in arrays else []
        self.loop.call_soon_threadsafe(self.queue.put_nowait, ids)
        if final:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, None)

    def fail(self, error: TandemError) -> None:
        self.loop.call_soon_threadsafe(self.queue.put_nowait, error)

    def is_cancelled(self) -> bool:
        return self.gone


@dataclass
class LocalFront:
    """A router in this process."""

    local: LocalRouter
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    async def ask(self, start: int, prompt: list[int], tokens: int) -> AsyncIterator[list[int]]:
        """As Front says."""
        sink = _Sink(asyncio.get_running_loop())
        request = GenerationRequest(
            request_id=f"local-{next(self._numbers)}", prompt=prompt, images=(), stream=True, prepend_input=False,
            sampling={**_SAMPLING, "max_tokens": tokens}, returns=frozenset({"output_ids"}), handoff=None, priority=0, timeout_s=None,
        )
        self.local.router.submit(request, Overrides(), sink)
        try:
            while (item := await sink.queue.get()) is not None:
                if isinstance(item, TandemError):
                    raise item
                yield item
        finally:
            sink.gone = True

    async def close(self) -> None:
        """The router is the fleet's."""


def front_of(fleet: Fleet) -> Front:
    """The way in."""
    return GrpcFront(fleet) if fleet.local is None else LocalFront(fleet.local)


def prompt_of(number: int, length: int) -> list[int]:
    """Token ids, all different from the first block on."""
    return [(number * 7919 + i * 31) % 30000 + 1 for i in range(length)]


@dataclass
class Clients:
    """All clients of a scenario. `run` returns when each has ended its last request after `stopping` was set."""

    front: Front
    load: Load
    first_number: int
    stopping: bool = False
    samples: list[Sample] = field(default_factory=list)
    streaming: set[int] = field(default_factory=set)
    """Requests past their first token."""

    async def run(self) -> None:
        """As many at a time as the load says."""
        numbers = itertools.count(self.first_number)
        async with asyncio.TaskGroup() as group:
            for client in range(self.load.clients):
                group.create_task(self._one(client, numbers))

    async def _one(self, client: int, numbers: "itertools.count[int]") -> None:
        while not self.stopping:
            self.samples.append(await self.request(next(numbers), client))
            await asyncio.sleep(self.load.pause_s)

    async def request(self, number: int, client: int = 0) -> Sample:
        """One request with its retries; whatever goes wrong is in the sample."""
        began = time.monotonic()
        seen = _Seen(began)
        for attempt in range(self.load.retries + 1):
            sample = await self._try(number, client + attempt, seen)
            if not sample.error:
                break
        return replace(sample, tries=attempt + 1)

    async def _try(self, number: int, start: int, seen: "_Seen") -> Sample:
        ids: list[int] = []
        error = ""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.load.patience_s) as patience:
                async with aclosing(self.front.ask(start, prompt_of(number, self.load.isl), self.load.osl)) as parts:  # type: ignore[type-var]
                    async for part in parts:
                        patience.reschedule(loop.time() + self.load.patience_s)
                        ids += part
                        if part:
                            seen.tokens(time.monotonic())
                            self.streaming.add(number)
        except TimeoutError:
            error = f"no token for {self.load.patience_s:g} s"
        except Exception as exc:  # a client notes it, whatever it is
            error = f"{type(exc).__name__}: {exc}"
        ended = seen.over(time.monotonic())
        self.streaming.discard(number)
        if not error and len(ids) != self.load.osl:
            error = f"{len(ids)} tokens instead of {self.load.osl}"
        return Sample(number, seen.began, ended, seen.first - seen.began, seen.longest_s, seen.longest_ended, error=error, ids=tuple(ids))


@dataclass
class _Seen:
    """The waits of one request, over its tries."""

    began: float
    first: float = 0.0
    last: float = 0.0
    longest_s: float = 0.0
    longest_ended: float = 0.0

    def __post_init__(self) -> None:
        self.first = self.last = self.began

    def tokens(self, now: float) -> None:
        """Some came."""
        if self.first == self.began:
            self.first = now
        self.over(now)

    def over(self, now: float) -> float:
        """A wait ended."""
        if now - self.last > self.longest_s:
            self.longest_s, self.longest_ended = now - self.last, now
        self.last = now
        return now
