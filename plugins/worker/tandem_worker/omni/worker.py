# SPDX-License-Identifier: Apache-2.0
"""Assembles a worker around a pipeline: guard, environment, pipeline, host, admin server, discovery; and takes it apart again.

As `tandem_worker.worker` does for one engine of vLLM's, without what a pipeline hasn't: KV events, adapters, sleep, followers.
"""

import asyncio
import dataclasses
import functools
import logging
import math
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY

from tandem_protocol import workers
from tandem_protocol.discovery import open_discovery
from tandem_protocol.errors import RequestError, UnavailableError
from tandem_protocol.spans import open_spans
from tandem_protocol.workers import WorkerRecord
from tandem_worker.admin import AdminServer
from tandem_worker.canary import Canary, Patience
from tandem_worker.config import WorkerSettings
from tandem_worker.host import EngineHost
from tandem_worker.images.config import load_settings as load_image_settings
from tandem_worker.images.reader import ImageReader
from tandem_worker.load import EngineLoads
from tandem_worker.metrics.component import EngineFigures, WorkerMetrics
from tandem_worker.metrics.exposition import Exposition
from tandem_worker.metrics.labels import Labels, dynamo_labels, parse_labels
from tandem_worker.model_json import read_model_json
from tandem_worker.omni.arguments import OmniArguments, complete
from tandem_worker.omni.canary import canary_order, text_stage
from tandem_worker.omni.config import load_settings as load_bounds
from tandem_worker.omni.generation import OmniGenerator
from tandem_worker.omni.pipeline import Pipeline
from tandem_worker.omni.terms import Stage
from tandem_worker.registration import RegisteredPresence, WorkerNames, admin_url
from tandem_worker.stacks import engine_cpu_s
from tandem_worker.surroundings import Surroundings
from tandem_worker.triton_models import TritonModels

log = logging.getLogger(__name__)

_ADMIN_TIMEOUT_S = 10.0
_HEALTH_INTERVAL_S = 1.0
StartPipeline = Callable[[OmniArguments], Pipeline]


class OmniHost(EngineHost[OmniGenerator]):
    """Serves requests on one pipeline until `shutdown`."""

    async def kvbm(self, command: str, tier: str) -> dict[str, Any]:
        """There is nothing of the kind."""
        raise RequestError("this worker runs a pipeline, which has no KV tiers")


