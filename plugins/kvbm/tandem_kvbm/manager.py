# SPDX-License-Identifier: Apache-2.0
"""vLLM's manager of tiers, in the scheduler's process, with what it lacks: counters, one status, the removal events of a reset.

Edge module. Everything runs on the scheduler's thread.
"""

import logging
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from vllm.v1.kv_offload.base import LookupResult, Medium, OffloadingEvent, ReqContext
from vllm.v1.kv_offload.tiering.base import SecondaryTierManager
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager, TieringOffloadingManager

from tandem_kvbm.metrics import CountingTracker, MetricsFeed
from tandem_kvbm.sizing import TierPlan
from tandem_kvbm.stats import HIT_RATE, KvbmStats, Level

log = logging.getLogger(__name__)

OFFERED_PER_STEP = 64
"""Known blocks that one request offers to the tiers below in one engine step. A long prompt has thousands, and its first token waits
for the step in which they are offered."""
LEVELS = {"DiskTier": Level.DISK, "ObjectTier": Level.OBJECT}
"""Class name of a tier -> its level; tiers of others count as storage of the disk's level."""


class KvbmManager(TieringOffloadingManager):  # type: ignore[misc]  # vLLM's classes are Any here
    """Host tier and the tiers below it, of one engine. `shutdown` (vLLM's) closes the tiers, then the host tier."""

    def __init__(self, primary: CPUPrimaryTierOffloadingManager, tiers: list[SecondaryTierManager], plan: TierPlan, stats: KvbmStats,
                 log_interval_s: float) -> None:
        super().__init__(primary_tier=primary, secondary_tiers=tiers)
        self.plan = plan
        self.stats = stats
        self.levels = tuple(LEVELS.get(tier.tier_type, Level.DISK) for tier in tiers)
        self._metrics = CountingTracker(stats, self.levels, [tier.tier_type for tier in tiers], plan.host_blocks, plan.block_bytes)
        self._feed = MetricsFeed()
        self._announced: set[bytes] = set()
        """Blocks of the host tier that events have told of; none where events are off."""
        self._owed: list[OffloadingEvent] = []
        self._log_interval_s = log_interval_s
        self._logged_at = time.monotonic()
        self._logged_requests = 0

    @property
    def host_blocks_used(self) -> int:
        """Blocks that the host tier holds or is being given."""
        return int(self.plan.host_blocks - self.primary_tier._get_num_free_chunks())  # noqa: SLF001 - vLLM offers no other way

    def lookup(self, key: bytes, req_context: ReqContext, *, exclude_tier_idx: int | None = None) -> LookupResult:
        """As vLLM's. The host tier's own blocks, thousands for a long prompt and asked for anew in each step that waits, are answered
        without vLLM's clock around each: it costs several times the answer."""
        self._maybe_process_finished_jobs()
        found: LookupResult = self.primary_tier.lookup(key, req_context)
        if found is LookupResult.HIT:
            self._metrics.on_host_hit(req_context, key)
        if found in (LookupResult.HIT, LookupResult.HIT_PENDING):
            return found
        result: LookupResult = super().lookup(key, req_context, exclude_tier_idx=exclude_tier_idx)
        return result

    def _cascade_existing_chunks_to_request_level_tiers(self, keys: Sequence[bytes], req_context: ReqContext,
                                                        request_level_tiers: set[int]) -> None:
        """Offers some, and leaves the rest to the steps to come: vLLM parks keys for its own reasons, and takes them up at each step."""
        super()._cascade_existing_chunks_to_request_level_tiers(keys[:OFFERED_PER_STEP], req_context, request_level_tiers)
        self._req_state[req_context.req_id].pending_cascade_keys.extend(keys[OFFERED_PER_STEP:])

    def complete_load(self, keys: Collection[bytes], req_context: ReqContext) -> None:
        """Blocks reached the device."""
        super().complete_load(keys, req_context)
        self.stats.on_onboarded(Level.HOST, len(keys))

    def complete_store(self, keys: Collection[bytes], req_context: ReqContext, success: bool = True) -> None:
        """Blocks reached the host tier, and go on to the tiers below."""
        super().complete_store(keys, req_context, success)
        if success:
            self.stats.on_offloaded(Level.HOST, len(keys))

    def take_events(self) -> Iterable[OffloadingEvent]:
        """vLLM's events, and the removals that a reset of the host tier owes to those who were told of its blocks."""
        yield from self._owed
        self._owed.clear()
        for event in super().take_events():
            self._note(event)
            yield event

    def reset_cache(self) -> None:
        """Empties the host tier; the tiers below keep theirs."""
        # What was not told yet of the host tier need not be told any more; what was is taken back.
        self._owed += [event for event in super().take_events() if event.medium is not Medium.CPU]
        super().reset_cache()
        if self._announced:
            self._owed.append(OffloadingEvent(keys=list(self._announced), medium=Medium.CPU, removed=True))
            self._announced.clear()

    def get_stats(self) -> Any:
        """vLLM's payload of metrics since the last call, with ours."""
        self._maybe_log()
        theirs = super().get_stats()
        ours = self._feed.changes(self.values())
        if ours is None:
            return theirs
        return ours if theirs is None else ours.aggregate(theirs)

    def values(self) -> dict[str, float]:
        """Our metrics, without prefix."""
        return {**self.stats.values(), "host_blocks": self.plan.host_blocks, "host_blocks_used": self.host_blocks_used}

    def _note(self, event: OffloadingEvent) -> None:
        if event.medium is Medium.CPU:
            (self._announced.difference_update if event.removed else self._announced.update)(event.keys)

    def _maybe_log(self) -> None:
        now = time.monotonic()
        if not self._log_interval_s or now - self._logged_at < self._log_interval_s or self.stats.requests == self._logged_requests:
            return
        self._logged_at, self._logged_requests = now, self.stats.requests
        rates = " ".join(f"{HIT_RATE[level]}={window.rate:.3f}" for level, window in self.stats.windows.items())
        log.info("kvbm.stats requests=%d matched_tokens=%d host_blocks_used=%d %s", self.stats.requests, self.stats.matched_tokens,
                 self.host_blocks_used, rates)
