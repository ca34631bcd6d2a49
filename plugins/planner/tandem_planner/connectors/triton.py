# SPDX-License-Identifier: Apache-2.0
"""Scales the worker models of one tritonserver: a worker is added by a load, and removed by a drain and an unload.

Which models are workers of which role is told by their names. Which are ready or drain is told by discovery: Triton's own index calls a
draining worker ready.
"""

import asyncio
import fnmatch
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

from tandem_planner.connectors.draining import Drainer
from tandem_planner.connectors.interface import Bounds, Connector
from tandem_planner.connectors.triton_server import Model, ModelState, TritonServer
from tandem_planner.terms import Pool
from tandem_protocol.errors import UnavailableError
from tandem_protocol.roles import Role
from tandem_protocol.workers import WorkerRecord, WorkerState

log = logging.getLogger(__name__)

Records = Callable[[], Awaitable[tuple[WorkerRecord, ...]]]


@dataclass(frozen=True)
class Shelf:
    """The models of one role, by what they do."""

    ready: tuple[WorkerRecord, ...] = ()
    draining: tuple[WorkerRecord, ...] = ()
    starting: tuple[str, ...] = ()
    """Loaded or loading, not known to take requests yet."""
    ending: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()
    """Not loaded."""

    @property
    def wanted(self) -> int:
        """Workers that are meant to stay."""
        return len(self.ready) + len(self.starting)

    @property
    def known(self) -> int:
        """Models of the role."""
        return self.wanted + len(self.draining) + len(self.ending) + len(self.spare)

    def pool(self) -> Pool:
        """Workers that drain are still ready, so that a pool with one is not settled."""
        return Pool(ready=len(self.ready) + len(self.draining) + len(self.ending), wanted=self.wanted)


def sort_models(models: Iterable[Model], records: Iterable[WorkerRecord], patterns: tuple[str, ...]) -> Shelf:
    """Which of the models that match do what. Pure; keeps the order of the models."""
    mine = [model for model in models if any(fnmatch.fnmatchcase(model.name, pattern) for pattern in patterns)]
    by_name = {record.triton_model: record for record in records}
    loaded = [model.name for model in mine if model.state is ModelState.READY]
    known = [by_name[name] for name in loaded if name in by_name]
    ready = tuple(record for record in known if record.state is WorkerState.READY)
    draining = tuple(record for record in known if record.state is WorkerState.DRAINING)
    asleep = tuple(record for record in known if record.state is WorkerState.ASLEEP)  # somebody put it there, and it is left alone
    settled = {record.triton_model for record in (*ready, *draining, *asleep)}
    return Shelf(
        ready=ready, draining=draining,
        starting=tuple(model.name for model in mine if model.state is ModelState.LOADING or model.name in set(loaded) - settled),
        ending=tuple(model.name for model in mine if model.state is ModelState.UNLOADING),
        spare=tuple(model.name for model in mine if model.state is ModelState.UNAVAILABLE),
    )


class TritonConnector(Connector):
    """One tritonserver in explicit model-control mode."""

    def __init__(self, server: TritonServer, records: Records, patterns: Mapping[Role, tuple[str, ...]], drainer: Drainer,
                 bounds: Bounds) -> None:  # fmt: skip
        """`records` lists the workers in discovery, where this server's models must have names that no other server's have."""
        self._server = server
        self._records = records
        self._patterns = patterns
        self._drainer = drainer
        self._bounds = bounds

    async def pools(self) -> Mapping[Role, Pool]:
        """Roles without a model are left out."""
        models, records = await self._server.models(), await self._records()
        shelves = {role: sort_models(models, records, patterns) for role, patterns in self._patterns.items()}
        return {role: shelf.pool() for role, shelf in shelves.items() if shelf.pool().ready or shelf.wanted or shelf.spare}

    async def scale(self, role: Role, count: int) -> None:
        """One step after another: what is missing is loaded, then what drains is unloaded; of the ready ones the last by name go."""
        shelf = await self._shelf(role)
        if count > shelf.known:
            raise UnavailableError(f"{count} {role} workers are wanted and the repository has {shelf.known} models for them: add models")
        try:
            async with asyncio.timeout(self._bounds.scale_s):
                while not (shelf.pool().settled and len(shelf.ready) == count):
                    if not await self._step(shelf, count):
                        await asyncio.sleep(self._bounds.check_s)
                    shelf = await self._shelf(role)
        except TimeoutError as exc:
            raise UnavailableError(f"not within {self._bounds.scale_s:g} s: {count} {role} workers that take requests; "
                                   f"there are {len(shelf.ready)}, starting: {', '.join(shelf.starting) or 'none'}") from exc

    async def _step(self, shelf: Shelf, count: int) -> bool:
        """Whether there was anything to do but wait. A worker goes only while more than `count` others take requests."""
        if shelf.spare and shelf.wanted < count:
            await self._load_one(shelf.spare)
        elif shelf.draining:
            await self._retire(shelf.draining[-1])
        elif len(shelf.ready) > count:
            await self._retire(shelf.ready[-1])
        else:
            return False
        return True

    async def _load_one(self, names: tuple[str, ...]) -> None:
        """The first that can be. One at a time: engines that start together fight for memory while each measures what is free.

        Raises UnavailableError if none can.
        """
        failures = []
        for name in names:
            log.info("planner.load model=%s", name)
            try:
                await self._server.load(name)
            except UnavailableError as exc:
                log.warning("planner.load_failed model=%s reason=%s", name, exc)
                failures.append(str(exc))
            else:
                return
        raise UnavailableError(f"no model could be loaded: {'; '.join(failures)}")

    async def _retire(self, record: WorkerRecord) -> None:
        log.info("planner.drain model=%s", record.triton_model)
        emptied = await self._drainer.drain(record)
        await self._server.unload(record.triton_model)
        log.info("planner.unloaded model=%s aborted=%d", record.triton_model, emptied.aborted)

    async def _shelf(self, role: Role) -> Shelf:
        return sort_models(await self._server.models(), await self._records(), self._patterns[role])

    async def close(self) -> None:
        """Ends its connections."""
        await self._server.close()
        await self._drainer.close()