class OmniWorker:
    """One pipeline with everything around it. Built on the stub's main thread; `stop` undoes all of it, also half-built."""

    def __init__(self, settings: WorkerSettings, model_name: str, model_dir: Path) -> None:
        self.settings = settings
        self.host: OmniHost | None = None
        self.metrics = WorkerMetrics()
        self.exposition = Exposition((REGISTRY, self.metrics.registry))
        self.admin_port = -1
        """As bound; -1 while, or if, there is none."""
        self._image_settings, self._bounds = load_image_settings(), load_bounds()  # before minutes of loading
        self._spans = open_spans("tandem-worker")
        self._model_name, self._model_dir = model_name, model_dir
        self._server_pid = os.getppid()
        self._surroundings = Surroundings(self.settings)
        self._admin: AdminServer | None = None
        self._watches: list[Future[None]] = []
        self._triton_models = TritonModels(settings.grpc_url)

    def start(self, start_pipeline: StartPipeline | None = None) -> OmniHost:
        """Starts everything; blocks until all stages stand. Raises ConfigError with a sentence that says the fix."""
        started = time.monotonic()
        arguments = complete(read_model_json(self._model_dir), self.settings.model, self._model_dir)
        self._surroundings.enter({}, self._server_pid)
        pipeline = (start_pipeline or _real_pipeline())(arguments)
        host = self.host = self._build_host(pipeline, arguments, time.monotonic() - started)
        asked = text_stage(pipeline.stages)
        if asked is not None:
            host.probe_with(functools.partial(self._send_canary, host, asked))
        host.start()
        self._watches.append(host.run(self._watch_health(host, pipeline)))
        if self.settings.health_check_enabled:
            self._watches.extend(self._start_canary(host, asked))
        if self.settings.effective_admin_port >= 0:
            self.admin_port = self._start_admin(host)
        if self.settings.discovery:
            host.run(self._announce(host, arguments)).result(_ADMIN_TIMEOUT_S)
        log.info("worker.ready model=%s role=%s stages=%d seconds=%.1f", self._model_name, self.settings.effective_role,
                 len(pipeline.stages), time.monotonic() - started)
        return host

    def stop(self) -> None:
        """Drains within its bound, shuts the pipeline down, removes what is left."""
        if self.host is not None:
            self.host.run(self.host.drain(self.settings.drain_timeout_s)).result(self.settings.drain_timeout_s + _ADMIN_TIMEOUT_S)
            if self._admin is not None:
                self.host.run(self._stop_admin(self._admin)).result(_ADMIN_TIMEOUT_S)
            for watch in self._watches:
                watch.cancel()
            self.host.shutdown()
            self.host.generator.images.close()
        self._surroundings.leave()

    def _build_host(self, pipeline: Pipeline, arguments: OmniArguments, load_time_s: float) -> OmniHost:
        generator = OmniGenerator(pipeline, EngineLoads(), ImageReader(self._image_settings), self._bounds)
        cpu_s = functools.partial(engine_cpu_s, is_cpu=pipeline.on_cpu)
        host = OmniHost(generator, watched(self.settings, pipeline), self._end_server, cpu_s, self.metrics.stream, self._spans)
        self.metrics.follow(lambda: EngineFigures(host.status().active, load_time_s, ()))
        ours = dynamo_labels(self.settings.namespace, self.settings.effective_role, arguments.model, arguments.model)
        # What the stages' processes count, they send to this one.
        self.exposition = Exposition((REGISTRY, self.metrics.registry), labels=Labels(ours, parse_labels(self.settings.metrics_labels)))
        return host

    async def _watch_health(self, host: OmniHost, pipeline: Pipeline) -> None:
        """Until cancelled, or a stage is lost: then no request that needs it could ever end well here. Takes the pulse on the way."""
        load, told = host.generator.loads.of(0), pipeline.steps
        while True:
            try:
                await pipeline.check_health()
                before, told = told, pipeline.steps
                load.steps += told - before
            except UnavailableError as exc:
                await host.lose(str(exc))
                return
            except Exception:  # a failed look must not end the watch
                log.exception("omni.look_failed")
            await asyncio.sleep(_HEALTH_INTERVAL_S)

    def _start_canary(self, host: OmniHost, asked: Stage | None) -> list[Future[None]]:
        if asked is None:
            log.warning("canary.none: this pipeline makes no text, so that no canary is sent (DYN_HEALTH_CHECK_ENABLED)")
            return []
        settings = self.settings
        patience = Patience(settings.canary_wait_time, settings.health_check_request_timeout, settings.step_timeout_s)
        return [host.run(Canary(functools.partial(self._send_canary, host, asked), host.idle_s, host.judge, patience).run())]

    async def _send_canary(self, host: OmniHost, asked: Stage) -> None:
        generator = host.generator
        await generator.canary(canary_order(self.settings.health_check_payload, generator.engine.stages, asked))

    def _start_admin(self, host: OmniHost) -> int:
        self._admin = AdminServer(host, self._model_name, self.settings.drain_timeout_s, self._triton_models.states,
                                  metrics=self.exposition.text)
        port = host.run(self._admin.start(self.settings.admin_host, self.settings.effective_admin_port)).result(_ADMIN_TIMEOUT_S)
        log.info("admin.listening model=%s url=http://%s:%d", self._model_name, self.settings.admin_host, port)
        return int(port)

    async def _stop_admin(self, admin: AdminServer) -> None:
        await admin.stop()
        await self._triton_models.close()

    async def _announce(self, host: OmniHost, arguments: OmniArguments) -> None:
        """Registering itself goes on in the background: a store that is away must not keep a worker from serving."""
        names = WorkerNames(self._model_name, self._surroundings.token, self.admin_port)
        host.announce(RegisteredPresence(open_discovery(self.settings.discovery), omni_record(self.settings, names, arguments.model)))

    def _end_server(self) -> None:
        """A server whose pipeline died is useless until restarted, and only its supervisor can do that."""
        log.error("server.exit reason=pipeline_lost pid=%d", self._server_pid)
        os.kill(self._server_pid, signal.SIGTERM)


def watched(settings: WorkerSettings, pipeline: Pipeline) -> WorkerSettings:
    """For a pipeline that doesn't tell all its steps only their bound holds: a GPU's processes spin while they wait, so a long image would
    look like a hang."""
    if pipeline.tells_steps or settings.hang_timeout_s == 0:
        return settings
    return dataclasses.replace(settings, hang_timeout_s=math.inf)


def omni_record(settings: WorkerSettings, names: WorkerNames, model: str) -> WorkerRecord:
    """The record of a ready worker; a pipeline has no blocks that anyone could count on."""
    return WorkerRecord(
        id=f"{names.triton_model}-{names.start_token}", role=settings.effective_role, state=workers.WorkerState.READY, model=model,
        grpc_url=settings.grpc_url, triton_model=names.triton_model, admin_url=admin_url(settings, names.admin_port),
        block_size=0, total_blocks=0, max_num_seqs=0, max_num_batched_tokens=0,
    )


def _real_pipeline() -> StartPipeline:
    # vLLM reads its environment on import, so it may be imported only now.
    from tandem_worker.omni.async_omni import start_pipeline

    return start_pipeline
