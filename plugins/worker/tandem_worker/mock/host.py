# SPDX-License-Identifier: Apache-2.0
"""One mock worker inside a Triton Python model: for tests in which Triton loads, unloads and serves workers without engines.

The stub's main thread submits; everything else runs on one event loop of its own, which also sends the responses.
"""

import asyncio
import contextlib
import dataclasses
import logging
import threading
from concurrent.futures import Future
from typing import Any

from tandem_protocol import kv_events
from tandem_protocol.discovery import open_discovery
from tandem_protocol.errors import ConfigError, EngineError, RequestCancelledError, TandemError
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.streams import Sink
from tandem_worker.mock.admin import AdminServer
from tandem_worker.mock.answers import MockOutput, joined
from tandem_worker.mock.fleet import Fleet
from tandem_worker.mock.handover import handoff_of, prefill
from tandem_worker.mock.options import MockOptions
from tandem_worker.mock.worker import MockWorker
from tandem_worker.responses import GenerationEncoder

log = logging.getLogger(__name__)

_START_S = 30.0
_STOP_S = 20.0
_ABORT_S = 5.0


class MockHost:
    """Resource handling: `start` begins, `stop` ends; both on the main thread."""

    def __init__(self, options: MockOptions, model_name: str, grpc_url: str) -> None:
        """`grpc_url`: where routers reach this Triton. Raises ConfigError for several workers."""
        if options.workers != 1:
            raise ConfigError("a mock worker inside Triton is one worker: run `python -m tandem_worker.mock` for others")
        self._options = dataclasses.replace(options, name=model_name, exact_name=True)
        self._grpc_url = grpc_url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tandem-mock", daemon=True)
        self._stack = contextlib.AsyncExitStack()
        self._fleet = Fleet(self._options)
        self._worker: MockWorker | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Serves and is known in discovery when it returns. Raises ConfigError."""
        self._thread.start()
        self._run(self._begin()).result(_START_S)

    def submit(self, request: GenerationRequest, sink: Sink) -> None:
        """Takes a request; its answer or error goes to `sink`."""
        self._loop.call_soon_threadsafe(self._spawn, request, sink)

    def abort(self, request_id: str) -> None:
        """Aborts what this client calls by this id. Raises EngineError when the worker doesn't hear."""
        try:
            self._run(self._abort(request_id)).result(_ABORT_S)
        except TimeoutError as exc:
            raise EngineError(f"the mock worker did not hear within {_ABORT_S:g} s: ask again") from exc

    def stop(self) -> None:
        """Leaves discovery, lets requests end within a bound, and ends."""
        try:
            self._run(self._end()).result(2 * _STOP_S)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_STOP_S)
            if not self._thread.is_alive():
                self._loop.close()

    def _run(self, coroutine: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _begin(self) -> None:
        options, fleet = self._options, self._fleet
        if options.events:
            kv_events.warm_up()
        admin = AdminServer(fleet)
        self._stack.push_async_callback(admin.stop)
        fleet.admin_address = f"{options.host}:{await admin.start(options.host, options.admin_port)}"
        fleet.start()
        self._stack.push_async_callback(fleet.close)
        self._worker = fleet.at(0)
        if options.discovery:
            discovery = open_discovery(options.discovery)
            self._stack.push_async_callback(discovery.close)
            await fleet.register(discovery, self._grpc_url)

    async def _abort(self, request_id: str) -> None:
        if self._worker is not None:
            self._worker.abort(request_id)

    async def _end(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STOP_S)
        await self._stack.aclose()

    def _spawn(self, request: GenerationRequest, sink: Sink) -> None:
        task = self._loop.create_task(self._serve(request, sink))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, request: GenerationRequest, sink: Sink) -> None:
        try:
            await self._answer(request, sink)
        except TandemError as exc:
            sink.fail(exc)
        except Exception as exc:  # one request's oddity must end as its own error
            log.exception("mock.request_failed")
            sink.fail(EngineError(f"the mock worker failed on this request: {exc}"))

    async def _answer(self, request: GenerationRequest, sink: Sink) -> None:
        worker = self._worker
        if worker is None:
            raise EngineError("the mock worker was asked before its start")
        if worker.is_decoupled:
            await self._generate(worker, request, sink)
        else:
            sink.send(await prefill(self._fleet, worker, request), final=True)

    async def _generate(self, worker: MockWorker, request: GenerationRequest, sink: Sink) -> None:
        encoder, whole = GenerationEncoder(request, n=1), list[MockOutput]()
        async with handoff_of(self._fleet, request) as release, contextlib.aclosing(worker.generate(request)) as outputs:
            async for output in outputs:
                await release()  # the first token means that the blocks have arrived
                whole.append(output)
                if output.finished or request.stream:
                    sink.send(encoder.encode(joined(whole)), final=output.finished)
                    whole.clear()
                if not output.finished and sink.is_cancelled():
                    raise RequestCancelledError("the client went away")
