# SPDX-License-Identifier: Apache-2.0
"""Hosts one engine: its event loop, the requests in flight, abort, drain and the watch over the engine.

Threads: Triton calls `submit` and `shutdown` from the stub's main thread; everything else runs on the event loop's
thread, except the poll for cancelled clients, which has a thread of its own because each poll is a round trip to Triton.
The engine is built on the main thread: the kernel ties engine processes to the thread that started them.
"""

import asyncio
import functools
import itertools
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import uvloop

from tandem_protocol.cancellation import CancelPoll
from tandem_protocol.errors import RequestCancelledError, TandemError, UnavailableError
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.spans import NoSpans, Span, Spans, carried
from tandem_protocol.streams import Outbox, ResponseStream, Sink
from tandem_worker.config import WorkerSettings
from tandem_worker.heartbeat import HangWatch, Heartbeat
from tandem_worker.load import EngineLoads
from tandem_worker.metrics.meters import OpenStream, plain_stream
from tandem_worker.registration import Presence, Unregistered
from tandem_worker.stacks import dump_stacks, engine_cpu_s
from tandem_worker.status import RankStatus, WorkerState, WorkerStatus
from tandem_worker.tiers import ask_tiers

log = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 0.25
_STOP_TIMEOUT_S = 10.0
_SETTLE_TIMEOUT_S = 5.0
"""How long discovery may take to hold a new state before the worker goes on without it."""
_SEEN_S = 0.5
"""From then until routers have seen it, too: a folder is looked at every 0.2 s, and what is sent meanwhile is still served."""
_DUMP_S = 1.0
"""Between the request for stacks and the end of who prints them; also a supervisor's chance to see the reason on `/live`."""
_LAST_WORDS_S = 1.0
"""What vLLM's client needs at most to fail the requests of a dead engine, each with the reason and after the tokens before it."""
_ENGINE_STOP_TIMEOUT_S = 3.0
"""An idle engine has nothing to save; vLLM kills what does not exit by then."""


class Serving(Protocol):
    """Who serves the requests: `generation` on one engine of vLLM's, `omni.generation` on a pipeline."""

    @property
    def engine(self) -> Any:
        """Tells by `errored` that it is dead, and ends by `shutdown(timeout=)`."""

    @property
    def loads(self) -> EngineLoads:
        """What the engine tells of its steps."""

    async def serve(self, request: Any, stream: ResponseStream, active: int) -> None:
        """Runs one request to its end and ends its stream, also on errors; only cancellation is passed on."""


S = TypeVar("S", bound=Serving)


@dataclass
class _Active:
    """A request in flight."""

    request: GenerationRequest
    stream: ResponseStream
    span: Span
    task: asyncio.Task[None] | None = None


