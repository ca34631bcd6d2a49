# SPDX-License-Identifier: Apache-2.0
"""Keeps a worker known in discovery, in the state that it is in, until it stops or its engine dies.

Everything runs on the worker's event loop, except `follow`, which may be called from any thread. Serving never depends on it:
what fails is logged once, counted, and tried again.
"""

import asyncio
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec
from prometheus_client import Counter, Gauge

from tandem_protocol import workers
from tandem_protocol.discovery import Discovery, Registration
from tandem_protocol.errors import UnavailableError
from tandem_protocol.workers import EventSource, WorkerRecord
from tandem_worker.arguments import REPLAY_PORT_OFFSET
from tandem_worker.config import WorkerSettings
from tandem_worker.speculation import speculation_of
from tandem_worker.status import WorkerState

log = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.5
_LAST_RETRY_S = 10.0
_LEAVE_TIMEOUT_S = 5.0
_ANY_ADDRESS = frozenset({"", "*", "0.0.0.0", "::", "[::]"})  # noqa: S104 - compared with, not bound
_STATES = {
    WorkerState.STARTING: workers.WorkerState.STARTING,
    WorkerState.READY: workers.WorkerState.READY,
    WorkerState.UNWELL: workers.WorkerState.STARTING,
    WorkerState.DRAINING: workers.WorkerState.DRAINING,
    WorkerState.ASLEEP: workers.WorkerState.ASLEEP,
}
"""A worker in any other state is not known in discovery."""

FAILURES = Counter("tandem_discovery_failures", "Attempts to register or update this worker that failed", ["worker"])
HELD = Gauge("tandem_discovery_registered", "1 while discovery holds this worker's record", ["worker"])


@dataclass(frozen=True)
class WorkerNames:
    """How this worker is reached and told from others."""

    triton_model: str
    start_token: str
    """Unique per start."""
    admin_port: int
    """As bound; -1 for none."""
    loras: tuple[str, ...] = ()


def build_record(settings: WorkerSettings, names: WorkerNames, config: Any, ranks: tuple[int, ...] = (0,),
                 elsewhere: Mapping[int, EventSource] = MappingProxyType({})) -> WorkerRecord:
    """The record of a ready worker; `config` is the engine's own VllmConfig, after its engine cores have started.

    `ranks`: those that it serves. vLLM has added up their blocks by then. `elsewhere`: the events of those that other hosts run.
    """
    here = tuple(rank for rank in ranks if rank not in elsewhere)
    sources = _event_sources(config.kv_events_config, here, reachable_host(settings), settings.effective_consolidated_port)
    return WorkerRecord(
        id=f"{names.triton_model}-{names.start_token}",
        role=settings.effective_role,
        state=workers.WorkerState.READY,
        model=str(config.model_config.model),
        grpc_url=settings.grpc_url,
        triton_model=names.triton_model,
        admin_url=admin_url(settings, names.admin_port),
        event_sources=(*sources, *elsewhere.values()),
        block_size=int(config.cache_config.block_size),
        total_blocks=int(config.cache_config.num_gpu_blocks or 0),
        max_num_seqs=int(config.scheduler_config.max_num_seqs),
        max_num_batched_tokens=int(config.scheduler_config.max_num_batched_tokens),
        loras=names.loras,
        speculation=speculation_of(config.speculative_config),
    )


def reachable_host(settings: WorkerSettings) -> str:
    """Where others reach this host: as they reach its gRPC."""
    host = urlsplit(f"//{settings.grpc_url}").hostname or "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def admin_url(settings: WorkerSettings, port: int) -> str:
    """Where others reach a worker's admin server; empty without one."""
    if port < 0:
        return ""
    host = reachable_host(settings) if settings.admin_host in _ANY_ADDRESS else settings.admin_host
    return f"http://{host}:{port}"


def _event_sources(events: Any, ranks: tuple[int, ...], host: str, consolidated_port: int) -> tuple[EventSource, ...]:
    """One per data-parallel rank: vLLM adds the rank to the port of a TCP endpoint (`ZmqEventPublisher.offset_endpoint_port`).

    A consolidator has one endpoint for all ranks. Without events of the engine's there is nothing for it to publish.
    """
    if events is None or not events.enable_kv_cache_events or events.publisher != "zmq":
        return ()
    if consolidated_port:
        return tuple(_consolidated(host, consolidated_port, rank, len(ranks)) for rank in ranks)

    def source(rank: int) -> EventSource:
        endpoint, replay = _endpoint(events.endpoint, host, rank), _endpoint(events.replay_endpoint, host, rank)
        return EventSource(dp_rank=rank, endpoint=endpoint, replay_endpoint=replay)

    return tuple(map(source, ranks))


def _consolidated(host: str, port: int, rank: int, ranks: int) -> EventSource:
    replay = f"tcp://{host}:{port + REPLAY_PORT_OFFSET}"
    return EventSource(dp_rank=rank, endpoint=f"tcp://{host}:{port}", replay_endpoint=replay, merged=ranks > 1)


