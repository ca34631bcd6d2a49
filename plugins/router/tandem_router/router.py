# SPDX-License-Identifier: Apache-2.0
"""One router: its event loop, the requests in flight, and everything that lives as long as it does.

Threads: Triton calls `submit` and `stop` on the stub's main thread; the rest runs on the event loop's thread, except the KV-event
feed, the outbox and the poll for cancelled clients, which have threads of their own.
"""

import asyncio
import itertools
import logging
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from functools import partial

import uvloop

from tandem_protocol.cancellation import CancelPoll
from tandem_protocol.discovery import open_collection, open_discovery
from tandem_protocol.errors import ConfigError, RequestCancelledError, TandemError, UnavailableError
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.routers import RouterRecord
from tandem_protocol.spans import Span, open_spans
from tandem_protocol.streams import Outbox, ResponseStream, Sink
from tandem_router.admin import AdminServer, read_gauges
from tandem_router.answers import query_answer
from tandem_router.config import RouterSettings
from tandem_router.connections import Connections
from tandem_router.dispatch import Dispatcher, Routed
from tandem_router.fleet import Fleet
from tandem_router.meters import RequestMeter, sequences_of
from tandem_router.metrics import Families, RouterMetrics
from tandem_router.overrides import Overrides
from tandem_router.placement import RouteRequest
from tandem_router.probe import EventProbe
from tandem_router.prompts import Prompts, load_placeholder, load_tokenizer, lora_of
from tandem_router.replicas import Alone, Replicas, Sharing
from tandem_router.warm_restart import Snapshots, open_index, snapshot_path

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 10.0
_GAUGES_TIMEOUT_S = 5.0


@dataclass
class _Active:
    """A request in flight."""

    request: GenerationRequest
    stream: ResponseStream
    meter: RequestMeter
    span: Span
    task: asyncio.Task[None] | None = None