class EngineHost(Generic[S]):
    """Serves requests on one engine until `shutdown`."""

    def __init__(self, generator: S, settings: WorkerSettings, on_engine_death: Callable[[], None],
                 engine_cpu_s: Callable[[int | None], float] = engine_cpu_s, open_stream: OpenStream = plain_stream,
                 spans: Spans | None = None) -> None:  # fmt: skip
        self.generator = generator
        self.settings = settings
        self._state = WorkerState.STARTING
        self._reason: str | None = None
        self._presence: Presence = Unregistered()
        self._on_engine_death = on_engine_death
        heartbeat = functools.partial(Heartbeat, settings.hang_timeout_s, settings.step_timeout_s)
        self._hang_watch = HangWatch(heartbeat, generator.loads, engine_cpu_s, self._hangs)
        self._outbox = Outbox()
        self._open_stream = open_stream
        self._spans = spans or NoSpans()
        self._active: dict[int, _Active] = {}
        self._keys = itertools.count()
        self._watches: list[asyncio.Task[None]] = []
        self._idle = asyncio.Event()
        self._idle_since = time.monotonic()
        self._stopping = False
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="tandem-loop", daemon=True)
        self._poll = CancelPoll(lambda: self._active.values(), self._client_gone, settings.cancel_poll_s)

    @property
    def state(self) -> WorkerState:
        """Where the worker is in its life."""
        return self._state

    @state.setter
    def state(self, state: WorkerState) -> None:
        self._state = state
        self._presence.follow(state)

    def probe_with(self, probe: Callable[[], Awaitable[None]]) -> None:
        """How an engine is asked whether it still computes. Before `start`."""
        self._hang_watch.probe = probe

    def announce(self, presence: Presence) -> None:
        """Discovery follows the worker's state from now on, until `shutdown`. Called on the event loop."""
        self._presence = presence
        presence.follow(self._state)

    def start(self) -> None:
        """Starts the threads; requests are taken from now on."""
        self._idle.set()
        self._thread.start()
        self._poll.start()
        self.state = WorkerState.READY
        self.run(self._start_watch())

    def run(self, coroutine: Any) -> Future[Any]:
        """Runs a coroutine on the event loop, from any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def submit(self, request: GenerationRequest, sink: Sink) -> None:
        """Takes a request; its outcome goes to `sink`. Never blocks and never raises."""
        self._loop.call_soon_threadsafe(self._admit, request, self._open_stream(request, sink, self._outbox))

    def status(self) -> WorkerStatus:
        """A snapshot for the admin server."""
        load = self.generator.loads
        return WorkerStatus(state=self.state, role=self.settings.effective_role, active=len(self._active), running=load.running,
                            waiting=load.waiting, kv_usage=load.kv_usage, step_s=load.step_s, registration=self._presence.status,
                            reason=self._reason, ranks=self._ranks())

    def _ranks(self) -> tuple[RankStatus, ...]:
        loads = self.generator.loads.by_rank
        ranks = (RankStatus(rank, load.in_engine, load.running, load.waiting, load.kv_usage, load.step_s) for rank, load in loads.items())
        return tuple(ranks) if len(loads) > 1 else ()

    def idle_s(self) -> float:
        """For how long no request has been in flight."""
        awake = self.state in {WorkerState.READY, WorkerState.UNWELL}  # a canary would wait in a sleeping engine
        return time.monotonic() - self._idle_since if awake and not self._active else 0.0

    def judge(self, reason: str | None) -> None:
        """Takes why the worker is unwell, or None when it is well again; says nothing of a worker in another state. On the event loop."""
        wanted = WorkerState.READY if reason is None else WorkerState.UNWELL
        if self.state not in {WorkerState.READY, WorkerState.UNWELL}:
            return
        self._reason = reason
        if self.state is not wanted:
            self.state = wanted

    async def retire(self) -> None:
        """Leaves placement before anything else changes: routers see a draining worker while it still takes what is on its way."""
        self._presence.follow(WorkerState.DRAINING)
        if not await self._presence.settle(WorkerState.DRAINING, _SETTLE_TIMEOUT_S):
            log.warning("worker.retire_unseen: discovery did not take the change within %g s", _SETTLE_TIMEOUT_S)
        elif self._presence.status is not None:
            await asyncio.sleep(_SEEN_S)

    def enter(self, state: WorkerState, reason: str | None = None) -> bool:
        """Goes into a state unless the engine is lost or the worker stops; whether it did. On the event loop."""
        if self._lost:
            return False
        self._reason = reason
        self.generator.loads.asleep = state is WorkerState.ASLEEP
        self.state = state
        return True

    async def abort(self, request_id: str, error: TandemError | None = None) -> int:
        """Aborts every request in flight with this client request id; returns how many there were."""
        matching = [active for active in self._active.values() if active.request.request_id == request_id]
        for active in matching:
            self._cancel(active, error or RequestCancelledError(f"request {request_id!r} was aborted"))
        return len(matching)

    async def drain(self, timeout_s: float) -> int:
        """Stops taking requests, waits for those in flight, and aborts what is left; returns how many were aborted."""
        if self.state in {WorkerState.READY, WorkerState.UNWELL}:
            self.state = WorkerState.DRAINING
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            left = list(self._active.values())
        else:
            return 0
        for active in left:
            self._cancel(active, UnavailableError(f"the worker is shutting down and waited {timeout_s:g} s for this request"))
        await asyncio.wait([active.task for active in left if active.task], timeout=_STOP_TIMEOUT_S)
        return len(left)

    async def kvbm(self, command: str, tier: str) -> dict[str, Any]:
        """Asks the engine's KV tiers. Raises RequestError if it has none, UnavailableError if it doesn't answer in time."""
        return await ask_tiers(self.generator.engine, command, tier)

    def shutdown(self) -> None:
        """Drains within the configured bound, stops the engine and the threads. Called from the main thread."""
        bound = self.settings.drain_timeout_s
        try:
            self.run(self.drain(bound)).result(bound + _STOP_TIMEOUT_S)
        except Exception:  # the engine must be shut down whatever the drain ran into
            log.exception("worker.drain_failed")
        self.state = WorkerState.STOPPED
        self._leave()
        self._stopping = True
        self._poll.stop()
        self._outbox.close(_STOP_TIMEOUT_S)
        self._spans.close()
        self.generator.engine.shutdown(timeout=_ENGINE_STOP_TIMEOUT_S)
        self.run(self._end_watches()).result(_STOP_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_TIMEOUT_S)

    def _leave(self) -> None:
        """Only after the drain: a router that no longer finds a worker gives up the streams that it still has there."""
        try:
            self.run(self._presence.leave()).result(_STOP_TIMEOUT_S)
        except Exception:  # the engine must be shut down whatever discovery ran into
            log.exception("worker.leave_failed")

    # --- event loop ---

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _admit(self, request: GenerationRequest, stream: ResponseStream) -> None:
        refusal = self._refusal()
        if refusal is not None:
            stream.fail(refusal)
            return
        log.debug("request.accepted active=%d", len(self._active))
        key = next(self._keys)
        span = self._spans.begin("worker.request", request.trace, request_id=request.request_id, role=self.settings.effective_role)
        request = carried(request, span)
        active = self._active[key] = _Active(request, stream, span)
        self._idle.clear()
        active.task = self._loop.create_task(self.generator.serve(request, stream, len(self._active)))
        active.task.add_done_callback(lambda task: self._done(key, task))

    def _refusal(self) -> TandemError | None:
        if self.state is WorkerState.DEAD:
            return UnavailableError("the engine of this worker died: retry on another worker or after its restart")
        if self.state is not WorkerState.READY:
            return UnavailableError(f"the worker is {self.state}: retry on another worker{f' ({self._reason})' if self._reason else ''}")
        if len(self._active) >= self.settings.max_queued_requests:
            return UnavailableError(f"the worker already holds {len(self._active)} requests (TANDEM_MAX_QUEUED_REQUESTS): retry later")
        return None

    def _done(self, key: int, task: asyncio.Task[None]) -> None:
        active = self._active.pop(key)
        if task.cancelled():
            active.stream.fail(RequestCancelledError("the request was cancelled"))
        elif (exc := task.exception()) is not None:
            log.error("request.task_failed", exc_info=exc)
            active.stream.fail(UnavailableError(f"the worker failed on this request: {exc}"))
        log.debug("request.ended outcome=%s", active.stream.outcome)
        active.span.end(active.stream.outcome)
        if not self._active:
            self._idle_since = time.monotonic()
            self._idle.set()

    def _cancel(self, active: _Active, error: TandemError) -> None:
        active.stream.fail(error)
        if active.task is not None:
            active.task.cancel()

    def _client_gone(self, active: _Active) -> None:
        self._loop.call_soon_threadsafe(self._cancel, active, RequestCancelledError("the client went away"))

    async def _start_watch(self) -> None:
        self._watches.append(asyncio.create_task(self._watch_engine()))
        if self.settings.hang_timeout_s > 0:
            self._watches.append(asyncio.create_task(self._hang_watch.run()))

    async def _end_watches(self) -> None:
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)

    async def _watch_engine(self) -> None:
        """vLLM fails the requests in flight itself, unless what should do so died with the engine; an idle worker must notice, too."""
        while not self.generator.engine.errored:  # noqa: ASYNC110 - vLLM offers a flag, no event
            await asyncio.sleep(_WATCH_INTERVAL_S)
        if self._lost:
            return
        self.state = WorkerState.DEAD
        log.error("engine.died: in-flight requests get UNAVAILABLE and the server exits")
        self._on_engine_death()
        await asyncio.sleep(_LAST_WORDS_S)
        self._fail_active("the engine of this worker died")

    @property
    def _lost(self) -> bool:
        """Whether the engine's end, if it comes now, is no news."""
        return self._stopping or self.state in {WorkerState.DEAD, WorkerState.HUNG, WorkerState.STOPPED}

    async def _hangs(self, reason: str) -> None:
        """As for a death, with the stacks printed before."""
        if self._give_up(WorkerState.HUNG, f"engine.hangs: {reason}", reason):
            for process in await asyncio.to_thread(dump_stacks):
                log.error("engine.process %s", process)
            await asyncio.sleep(_DUMP_S)
            self._on_engine_death()

    async def lose(self, reason: str) -> None:
        """The engine, or a part of it that isn't here, is gone: ends the server, as for a death. On the event loop."""
        if self._give_up(WorkerState.DEAD, f"engine.lost: {reason}", reason):
            await asyncio.sleep(_DUMP_S)
            self._on_engine_death()

    def _give_up(self, state: WorkerState, event: str, reason: str) -> bool:
        """Fails what is in flight, so that it moves to other workers; False if that is no news any more."""
        if self._lost:
            return False
        self._reason = reason
        self.state = state
        log.error("%s; requests in flight get UNAVAILABLE and the server exits", event)
        self._fail_active(reason)
        return True

    def _fail_active(self, reason: str) -> None:
        for active in tuple(self._active.values()):
            self._cancel(active, UnavailableError(f"{reason}: retry on another worker or after its restart"))
