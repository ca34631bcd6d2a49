# SPDX-License-Identifier: Apache-2.0
"""Assembles a worker: guard, environment, engine, host, admin server; and takes it apart again, in that order reversed."""

import functools
import logging
import os
import signal
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from prometheus_client import REGISTRY

from tandem_protocol.discovery import open_discovery
from tandem_protocol.errors import ConfigError
from tandem_protocol.spans import open_spans
from tandem_worker.admin import AdminServer
from tandem_worker.canary import Canary, Patience, canary_request
from tandem_worker.checkpoint import CheckpointPlan, Lifecycle, Outcome, plan_checkpoint
from tandem_worker.config import WorkerSettings
from tandem_worker.encode.config import embedding_transfer
from tandem_worker.encode.config import load_settings as load_embedding_settings
from tandem_worker.environment import metrics_folder
from tandem_worker.followers.leader import Followers
from tandem_worker.host import EngineHost
from tandem_worker.images.config import load_settings as load_image_settings
from tandem_worker.images.reader import ImageReader
from tandem_worker.lora.adapter import static_adapters
from tandem_worker.lora.adapters import CHANGEABLE
from tandem_worker.lora.routes import lora_routes
from tandem_worker.metrics.component import WorkerMetrics, engine_figures
from tandem_worker.metrics.exposition import Exposition
from tandem_worker.metrics.labels import Labels, dynamo_labels, parse_labels
from tandem_worker.model_json import read_model_json
from tandem_worker.ranks import HEADLESS, LocalRanks, local_ranks
from tandem_worker.registration import RegisteredPresence, WorkerNames, build_record
from tandem_worker.resting import CPU_ENGINE_VARIABLE
from tandem_worker.shared_memory import sweep_host_tiers
from tandem_worker.sleep import SleepCycle
from tandem_worker.sleep_admin import SleepRoutes
from tandem_worker.stacks import engine_cpu_s
from tandem_worker.status import WorkerState
from tandem_worker.surroundings import Surroundings
from tandem_worker.triton_models import TritonModels

if TYPE_CHECKING:
    from tandem_worker.generation import Generator

VllmHost: TypeAlias = EngineHost["Generator"]

log = logging.getLogger(__name__)

_ADMIN_TIMEOUT_S = 10.0
_ANNOUNCE_TIMEOUT_S = 10.0
_FOLLOWERS_TIMEOUT_S = 60.0
"""From the start of all engines, those of followers among them, until these have found the admin port, which they try every second."""


