# SPDX-License-Identifier: Apache-2.0
"""Scales worker containers of one host, found by their labels. Edge module: the only one that knows `docker`.

The containers are made beforehand (`docker create`, `docker compose create`), each with its GPUs and ports, which nobody could guess.
A worker is added by starting one, and removed by a drain, where the label `tandem.dev/admin` tells its admin port, and a stop.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import docker
import requests
from docker.errors import DockerException

from tandem_planner.connectors.draining import Drainer
from tandem_planner.connectors.interface import FLEET_LABEL, ROLE_LABEL, Bounds, Connector, wait_until
from tandem_planner.terms import Pool
from tandem_protocol.errors import ConfigError, UnavailableError
from tandem_protocol.roles import Role
from tandem_protocol.workers import WorkerRecord, WorkerState

log = logging.getLogger(__name__)

T = TypeVar("T")
ADMIN_LABEL = "tandem.dev/admin"
"""URL of the worker's admin port as the planner reaches it."""
_RUNNING = frozenset({"running", "restarting"})


@dataclass(frozen=True)
class Container:
    """One worker's container."""

    id: str
    name: str
    role: Role
    running: bool
    ready: bool
    """Runs, and its health check, if there is one, says that it is well."""
    admin_url: str


def connect(host: str, call_s: float) -> Any:
    """A client of the Docker Engine at `host`, or at the usual place for "". Raises ConfigError."""
    try:
        return docker.DockerClient(base_url=host, timeout=call_s) if host else docker.from_env(timeout=call_s)
    except DockerException as exc:
        raise ConfigError(f"there is no Docker Engine to be spoken to: set DOCKER_HOST ({exc})") from exc


class DockerConnector(Connector):
    """One fleet on one host."""

    def __init__(self, engine: Any, fleet: str, drainer: Drainer, bounds: Bounds) -> None:
        """`engine` as of `connect`; closed with the connector."""
        self._engine = engine
        self._labels = [f"{FLEET_LABEL}={fleet}", ROLE_LABEL]
        self._drainer = drainer
        self._bounds = bounds

    async def pools(self) -> Mapping[Role, Pool]:
        """Roles that have containers, running or not."""
        found = await self._containers()
        return {role: _pool(found, role) for role in Role if any(one.role is role for one in found)}

    async def scale(self, role: Role, count: int) -> None:
        """Starts the first by name, stops the last."""
        mine = [one for one in await self._containers() if one.role is role]
        if count > len(mine):
            raise UnavailableError(f"{count} {role} workers are wanted and there are {len(mine)} containers for them: create more")
        running, spare = [one for one in mine if one.running], [one for one in mine if not one.running]
        for one in spare[:max(0, count - len(running))]:
            log.info("planner.start container=%s", one.name)
            await self._call(partial(self._start, one))
        for one in reversed(running[count:]):
            await self._retire(one)
        await wait_until(lambda: self._is_at(role, count), self._bounds, f"{count} {role} containers that are well")

    def _start(self, one: Container) -> None:
        self._engine.containers.get(one.id).start()

    async def _is_at(self, role: Role, count: int) -> bool:
        pool = _pool(await self._containers(), role)
        return pool.ready == pool.wanted == count

    async def _retire(self, one: Container) -> None:
        log.info("planner.stop container=%s", one.name)
        if one.admin_url:
            await self._drainer.drain(_record_of(one))
        await self._call(lambda: self._stop(one))

    def _stop(self, one: Container) -> None:
        """SIGTERM, on which the worker ends what it has left; SIGKILL after the bound. Returns when the container is down."""
        bound = max(1, round(self._bounds.drain_s))
        self._engine.containers.get(one.id).stop(timeout=bound)  # the client waits for its own timeout longer than that

    async def _containers(self) -> tuple[Container, ...]:
        listed = await self._call(lambda: self._engine.containers.list(all=True, filters={"label": self._labels}))
        return tuple(sorted((_container(one) for one in listed), key=lambda one: one.name))

    async def _call(self, call: Callable[[], T]) -> T:
        """On a thread; bounded by the client's own timeout."""
        try:
            return await asyncio.to_thread(call)
        except (DockerException, requests.RequestException) as exc:
            raise UnavailableError(f"the Docker Engine did not do it: {exc}") from exc

    async def close(self) -> None:
        """Ends its connections."""
        await asyncio.to_thread(self._engine.close)
        await self._drainer.close()


def _container(one: Any) -> Container:
    """Raises ConfigError for a role that nobody knows."""
    state, given = one.attrs["State"], one.labels[ROLE_LABEL]
    try:
        role = Role(given)
    except ValueError as exc:
        raise ConfigError(f"container {one.name} has the label {ROLE_LABEL}={given!r}: use one of {', '.join(Role)}") from exc
    running = state["Status"] in _RUNNING
    healthy = state.get("Health", {}).get("Status", "healthy") == "healthy"
    return Container(one.id, one.name, role, running, state["Status"] == "running" and healthy, one.labels.get(ADMIN_LABEL, ""))


def _pool(found: tuple[Container, ...], role: Role) -> Pool:
    mine = [one for one in found if one.role is role]
    return Pool(ready=sum(one.ready for one in mine), wanted=sum(one.running for one in mine))


def _record_of(one: Container) -> WorkerRecord:
    """As much of a worker's record as its drain needs."""
    return WorkerRecord(id=one.name, role=one.role, state=WorkerState.READY, model="", grpc_url="", triton_model=one.name,
                        admin_url=one.admin_url, block_size=1, total_blocks=0, max_num_seqs=0, max_num_batched_tokens=0)
