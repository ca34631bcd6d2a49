# SPDX-License-Identifier: Apache-2.0
"""KVBM's metrics, with Dynamo's names, out through vLLM's own path: scheduler -> stub -> the worker's `/metrics`. Edge module.

All are gauges for Prometheus, also those that only grow: its Python client would add `_total` to the name of a counter, and
dashboards made for Dynamo ask for the bare name. `rate()` works on both.
"""

from collections.abc import Mapping

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import LookupResult, OffloadingGaugeMetadata, OffloadingMetricMetadata, ReqContext
from vllm.v1.kv_offload.tiering.base import JobResult, TieringOffloadingMetrics
from vllm.v1.kv_offload.tiering.metrics import PRIMARY_TIER_LABEL, TieringMetricsTracker

from tandem_kvbm.stats import KvbmStats, Level

PREFIX = "kvbm_"
METRICS = {
    "matched_tokens": "Prompt tokens whose KV came from the host tier instead of being computed.",
    "offload_blocks_d2h": "Blocks copied from the device to the host tier.",
    "offload_blocks_h2d": "Blocks written from the host tier to the disk tier.",
    "offload_blocks_d2o": "Blocks written to the object tier; they pass through the host tier.",
    "onboard_blocks_h2d": "Blocks copied from the host tier to the device.",
    "onboard_blocks_d2d": "Blocks read from the disk tier; they pass through the host tier.",
    "onboard_blocks_o2d": "Blocks read from the object tier; they pass through the host tier.",
    "host_cache_hit_rate": "Blocks found in the host tier among those asked for, over the last requests (0 to 1).",
    "disk_cache_hit_rate": "Blocks found in the disk tier among those asked for, over the last requests (0 to 1).",
    "object_cache_hit_rate": "Blocks found in the object tier among those asked for, over the last requests (0 to 1).",
    "object_read_failures": "Blocks that could not be read from the object tier.",
    "object_write_failures": "Writes of a batch of blocks to the object tier that failed.",
    "host_blocks": "Blocks that the host tier has room for.",
    "host_blocks_used": "Blocks in the host tier.",
}


def definitions() -> dict[str, OffloadingMetricMetadata]:
    """What vLLM must know of our metrics before it can show them."""
    return {f"{PREFIX}{name}": OffloadingGaugeMetadata(documentation=text) for name, text in METRICS.items()}


class MetricsFeed:
    """Hands values to vLLM when they have changed: it sends what it gets to the stub at every engine step."""

    def __init__(self) -> None:
        self._sent: dict[str, float] = {}

    def changes(self, values: Mapping[str, float]) -> OffloadingConnectorStats | None:
        """vLLM's payload with what changed since the last call; None if nothing did."""
        changed = {name: value for name, value in values.items() if self._sent.get(name) != value}
        if not changed:
            return None
        self._sent.update(changed)
        payload = OffloadingConnectorStats()
        for name, value in changed.items():
            payload.set_gauge(f"{PREFIX}{name}", value)
        return payload


class CountingTracker(TieringMetricsTracker):  # type: ignore[misc]  # vLLM's classes are Any here
    """vLLM's own tracker of lookups and jobs, which also tells KvbmStats."""

    def __init__(self, stats: KvbmStats, levels: tuple[Level, ...], tier_types: list[str], primary_blocks: int, block_bytes: int) -> None:
        super().__init__(tier_types=tier_types, num_primary_chunks=primary_blocks, primary_chunk_size=block_bytes)
        self._kvbm = stats
        self._block_bytes = block_bytes
        self._levels = levels
        self._host_hits = 0
        self._by_label = {PRIMARY_TIER_LABEL: Level.HOST, **{self.tier_label(i): level for i, level in enumerate(levels)}}

    def on_lookup(self, req_context: ReqContext, key: bytes, tier_label: tuple[str], result: LookupResult, lookup_duration: float) -> None:
        """Retries are no answer yet; a block on its way is a hit of the tier that it comes from, not of the host."""
        super().on_lookup(req_context, key, tier_label, result, lookup_duration)
        if result in (LookupResult.HIT, LookupResult.MISS):
            self._kvbm.on_lookup(req_context.req_id, self._by_label[tier_label], key, result is LookupResult.HIT)

    def on_host_hit(self, req_context: ReqContext, key: bytes) -> None:
        """A block of the host tier; the first time that its request asks, as with every tier."""
        if self._kvbm.on_lookup(req_context.req_id, Level.HOST, key, True):
            self._host_hits += 1

    def take_stats(self) -> OffloadingConnectorStats | None:
        """vLLM's counts since the last call, with the host tier's hits."""
        if self._host_hits:
            for name in (TieringOffloadingMetrics.CHUNK_QUERIES, TieringOffloadingMetrics.CHUNK_HITS):
                self._stats.increase_counter(name, self._host_hits, PRIMARY_TIER_LABEL)
            self._host_hits = 0
        return super().take_stats()

    def on_request_allocated(self, req_context: ReqContext) -> None:
        """The request is scheduled, so it has all the answers that it will use."""
        super().on_request_allocated(req_context)
        self._kvbm.on_scheduled(req_context.req_id)

    def on_request_finished(self, req_context: ReqContext) -> None:
        """A request that is preempted asks again, which is not to be counted; and one may end unscheduled."""
        super().on_request_finished(req_context)
        self._kvbm.on_request_end(req_context.req_id)

    def on_job_finished(self, job_metadata: object, result: JobResult) -> None:
        """Counts blocks, not jobs."""
        super().on_job_finished(job_metadata, result)
        job, level = job_metadata.transfer_job, self._levels[job_metadata.tier_idx]  # type: ignore[attr-defined]
        if job.is_promotion:
            good = len(job.keys) if result.success else len(result.successful_keys or ())
            self._kvbm.on_onboarded(level, good)
            self._kvbm.on_read_failures(level, len(job.keys) - good)
            return
        written = len(job.keys) if result.transfer_bytes is None else result.transfer_bytes // self._block_bytes
        self._kvbm.on_offloaded(level, written if result.success else 0)
        if not result.success:
            self._kvbm.on_write_failure(level)