class Worker:
    """One engine with everything around it. Built on the stub's main thread; `stop` undoes all of it, also half-built."""

    def __init__(self, settings: WorkerSettings, model_name: str, model_dir: Path) -> None:
        self.settings = settings
        self.host: VllmHost | None = None
        self.metrics = WorkerMetrics()
        self.exposition = Exposition((REGISTRY, self.metrics.registry))
        """What `/metrics` says; complete once the worker has started."""
        self._spans = open_spans("tandem-worker")
        self._model_name = model_name
        self._model_dir = model_dir
        self._server_pid = os.getppid()
        self._surroundings = Surroundings(settings)
        self._admin: AdminServer | None = None
        self._sleep: SleepCycle | None = None
        self._canary: Future[None] | None = None
        self._followers = Followers(LocalRanks(), settings.hang_timeout_s, self._lose)
        self._triton_models = TritonModels(settings.grpc_url)

    def start(self) -> VllmHost | None:
        """Starts everything; blocks until the engine answers. Raises ConfigError with a sentence that says the fix.

        None if there is nothing to serve, since all that was wanted is a checkpoint, and that is there; the server then ends.
        """
        started = time.monotonic()
        plan = plan_checkpoint(self.settings)
        if plan is not None and plan.exists:
            self._end_after_checkpoint("exists already")
            return None
        self._surroundings.enter(read_model_json(self._model_dir), self._server_pid)
        self.host = self._build_host()
        self.host.start()
        self._sleep = self._sleep_cycle(self.host)
        if plan is not None and self._hold_for_checkpoint(plan, self.host, self._sleep) is Outcome.TAKEN:
            self._end_after_checkpoint("was taken")
            return None
        if self.settings.health_check_enabled:
            self._canary = self.host.run(self._watch_with_canary(self.host))
        admin_port = self._start_admin(self.host, self._sleep) if self.settings.effective_admin_port >= 0 else -1
        self.host.run(self._followers.complete(_FOLLOWERS_TIMEOUT_S)).result()
        if self.settings.discovery:
            self.host.run(self._announce(self.host, self._surroundings.token, admin_port)).result(_ANNOUNCE_TIMEOUT_S)
        log.info("worker.ready model=%s role=%s seconds=%.1f", self._model_name, self.settings.effective_role, time.monotonic() - started)
        return self.host

    def stop(self) -> None:
        """Drains within its bound, shuts the engine down, removes what is left."""
        if self.host is not None:
            self.host.run(self._leave_followers(self.host)).result(self.settings.drain_timeout_s + _ADMIN_TIMEOUT_S)
            if self._admin is not None:
                self.host.run(self._stop_admin(self._admin)).result(_ADMIN_TIMEOUT_S)
            if self._canary is not None:
                self._canary.cancel()
            adapters = self.host.generator.adapters
            self.host.run(adapters.close()).result(_ADMIN_TIMEOUT_S)
            self.host.shutdown()
            adapters.release()
            self.host.generator.images.close()
        self._surroundings.leave()

    async def _leave_followers(self, host: VllmHost) -> None:
        """They end when they are left, and their ranks with them: so after the drain."""
        if self._followers.awaited:
            failed = host.state in {WorkerState.DEAD, WorkerState.HUNG}
            await host.drain(self.settings.drain_timeout_s)
            await self._followers.close(failed=failed)

    async def _lose(self, reason: str) -> None:
        if self.host is not None:
            await self.host.lose(reason)

    def _build_host(self) -> VllmHost:
        # vLLM reads its environment on import, so it may be imported only now.
        from tandem_worker.arguments import complete
        from tandem_worker.engine import build_engine, detect_platform
        from tandem_worker.generation import Generator
        from tandem_worker.load import EngineLoads
        from tandem_worker.lora.assembly import build_adapters

        for path in sweep_host_tiers():
            log.warning("shm.swept path=%s: the host tier of an engine that was killed", path)
        platform = detect_platform()
        given = read_model_json(self._model_dir)
        if given.get(HEADLESS):
            raise ConfigError("headless ranks have no endpoints, so they are no Triton model: run them by `tandem serve --headless`")
        arguments = complete(given, self.settings, platform)
        if arguments.get("ec_transfer_config") is None:
            arguments["ec_transfer_config"] = embedding_transfer(load_embedding_settings(), self.settings.effective_role)
        if platform.is_cpu:
            os.environ[CPU_ENGINE_VARIABLE] = "nixl" if self.settings.effective_role.is_disaggregated else "1"
        loads = EngineLoads()
        listed = static_adapters(self._model_dir)
        started = time.monotonic()
        engine = build_engine(arguments, loads)
        load_time_s = time.monotonic() - started
        adapters = build_adapters(engine, self.settings, listed)
        self._followers = Followers(local_ranks(arguments), self.settings.hang_timeout_s, self._lose)
        cpu_s = self._followers.beside(functools.partial(engine_cpu_s, is_cpu=platform.is_cpu))
        generator = Generator(engine, self.settings, loads, adapters, ImageReader(load_image_settings()))
        host = EngineHost(generator, self.settings, self._end_server, cpu_s, self.metrics.stream,
                          self._spans)
        host.probe_with(functools.partial(self._send_canary, host))
        self.metrics.follow(functools.partial(engine_figures, host, load_time_s))
        self.exposition = self._expose(engine.vllm_config.model_config)
        adapters.rest_while(lambda: "" if host.state in CHANGEABLE else host.state)
        return host

    def _expose(self, model: Any) -> Exposition:
        names = model.served_model_name
        served = names[0] if isinstance(names, list) else names
        ours = dynamo_labels(self.settings.namespace, self.settings.effective_role, str(model.model), str(served or model.model))
        labels = Labels(ours, parse_labels(self.settings.metrics_labels))
        return Exposition((REGISTRY, self.metrics.registry), metrics_folder(self._surroundings.scratch), labels)

    def _sleep_cycle(self, host: VllmHost) -> SleepCycle:
        from tandem_worker.engine import sleep_abilities

        async def verify() -> None:
            await self._send_canary(host)

        return SleepCycle(host, host.generator.engine, verify, sleep_abilities(host.generator.engine), self._model_name)

    def _hold_for_checkpoint(self, plan: CheckpointPlan, host: VllmHost, cycle: SleepCycle) -> Outcome:
        """Blocks; bounded by the lifecycle itself, in looks: a deadline on a clock would pass between dump and restore."""
        engine = host.generator.engine
        level = 0 if cycle.abilities.refusal else self.settings.sleep_mode_level
        outcome: Outcome = host.run(Lifecycle(plan, cycle, engine, level).run()).result()
        return outcome

    def _end_after_checkpoint(self, how: str) -> None:
        log.info("checkpoint.done: it %s, the server ends", how)
        os.kill(self._server_pid, signal.SIGTERM)

    def _start_admin(self, host: VllmHost, cycle: SleepCycle) -> int:
        sleep = SleepRoutes(cycle, self.settings.sleep_mode_level, self.settings.drain_timeout_s)
        self._admin = AdminServer(host, self._model_name, self.settings.drain_timeout_s, self._triton_models.states,
                                  (*sleep.routes(), *lora_routes(host.generator.adapters), *self._followers.routes()),
                                  self.exposition.text)
        port = host.run(self._admin.start(self.settings.admin_host, self.settings.effective_admin_port)).result(_ADMIN_TIMEOUT_S)
        log.info("admin.listening model=%s url=http://%s:%d", self._model_name, self.settings.admin_host, port)
        return int(port)

    async def _stop_admin(self, admin: AdminServer) -> None:
        await admin.stop()
        await self._triton_models.close()

    async def _watch_with_canary(self, host: VllmHost) -> None:
        """Until cancelled."""
        settings = self.settings

        async def send() -> None:
            await self._send_canary(host)

        patience = Patience(settings.canary_wait_time, settings.health_check_request_timeout, settings.step_timeout_s)
        await Canary(send, host.idle_s, host.judge, patience).run()

    async def _send_canary(self, host: VllmHost) -> None:
        settings, generator = self.settings, host.generator
        await generator.canary(canary_request(settings.health_check_payload, takes_text=settings.use_vllm_tokenizer, bos=generator.bos))

    async def _announce(self, host: VllmHost, token: str, admin_port: int) -> None:
        """Registering itself goes on in the background: a store that is away must not keep a worker from serving."""
        names = WorkerNames(self._model_name, token, admin_port, host.generator.adapters.names)
        ranks, elsewhere = tuple(host.generator.loads.by_rank), self._followers.event_sources()
        record = build_record(self.settings, names, host.generator.engine.vllm_config, ranks, elsewhere)
        presence = RegisteredPresence(open_discovery(self.settings.discovery), record)
        host.announce(presence)
        host.generator.adapters.follow(presence.carry)

    def _end_server(self) -> None:
        """A server whose engine died or hangs is useless until restarted, and only its supervisor can do that."""
        log.error("server.exit reason=engine_lost pid=%d", self._server_pid)
        os.kill(self._server_pid, signal.SIGTERM)
