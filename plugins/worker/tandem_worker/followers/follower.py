# SPDX-License-Identifier: Apache-2.0
"""A worker without endpoints: it runs data-parallel ranks for a leader on another host, and ends with it.

It has no tritonserver and is not in discovery. Guard, liveness, metrics and admin port are as a worker's. It never outlives its leader:
engines whose front end is gone can't be given another one by vLLM, so a supervisor starts both anew.
"""

import asyncio
import functools
import json
import logging
import os
import signal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import REGISTRY

from tandem_protocol.errors import ConfigError, EngineError
from tandem_worker.config import WorkerSettings
from tandem_worker.environment import metrics_folder
from tandem_worker.followers.admin import FollowerAdmin
from tandem_worker.followers.leash import Leash
from tandem_worker.followers.terms import Figures, Joining, ranks_text
from tandem_worker.metrics.exposition import Exposition
from tandem_worker.metrics.labels import Labels, dynamo_labels, parse_labels
from tandem_worker.ranks import HEADLESS, LocalRanks, local_ranks
from tandem_worker.resting import CPU_ENGINE_VARIABLE
from tandem_worker.stacks import engine_cpu_s
from tandem_worker.surroundings import Surroundings

log = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 0.25


class Follower:
    """One follower, on the process's main thread."""

    def __init__(self, settings: WorkerSettings, folder: Path) -> None:
        """`folder` holds the engine arguments, in model.json. Raises ConfigError for those of no follower."""
        self._settings = settings
        self._given: dict[str, Any] = json.loads((folder / "model.json").read_text())
        if not self._given.get(HEADLESS):
            raise ConfigError(f"{folder / 'model.json'} has no {HEADLESS}: a worker with endpoints is a Triton model, this runs followers")
        self._ranks: LocalRanks = local_ranks(self._given)
        self._surroundings = Surroundings(settings)
        self._engines: Any = None
        self._leash: Leash | None = None

    def run(self) -> None:
        """Until it is told to end, or its leader was. Raises EngineError when an engine or the leader is lost, ConfigError."""
        try:
            self._surroundings.enter(self._given, os.getpid())
            self._start_engines()
            asyncio.run(self._follow())
        finally:
            if self._engines is not None:
                self._engines.stop()
            self._surroundings.leave()

    def _start_engines(self) -> None:
        # vLLM reads its environment on import, so it may be imported only now.
        from tandem_worker.arguments import complete
        from tandem_worker.engine import detect_platform
        from tandem_worker.followers.engines import HeadlessEngines

        platform = detect_platform()
        arguments = complete(self._given, self._settings, platform)
        if platform.is_cpu:
            os.environ[CPU_ENGINE_VARIABLE] = "nixl" if self._settings.effective_role.is_disaggregated else "1"
        figures = functools.partial(self._figures, is_cpu=platform.is_cpu)
        joining = self._joining(arguments.get("kv_events_config"))
        self._engines = HeadlessEngines(arguments)
        settings = self._settings
        self._leash = Leash(self.leader_url, joining, figures, settings.leader_timeout_s, settings.hang_timeout_s)

    @property
    def leader_url(self) -> str:
        """As set, else at the leader's address, on the port that this worker would have."""
        return self._settings.leader_url or f"http://{self._given['data_parallel_address']}:{self._settings.effective_admin_port}"

    def _joining(self, events: dict[str, Any] | None) -> Joining:
        """vLLM adds the rank to the ports; the first one's are told."""
        event_port, replay_port = (_port(events[name]) + self._ranks.first if events else 0 for name in ("endpoint", "replay_endpoint"))
        return Joining(self._ranks.first, self._ranks.count, event_port, replay_port)

    def _figures(self, *, is_cpu: bool) -> Figures:
        ranks = range(self._ranks.first, self._ranks.first + self._ranks.count)
        return Figures(tuple(engine_cpu_s(rank, is_cpu=is_cpu) for rank in ranks))

    async def _follow(self) -> None:
        assert self._leash is not None
        admin = FollowerAdmin(self._status, self._exposition().text)
        told = self._told()
        if self._settings.effective_admin_port >= 0:
            port = await admin.start(self._settings.admin_host, self._settings.effective_admin_port)
            log.info("admin.listening url=http://%s:%d", self._settings.admin_host, port)
        ends = [asyncio.create_task(end) for end in (told.wait(), self._leash.hold(), self._lost_engines())]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            self._judge(ends[1], ends[2])
        finally:
            for end in ends:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
            await admin.stop()

    def _judge(self, leader: "asyncio.Task[Any]", engines: "asyncio.Task[Any]") -> None:
        """Raises what ended it, unless that was meant. An engine that a leader ends goes before the leader does."""
        if leader.done() and not leader.result():
            raise EngineError("the leader is gone: its engines' requests are lost, so this follower ends")
        if engines.done():
            raise EngineError(f"an engine ended by itself: {engines.result()}")
        log.info("follower.ends: it, or its leader, was told to")

    async def _lost_engines(self) -> str:
        while not (ended := self._engines.ended()):  # noqa: ASYNC110 - vLLM offers exit codes, no event
            await asyncio.sleep(_WATCH_INTERVAL_S)
        return str(ended)

    def _told(self) -> asyncio.Event:
        """Set by SIGTERM or SIGINT."""
        told, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, told.set)
        return told

    def _status(self) -> dict[str, Any]:
        tied = self._leash is not None and self._leash.tied
        return {"status": "following" if tied else "starting", "ranks": ranks_text(self._ranks.first, self._ranks.count),
                "role": self._settings.effective_role, "leader": self.leader_url}

    def _exposition(self) -> Exposition:
        settings, model = self._settings, self._engines.config.model_config
        names = model.served_model_name
        served = names[0] if isinstance(names, list) else names
        ours = dynamo_labels(settings.namespace, settings.effective_role, str(model.model), str(served or model.model))
        return Exposition((REGISTRY,), metrics_folder(self._surroundings.scratch), Labels(ours, parse_labels(settings.metrics_labels)))


def _port(endpoint: str) -> int:
    return urlsplit(endpoint.replace("*", "any")).port or 0