def _endpoint(bound: str | None, host: str, rank: int) -> str:
    """The address to connect to, of one that was bound."""
    if not bound or not bound.startswith("tcp://"):
        return bound or ""
    address, _, port = bound.removeprefix("tcp://").rpartition(":")
    return f"tcp://{host if address in _ANY_ADDRESS else address}:{int(port) + rank}"


class Presence(Protocol):
    """What the host tells of its state, and asks."""

    @property
    def status(self) -> str | None:
        """`registered` or `unregistered`; None without discovery."""

    def follow(self, state: WorkerState) -> None:
        """The worker is in this state from now on. Any thread; returns at once."""

    async def settle(self, state: WorkerState, timeout_s: float) -> bool:
        """Waits until discovery holds this state, which was told last; whether it does. On the event loop."""

    async def leave(self) -> None:
        """Ends the registration, within a bound; repeating it does nothing."""


class Unregistered:
    """Where there is no discovery."""

    status = None

    def follow(self, state: WorkerState) -> None:
        """Nobody wants to know."""

    async def settle(self, state: WorkerState, timeout_s: float) -> bool:
        """Nobody has to be waited for."""
        return True

    async def leave(self) -> None:
        """There is nothing to end."""


class RegisteredPresence:
    """Brings the record in discovery to the worker's state. Made on the event loop."""

    def __init__(self, discovery: Discovery, record: WorkerRecord) -> None:
        self._discovery = discovery
        self._record = record
        self._wanted: workers.WorkerState | None = None
        self._registration: Registration | None = None
        self._failed = 0
        self._leaving = False
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._stepped = asyncio.Condition()
        self._task: asyncio.Task[None] | None = asyncio.create_task(self._run())
        HELD.labels(record.triton_model).set_function(lambda: float(self.status == "registered"))

    @property
    def status(self) -> str:
        """Whether discovery holds the latest record."""
        return "registered" if self._registration is not None and self._registration.held else "unregistered"

    def follow(self, state: WorkerState) -> None:
        """Any thread."""
        self._loop.call_soon_threadsafe(self._want, _STATES.get(state))

    async def settle(self, state: WorkerState, timeout_s: float) -> bool:
        """False also when the store is away: then routers keep the last state that they saw."""
        wanted = _STATES.get(state)
        try:
            async with asyncio.timeout(timeout_s), self._stepped:
                await self._stepped.wait_for(lambda: self._holds(wanted))
        except TimeoutError:
            return False
        return True

    def _holds(self, wanted: workers.WorkerState | None) -> bool:
        held = self._registration
        return held is None if wanted is None else held is not None and held.held and held.record.state is wanted

    def carry(self, loras: tuple[str, ...]) -> None:
        """The adapters that the record lists from now on. On the event loop; returns at once."""
        self._record = msgspec.structs.replace(self._record, loras=loras)
        self._changed.set()

    async def leave(self) -> None:
        """Removes the record and closes discovery."""
        task, self._task = self._task, None
        if task is None:
            return
        # Not cancelled at once: a registration that is just being made would be nobody's, and stay.
        self._leaving = True
        self._want(None)
        await asyncio.wait([task], timeout=_LEAVE_TIMEOUT_S)
        task.cancel()
        try:
            async with asyncio.timeout(_LEAVE_TIMEOUT_S):
                await self._discovery.close()
        except TimeoutError:
            log.warning("discovery.leave_timeout worker=%s: its record ends with its lease", self._record.id)

    async def step(self) -> None:
        """One attempt to bring discovery to the wanted state. Raises UnavailableError."""
        wanted = self._wanted
        if wanted is None:
            if self._registration is not None:
                await self._registration.close()
                self._registration = None
        elif self._registration is None:
            self._registration = await self._discovery.register(msgspec.structs.replace(self._record, state=wanted))
            log.info("discovery.registered worker=%s state=%s", self._record.id, wanted)
        elif self._registration.record != (record := msgspec.structs.replace(self._record, state=wanted)):
            await self._registration.update(record)

    def _want(self, state: workers.WorkerState | None) -> None:
        self._wanted = state
        self._changed.set()

    async def _run(self) -> None:
        while not (self._leaving and self._registration is None):
            await self._changed.wait()
            self._changed.clear()
            try:
                await self.step()
                self._failed = 0
            except UnavailableError as exc:
                self._note(exc)
                self._loop.call_later(_delay_s(self._failed), self._changed.set)
            async with self._stepped:
                self._stepped.notify_all()

    def _note(self, exc: UnavailableError) -> None:
        self._failed += 1
        FAILURES.labels(self._record.triton_model).inc()
        if self._failed == 1:
            log.warning("discovery.unavailable worker=%s error=%s: serving goes on, trying again", self._record.id, exc)


def _delay_s(failures: int) -> float:
    """Doubles from failure to failure; spread, since a whole fleet fails at once."""
    return min(_FIRST_RETRY_S * 2.0 ** min(failures - 1, 10), _LAST_RETRY_S) * random.uniform(0.8, 1.2)  # noqa: S311 - no secret
