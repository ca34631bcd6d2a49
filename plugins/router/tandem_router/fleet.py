# SPDX-License-Identifier: Apache-2.0
"""The workers that a router knows: followed in discovery, checked when they join, given to placement, fed into the index.

Runs on the router's event loop. A worker joins placement only when the router has seen its own block keys come back in the
worker's KV events (`probe`): a KV router that runs blind is an error, not a slow mode.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field

from tandem_protocol.discovery import Discovery
from tandem_protocol.roles import Role
from tandem_protocol.workers import WorkerRecord
from tandem_router.book_events import Publisher, publish_nothing
from tandem_router.config import RouterSettings
from tandem_router.feed import EventFeed
from tandem_router.index import KvIndex
from tandem_router.placement import Placement
from tandem_router.pool import dp_ranks

log = logging.getLogger(__name__)

Probe = Callable[[WorkerRecord], Awaitable[str]]
"""Checks a worker that joined; the reason to refuse it, or an empty string."""
_RETRY_S = 1.0
_PROBE_AGAIN_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""A server opens its ports only when all its models are loaded, which is after its first workers registered."""


@dataclass
class _Member:
    """A worker of our model."""

    record: WorkerRecord
    verified: bool = False
    refused: str = ""
    check: asyncio.Task[None] | None = field(default=None, repr=False)


class Fleet:
    """Follows discovery until `close`."""

    def __init__(self, settings: RouterSettings, discovery: Discovery, index: KvIndex, feed: EventFeed | None, *, replica: str = "",
                 publish: Publisher = publish_nothing, remembered: frozenset[str] = frozenset()) -> None:
        """`replica` and `publish` as for `Placement`; `remembered` are workers that the index knows from a snapshot."""
        self.pools = {role: Placement(settings, role, index, replica=replica, publish=publish) for role in Role}
        self.changed = asyncio.Event()
        self._settings, self._discovery, self._index, self._feed = settings, discovery, index, feed
        self._probe: Probe | None = None
        self._members: dict[str, _Member] = {}
        self._model = settings.model
        self._remembered = remembered
        self._watch: asyncio.Task[None] | None = None

    @property
    def generating(self) -> Placement:
        """Decode workers while there are any, else the aggregated ones."""
        decode, aggregated = self.pools[Role.DECODE], self.pools[Role.AGGREGATED]
        return decode if decode.workers or not aggregated.workers else aggregated

    @property
    def prefill(self) -> Placement | None:
        """Prefill workers, or None while there are none."""
        pool = self.pools[Role.PREFILL]
        return pool if pool.workers else None

    @property
    def encode(self) -> Placement | None:
        """Encode workers, or None while there are none."""
        pool = self.pools[Role.ENCODE]
        return pool if pool.workers else None

    @property
    def model(self) -> str:
        """The model that is served; empty before the first worker if the settings leave it open."""
        return self._model

    @property
    def members(self) -> tuple[tuple[WorkerRecord, str], ...]:
        """Every worker of our model that discovery lists, with the reason why placement leaves it out, if it does."""
        return tuple((member.record, self._why_out(member)) for _, member in sorted(self._members.items()))

    def start(self, probe: Probe) -> None:
        """Begins to follow discovery."""
        self._probe = probe
        self._watch = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Ends all tasks."""
        tasks = [task for task in (self._watch, *(member.check for member in self._members.values())) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            try:
                async for snapshot in self._discovery.watch():
                    self.apply(snapshot.records, current=snapshot.current)
            except Exception:  # the view that we have stays valid; discovery is asked again
                log.exception("fleet.watch_failed")
            await asyncio.sleep(_RETRY_S)

    def apply(self, records: tuple[WorkerRecord, ...], *, current: bool = True) -> None:
        """Takes the fleet as discovery has it now; not `current`: as it had it."""
        ours = {record.id: record for record in records if self._is_ours(record)}
        if current:
            self._forget_absent(ours.keys())
        for worker_id in self._members.keys() - ours.keys():
            self._leave(self._members.pop(worker_id))
        for worker_id, record in ours.items():
            if worker_id not in self._members:
                self._members[worker_id] = _Member(record, verified=not self._needs_check(record))
                self._follow_events(record)
            member = self._members[worker_id]
            member.record = record
            self._check_if_due(member)
        self._place()

    def _forget_absent(self, present: Collection[str]) -> None:
        """What a snapshot told of workers that are gone, once."""
        for worker_id in self._remembered.difference(present):
            log.info("fleet.worker_gone %s", worker_id)
            if self._feed is not None:
                self._feed.remove(worker_id)
            self._index.remove_worker(worker_id)
        self._remembered = frozenset()

    def _is_ours(self, record: WorkerRecord) -> bool:
        if record.role is Role.OMNI:
            return False  # its tensors are others, and nothing of its prompts is known
        if not self._model:
            self._model = record.model
            self.changed.set()
            log.info("fleet.model %s", record.model)
        return record.model == self._model

    def _needs_check(self, record: WorkerRecord) -> bool:
        return self._feed is not None and bool(record.event_sources)

    def _follow_events(self, record: WorkerRecord) -> None:
        if self._feed is None:
            return
        for source in record.event_sources:
            blocks = record.total_blocks // len(dp_ranks(record))
            self._feed.add(record.id, source, self._index.add_worker(record.id, source.dp_rank, record.block_size, blocks))

    def _check_if_due(self, member: _Member) -> None:
        if member.verified or member.check is not None or not member.record.placeable:
            return
        member.check = asyncio.create_task(self._verify(member))

    async def _verify(self, member: _Member) -> None:
        """Probes until the worker passes: what refused it may be mended, and a lost probe must not shut it out for good."""
        assert self._probe is not None
        pauses = itertools.chain(_PROBE_AGAIN_S, itertools.repeat(_PROBE_AGAIN_S[-1]))
        while not member.verified:
            member.refused = await self._probe(member.record)
            if not member.refused:
                member.verified = True
                log.info("fleet.worker_joined %s", member.record.id)
                self._place()
            else:
                log.error("fleet.worker_refused %s: %s", member.record.id, member.refused)
                await asyncio.sleep(next(pauses))

    def _leave(self, member: _Member) -> None:
        log.info("fleet.worker_left %s", member.record.id)
        if member.check is not None:
            member.check.cancel()
        if self._feed is not None:
            self._feed.remove(member.record.id)
        self._index.remove_worker(member.record.id)

    def _place(self) -> None:
        verified = [member.record for member in self._members.values() if member.verified]
        for pool in self.pools.values():
            pool.set_workers(verified)
        self.changed.set()

    def _why_out(self, member: _Member) -> str:
        if member.refused:
            return member.refused
        if not member.verified:
            return "its KV events are being checked"
        return "" if member.record.placeable else f"it is {member.record.state}"
