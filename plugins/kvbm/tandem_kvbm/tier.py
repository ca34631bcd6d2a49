# SPDX-License-Identifier: Apache-2.0
"""A BlockStore as a secondary tier of vLLM's offloading framework. Edge module.

vLLM calls every method on the scheduler's thread, so none of them waits for the store: reads and writes are the transfer threads'
(transfers.py, movement.py), lookups that need I/O the probing thread's (lookups.py). Nothing that a store does reaches the scheduler as an
exception: what can't be read is a miss, what can't be written is dropped, and both are counted.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingEvent,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
    OffloadPolicy,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from tandem_kvbm.announcements import Announcements
from tandem_kvbm.counters import COUNTERS, GAUGES, PREFIX, TierCounters
from tandem_kvbm.lookups import Probes
from tandem_kvbm.movement import Mover
from tandem_kvbm.policies.admission import Admission
from tandem_kvbm.store import BlockStore
from tandem_kvbm.transfers import Job, TransferPool
from tandem_protocol.errors import ConfigError
from tandem_protocol.handoff import KVBM_PRIORITY, KVBM_WORTH

_AVOIDED_KEYS = 100_000
_CLOSE_S = 5.0


@dataclass(frozen=True)
class TierOptions:
    """How a tier works, whatever its store. Raises ConfigError."""

    threads: int = 4
    """Blocks in transfer at once; Dynamo's MAX_CONCURRENT_TRANSFERS."""
    queue_blocks: int = 4096
    """Blocks that may wait to be written; each keeps its place in host memory meanwhile. More are dropped."""
    job_deadline_s: float = 30.0
    """A job that takes longer is reported as failed: a load's request computes its blocks itself, after so much waiting."""
    lookup_deadline_s: float = 1.0
    """How long a request may wait to learn whether the store has its blocks."""
    avoid_s: float = 10.0
    """How long a block whose load failed counts as missing, so that its request isn't sent to it again."""
    kv_events: bool = True
    """Tell what is stored and removed, where vLLM's KV events are on at all."""

    def __post_init__(self) -> None:
        for name in ("threads", "queue_blocks", "job_deadline_s", "lookup_deadline_s", "avoid_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"KV tier: {name} must be positive, not {getattr(self, name)}")


class StoreTier(SecondaryTierManager):  # type: ignore[misc]  # vLLM's classes are Any here
    """The tier over an unopened store, which becomes the tier's own: opened here, closed by `shutdown`.

    `admission` decides what is worth writing; with it, the tier asks vLLM for the blocks of every request, known ones too, since a
    second sight is what admits them. Without it each new block comes once.
    Error handling: the constructor raises ConfigError if the store can't work; no other method raises.
    """

    medium: ClassVar[Medium | None] = Medium.STORAGE

    def __init__(self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, store: BlockStore, *,
                 backpressure_detector: Any = None, locality: str | None = None, options: TierOptions | None = None,
                 admission: Admission | None = None, clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = Locality(locality) if locality is not None else None
        self.store, self.counters = store, TierCounters()
        self._options, self._admission, self._clock = options or TierOptions(), admission, clock
        self._announcements = Announcements(store, self._options.kv_events and offloading_spec.kv_events_config.enable_kv_cache_events)
        self._settled: list[JobResult] = []
        self._avoided: OrderedDict[bytes, float] = OrderedDict()
        self._missed: dict[str, set[bytes]] = {}
        self._offered: dict[str, set[bytes]] = {}
        self._gauges: dict[str, int] = {}
        self._loading: dict[int, tuple[bytes, ...]] = {}
        self._probes: Probes | None = None
        store.open()
        self._rows = primary_kv_view.cast("B")
        mover = Mover(store, self._rows, self.counters, self._announcements)
        self._pool = TransferPool(mover.move, name=f"kvbm-{tier_type}", block_bytes=self.block_size_bytes, threads=self._options.threads,
                                  queue_blocks=self._options.queue_blocks, deadline_s=self._options.job_deadline_s, clock=clock)

    # Lookups.

    def lookup(self, key: bytes, req_context: ReqContext) -> LookupResult:
        """HIT, MISS, or RETRY while the store is being asked."""
        held = self._holds(key, req_context)
        if held is None:
            return LookupResult.RETRY
        if held:
            return LookupResult.HIT
        missed = self._missed.setdefault(req_context.req_id, set())
        if key not in missed:
            missed.add(key)
            self.counters.add("misses")
        return LookupResult.MISS

    def _holds(self, key: bytes, request: ReqContext) -> bool | None:
        if not self.store.ready() or self._pool.stuck() or self._is_avoided(key):
            return False
        held = self.store.holds(key)
        if held is not None:
            return held
        if self._probes is None:
            self._probes = Probes(self.store, self.counters, self.tier_type, self._options.lookup_deadline_s, self._clock)
        return self._probes.ask(key, request)

    def _is_avoided(self, key: bytes) -> bool:
        until = self._avoided.get(key)
        return until is not None and self._clock() < until

    def _avoid(self, keys: Sequence[bytes]) -> None:
        until = self._clock() + self._options.avoid_s
        for key in keys:
            self._avoided.pop(key, None)
            self._avoided[key] = until
        while self._avoided and (len(self._avoided) > _AVOIDED_KEYS or next(iter(self._avoided.values())) <= self._clock()):
            self._avoided.popitem(last=False)
        if self._probes is not None:
            self._probes.mark_miss(keys)

    # Jobs.

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Queues the blocks for reading."""
        keys = tuple(job_metadata.keys)
        self.counters.add("hits", len(keys))
        self.store.touch(keys)
        self._loading[job_metadata.job_id] = keys
        self._pool.submit_load(job_metadata.job_id, [(key, int(row)) for key, row in zip(keys, job_metadata.chunk_ids, strict=True)])

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Queues the blocks that the store lacks and that are worth it, as far as there is room."""
        offers = zip(job_metadata.keys, job_metadata.chunk_ids, strict=True)
        blocks = [(key, int(row)) for key, row in offers if self._is_wanted(key, job_metadata.req_context.req_id)]
        taken = 0
        if blocks and self.store.ready() and not self._pool.stuck():
            taken = self._pool.submit_store(job_metadata.job_id, blocks, priority_of(job_metadata.req_context))
        self.counters.add("dropped", len(blocks) - taken)
        if not taken:
            self._settled.append(JobResult(job_metadata.job_id, success=not blocks, transfer_time=0.0, transfer_bytes=0))

    def _is_wanted(self, key: bytes, request_id: str) -> bool:
        if self.store.holds(key):
            self.store.touch((key,))
            return False
        if self._admission is None or self._is_admitted(self._admission, key, request_id):
            return True
        self.counters.add("filtered")
        return False

    def _is_admitted(self, admission: Admission, key: bytes, request_id: str) -> bool:
        """A block that one request offers twice was seen once."""
        offered = self._offered.setdefault(request_id, set())
        if key in offered:
            return admission.admits(key)
        offered.add(key)
        return admission.sees(key)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """What has ended since the last call. A job past its deadline has ended, too."""
        results, self._settled = self._settled, []
        results.extend(self._result(job) for job in self._pool.finished())
        return results

    def _result(self, job: Job) -> JobResult:
        moved = tuple(job.moved)
        took_s, size = job.finished_s - job.submitted_s, len(moved) * self.block_size_bytes
        if not job.is_load:
            self.counters.add("expired_stores", job.expired)
            for key in moved:  # written anew, the block is as good as any
                self._avoided.pop(key, None)
            return JobResult(job.id, success=not job.expired, transfer_time=took_s, transfer_bytes=size)
        self.counters.add("expired_loads", job.expired)
        arrived = set(moved)
        failed = [key for key in self._loading.pop(job.id) if key not in arrived]
        self._avoid(failed)
        return JobResult(job.id, success=not failed, successful_keys=moved if failed else None, transfer_time=took_s, transfer_bytes=size)

    def has_pending_work(self) -> bool:
        """Events that wait for a step to be taken; vLLM knows of the jobs itself."""
        return self._announcements.waiting or self._pool.active > 0

    def drain_jobs(self) -> None:
        """Waits for all jobs, at most until their deadline."""
        self._pool.drain(self._options.job_deadline_s)

    # Events and metrics.

    def take_events(self) -> Iterable[OffloadingEvent]:
        """What came and went since the last call."""
        came, went = self._announcements.take()
        return [self._event(keys, removed) for keys, removed in ((came, False), (went, True)) if keys]

    def _event(self, keys: list[bytes], removed: bool) -> OffloadingEvent:
        return OffloadingEvent(keys=keys, medium=Medium.STORAGE, removed=removed, locality=self.locality, ownership=self.tier_type,
                               removal_expected=not removed)

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        """Counters and gauges, labelled by tier; the same for every tier over a store."""
        counters = {PREFIX + name: OffloadingCounterMetadata(text, labelnames=("tier",)) for name, text in COUNTERS.items()}
        gauges = {PREFIX + name: OffloadingGaugeMetadata(text, labelnames=("tier",)) for name, text in GAUGES.items()}
        return counters | gauges

    def get_stats(self) -> OffloadingConnectorStats | None:
        """Counts since the last call, and what the tier holds where that changed."""
        stats = OffloadingConnectorStats()
        for name, count in self.counters.take().items():
            stats.increase_counter(PREFIX + name, count, (self.tier_type,))
        held = self.store.stats()
        gauges = {"blocks": held.blocks, "used_bytes": held.size_bytes, "capacity_bytes": held.capacity_bytes or 0}
        for name, value in gauges.items():
            if self._gauges.get(name) != value:
                stats.set_gauge(PREFIX + name, value, (self.tier_type,))
        self._gauges = gauges
        return None if stats.is_empty() else stats

    # Requests and the tier's life.

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """With an admission filter, all blocks of the request are offered, known ones too."""
        return RequestOffloadingContext(OffloadPolicy.CHUNK_LEVEL if self._admission is None else OffloadPolicy.REQUEST_LEVEL)

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Forgets the request."""
        self._missed.pop(req_context.req_id, None)
        self._offered.pop(req_context.req_id, None)
        if self._probes is not None:
            self._probes.cleanup(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Sends this step's questions to the store as one."""
        if self._probes is not None:
            self._probes.flush()

    def touch(self, keys: Collection[bytes], req_context: ReqContext) -> None:
        """Passes it on to the store."""
        self.store.touch(tuple(keys))

    def reset(self) -> int:
        """Empties the store, for an operator: blocks until that is done. Returns how many blocks went."""
        self.drain_jobs()
        keys = self.store.clear()
        self._announcements.note(keys, there=False)
        return len(keys)

    def shutdown(self) -> None:
        """Lets writes go on for a moment, then ends everything."""
        self._pool.drain(min(_CLOSE_S, self._options.job_deadline_s))
        self._pool.close()
        if self._probes is not None:
            self._probes.shutdown()
        self.store.close()
        self._rows.release()


def priority_of(request: ReqContext) -> int:
    """What the request says of its blocks' worth, within bounds; 0 if it says nothing that is an integer."""
    priority = (request.kv_transfer_params or {}).get(KVBM_PRIORITY, 0)
    return max(-KVBM_WORTH, min(KVBM_WORTH, priority)) if isinstance(priority, int) else 0