class Router:
    """Routes requests until `stop`."""

    def __init__(self, settings: RouterSettings, instance: int = 0) -> None:
        if not settings.discovery:
            raise ConfigError("the router needs to know where workers register: set TANDEM_DISCOVERY, e.g. to file:/run/tandem/discovery")
        self.settings = settings
        self.name = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        self.metrics = RouterMetrics()
        self._spans = open_spans("tandem-router")
        path = snapshot_path(settings.router_snapshot_folder, instance) if settings.reads_events else None
        warm = open_index(path)
        self.index = warm.index
        self.feed = warm.feed if settings.reads_events else None
        self._remembered = warm.remembered
        self.metrics.snapshot(warm.outcome)
        self._snapshots = Snapshots(self.feed, path, self.metrics.snapshot)
        self._instance = instance
        self._outbox = Outbox()
        self._active: dict[int, _Active] = {}
        self._keys = itertools.count()
        self._prepared = False
        self._stopping = False
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="tandem-router", daemon=True)
        self._poll = CancelPoll(lambda: self._active.values(), self._client_gone, settings.cancel_poll_s)

    def start(self) -> None:
        """Starts the threads; requests are taken from now on, and wait for the first worker within their deadline."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(_START_TIMEOUT_S)
        if self.feed is not None:
            self.feed.start()
        self._poll.start()

    def submit(self, request: GenerationRequest, overrides: Overrides, sink: Sink) -> None:
        """Takes a request; its outcome goes to `sink`. Never blocks and never raises."""
        meter = RequestMeter(time.perf_counter(), streamed=request.stream, sequences=sequences_of(request))
        self._loop.call_soon_threadsafe(self._admit, request, overrides, ResponseStream(sink, self._outbox), meter)

    def abort(self, request_id: str) -> None:
        """Aborts every request in flight with this id."""
        self._loop.call_soon_threadsafe(self._abort, request_id)

    def stop(self) -> None:
        """Ends what is in flight and closes everything, within a bound."""
        self._stopping = True
        self._poll.stop()
        try:
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(_STOP_TIMEOUT_S)
        except Exception:  # the rest must be closed whatever this ran into
            log.exception("router.close_failed")
        self._snapshots.save()
        if self.feed is not None:
            self.feed.close()
        self._outbox.close(_STOP_TIMEOUT_S)
        self._spans.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_TIMEOUT_S)

    @property
    def prepared(self) -> bool:
        """Whether the tokenizer is there."""
        return self._prepared

    @property
    def active_requests(self) -> int:
        """Requests in flight."""
        return len(self._active)

    @property
    def queued_requests(self) -> int:
        """Requests in flight that no token has come of yet."""
        return sum(active.meter.waiting for active in tuple(self._active.values()))

    def metric_families(self) -> Families:
        """Every metric as it is now; not to be called on the event loop. Raises TimeoutError where that is busy for long."""
        asyncio.run_coroutine_threadsafe(self._read_gauges(), self._loop).result(_GAUGES_TIMEOUT_S)
        return self.metrics.families()

    # --- event loop ---

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _read_gauges(self) -> None:
        read_gauges(self)

    async def _open(self) -> None:
        self.connections = Connections()
        self._discovery = open_discovery(self.settings.discovery)
        self.replicas = self._sharing()
        self.fleet = Fleet(self.settings, self._discovery, self.index, self.feed, replica=self.name, publish=self.replicas.publish,
                           remembered=self._remembered)
        self._dispatcher = Dispatcher(self.fleet, self.connections, self.settings, self.metrics)
        self.fleet.start(EventProbe(self.connections, self.index, lambda: self.fleet.generating.block_size, self.name))
        self._preparing = asyncio.create_task(self._prepare())
        self._joining = asyncio.create_task(self._join_replicas())
        self._saving = asyncio.create_task(self._snapshots.keep(self.settings.router_snapshot_interval_s))
        self._admin = AdminServer(self)
        if self.settings.router_admin_port:
            await self._admin.start(self.settings.router_admin_host, self.settings.router_admin_port + self._instance)

    async def _close(self) -> None:
        for active in tuple(self._active.values()):
            self._cancel(active, UnavailableError("the router is shutting down: retry on another one"))
        await asyncio.gather(*(active.task for active in self._active.values() if active.task), return_exceptions=True)
        self._preparing.cancel()
        self._joining.cancel()
        self._saving.cancel()
        await self._admin.stop()
        await self.replicas.close()
        await self.fleet.close()
        await self._discovery.close()
        await self.connections.close()

    def _admit(self, request: GenerationRequest, overrides: Overrides, stream: ResponseStream, meter: RequestMeter) -> None:
        stream.encode = lambda delta: delta.arrays
        if self._stopping or len(self._active) >= self.settings.max_queued_requests:
            stream.fail(UnavailableError(f"the router holds {len(self._active)} requests (TANDEM_ROUTER_MAX_QUEUED_REQUESTS): retry later"))
            self.metrics.ended("refused")
            return
        key = next(self._keys)
        active = self._active[key] = _Active(request, stream, meter, self._begin_span(request))
        active.task = self._loop.create_task(self._serve(active, overrides))
        active.task.add_done_callback(lambda task: self._done(key, task))

    def _begin_span(self, request: GenerationRequest) -> Span:
        return self._spans.begin("router.request", request.trace, request_id=request.request_id, stream=request.stream)

    async def _serve(self, active: _Active, overrides: Overrides) -> None:
        request, stream = active.request, active.stream
        deadline = None if request.timeout_s is None else time.monotonic() + request.timeout_s
        try:
            async with asyncio.timeout(request.timeout_s):
                routed = await self._route(active, overrides, deadline)
        except TimeoutError:
            stream.fail(UnavailableError(f"request timed out after its own timeout of {request.timeout_s} s"))
            return
        except TandemError as exc:
            stream.fail(exc)
            return
        if overrides.query:
            self._answer_query(routed, stream)
            return
        await self._dispatcher.serve(routed, stream)

    def _answer_query(self, routed: Routed, stream: ResponseStream) -> None:
        try:
            stream.push(query_answer(routed, self.fleet, self.settings))
        except TandemError as exc:
            stream.fail(exc)

    async def _route(self, active: _Active, overrides: Overrides, deadline: float | None) -> Routed:
        """Tokenizes and hashes; waits for the first worker, which tells model and block size."""
        request = active.request
        prompts = await asyncio.shield(self._preparing)
        await self._some_worker()
        started = time.perf_counter()
        token_ids = await prompts.token_ids(request)
        tokenized = time.perf_counter()
        known = await prompts.known(request, token_ids, self.fleet.generating.block_size)
        self.metrics.prepared(tokenized - started, time.perf_counter() - tokenized)
        route = RouteRequest(
            isl=known.tokens, keys=known.keys, lora=lora_of(request),
            worker_id=overrides.worker_id, overlap_weight=overrides.overlap_weight, temperature=overrides.temperature,
            expected_output_tokens=overrides.expected_output_tokens, priority=request.priority,
        )
        active.meter.begin(self.metrics.tallies_of(self.fleet.model), known.tokens)
        learn = partial(prompts.learn, token_ids, known.content_ids)
        return Routed(request, token_ids, route, active.meter, active.span, deadline, overrides.prefill_worker_id, learn)

    async def _prepare(self) -> Prompts:
        """Loads the tokenizer as soon as the model is known, which may take half a minute: no request should wait for it."""
        if not self.settings.router_tokenizer:
            await self._model_known()
        model = self.settings.router_tokenizer or self.fleet.model
        prompts = Prompts(await asyncio.to_thread(load_tokenizer, model), await asyncio.to_thread(load_placeholder, model))
        self._prepared = True
        return prompts

    async def _join_replicas(self) -> None:
        """Routers are replicas only of those that serve the same model."""
        await self._model_known()
        await self.replicas.start(self.fleet.model, (pool.books for pool in self.fleet.pools.values()))

    async def _model_known(self) -> None:
        while not self.fleet.model:
            self.fleet.changed.clear()
            await self.fleet.changed.wait()

    def _sharing(self) -> Sharing:
        settings = self.settings
        if not settings.router_replica_sync:
            return Alone()
        port = settings.router_replica_port and settings.router_replica_port + 2 * self._instance
        return Replicas(self.name, settings.router_replica_host, port, open_collection(settings.discovery, RouterRecord))

    async def _some_worker(self) -> None:
        try:
            async with asyncio.timeout(self.settings.placement_timeout_s):
                while not self.fleet.generating.workers:
                    self.fleet.changed.clear()
                    await self.fleet.changed.wait()
        except TimeoutError as exc:
            raise UnavailableError(self._nobody()) from exc

    def _nobody(self) -> str:
        out = "; ".join(f"{record.id}: {reason}" for record, reason in self.fleet.members if reason)
        return f"no worker is there to generate: {out or 'none is registered, start one or look at discovery'}"

    def _abort(self, request_id: str) -> None:
        for active in tuple(self._active.values()):
            if active.request.request_id == request_id:
                self._cancel(active, RequestCancelledError(f"request {request_id!r} was aborted"))

    def _client_gone(self, active: _Active) -> None:
        self._loop.call_soon_threadsafe(self._cancel, active, RequestCancelledError("the client went away"))

    def _cancel(self, active: _Active, error: TandemError) -> None:
        active.stream.fail(error)
        if active.task is not None:
            active.task.cancel()

    def _done(self, key: int, task: "asyncio.Task[None]") -> None:
        active = self._active.pop(key)
        if task.cancelled():
            active.stream.fail(RequestCancelledError("the request was cancelled"))
        elif (exc := task.exception()) is not None:
            log.error("request.task_failed", exc_info=exc)
            active.stream.fail(UnavailableError(f"the router failed on this request: {exc}"))
        active.meter.ended(time.perf_counter())
        active.span.end(active.stream.outcome)
        self.metrics.ended(active.stream.outcome)
