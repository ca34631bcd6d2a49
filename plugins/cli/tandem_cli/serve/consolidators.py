# SPDX-License-Identifier: Apache-2.0
"""The KV-event consolidators of a run: one beside each worker whose connector is kvbm, and the ports that they need."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from tandem_cli.serve.layout import RunFolder
from tandem_cli.serve.preflight import Port
from tandem_kvbm.consolidator.config import PUBLISH_OFFSET, load_settings, wanted
from tandem_worker.arguments import REPLAY_PORT_OFFSET
from tandem_worker.config import CONSOLIDATED_PORT_VARIABLE, WorkerSettings
from tandem_worker.ranks import local_ranks

_STREAM_OPTION, _ADMIN_OPTION = "DYN_KVBM_LEADER_ZMQ_PUB_PORT", "TANDEM_CONSOLIDATOR_ADMIN_PORT"


@dataclass(frozen=True)
class Sidecar:
    """One consolidator to start."""

    worker_index: int
    port: int
    admin_port: int
    """0 for any."""
    environment: dict[str, str]

    def ports(self) -> list[Port]:
        """What it binds."""
        stream = Port(self.port, f"consolidated KV events of worker {self.worker_index}", _STREAM_OPTION)
        replay = Port(self.port + PUBLISH_OFFSET, f"replay of consolidated KV events of worker {self.worker_index}", _STREAM_OPTION)
        admin = Port(self.admin_port, f"admin of the consolidator of worker {self.worker_index}", _ADMIN_OPTION)
        return [stream, replay, admin] if self.admin_port else [stream, replay]


def plan_sidecars(workers: Sequence[WorkerSettings], arguments: Mapping[str, Any], environment: Mapping[str, str],
                  folder: RunFolder) -> tuple[Sidecar, ...]:
    """One for each worker that wants one. Raises ConfigError.

    None if the engine's events are configured by hand, or the caller's environment says that somebody else consolidates; and none
    for ranks that begin above 0 or are followers', since a consolidator counts this host's, from 0.
    """
    ranks = local_ranks(arguments)
    if arguments.get("kv_events_config") is not None or environment.get(CONSOLIDATED_PORT_VARIABLE) or ranks.first or ranks.remote:
        return ()
    caching = arguments.get("enable_prefix_caching") is not False
    settings = load_settings({}, environment)
    return tuple(
        _sidecar(worker, ranks.count, environment, folder) for worker in workers
        if wanted(settings, worker.effective_connectors, prefix_caching=caching, publishes=worker.publishes_kv_events)
    )


def workers_environment(sidecars: Sequence[Sidecar]) -> dict[str, str]:
    """What tells workers that consolidators publish for them; each adds its own index."""
    return {CONSOLIDATED_PORT_VARIABLE: str(sidecars[0].port - sidecars[0].worker_index)} if sidecars else {}


def start_sidecars(sidecars: Sequence[Sidecar], server_pid: int, environment: Mapping[str, str], log: IO[bytes]) -> None:
    """Starts them, each under a supervisor that ends when the server does."""
    for sidecar in sidecars:
        subprocess.Popen(
            [sys.executable, "-m", "tandem_kvbm.consolidator.supervisor", str(server_pid)], env={**environment, **sidecar.environment},
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )


def _sidecar(worker: WorkerSettings, ranks: int, environment: Mapping[str, str], folder: RunFolder) -> Sidecar:
    port = worker.kv_event_port + worker.worker_index * ranks
    own = {
        "TANDEM_CONSOLIDATOR_WORKER_INDEX": str(worker.worker_index),
        "TANDEM_CONSOLIDATOR_RANKS": str(ranks),
        "TANDEM_CONSOLIDATOR_ENGINE": f"tcp://127.0.0.1:{port}",
        "TANDEM_CONSOLIDATOR_ENGINE_REPLAY": f"tcp://127.0.0.1:{port + REPLAY_PORT_OFFSET}",
        "TANDEM_CONSOLIDATOR_STATE": str((folder.path / f"kv-events-{worker.worker_index}.state").absolute()),
    }
    settings = load_settings({}, {**environment, **own})
    return Sidecar(worker.worker_index, settings.published_port, settings.effective_admin_port, own)
