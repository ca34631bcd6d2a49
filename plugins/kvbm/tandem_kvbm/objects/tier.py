# SPDX-License-Identifier: Apache-2.0
"""G4 as a secondary tier of vLLM's offloading framework: `{"type": "ObjectTier", "module_path": "tandem_kvbm.objects.tier", ...}`.

Edge module. The further keys are those of ObjectConfig and TierOptions.
"""

import dataclasses
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingMetricMetadata
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from tandem_kvbm.layout import layout_of
from tandem_kvbm.objects.config import ObjectConfig
from tandem_kvbm.objects.counters import DESCRIPTIONS, PREFIX
from tandem_kvbm.objects.store import ObjectStore
from tandem_kvbm.tier import StoreTier, TierOptions
from tandem_protocol.errors import ConfigError

_JOB_DEADLINE_S = 15.0
"""A request waits for a load at most so long, however many blocks a slow bucket gives one by one."""


class ObjectTier(StoreTier):
    """A tier whose blocks other workers can use."""

    # vLLM would call it the disk, by its medium.
    cache_hit_source = CacheHitSource.EXTERNAL_UNSPECIFIED

    def __init__(self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, backpressure_detector: Any = None,
                 locality: str = "REMOTE", **settings: Any) -> None:  # fmt: skip
        """Raises ConfigError for a key that nobody knows, and for a bucket that can't be used."""
        config, options = split(settings, str(offloading_spec.config.engine_id))
        strides = primary_kv_view.strides
        layout = layout_of(offloading_spec.config, strides[0] if strides else 0)
        store = ObjectStore(config, layout.folder, layout.fingerprint, layout.block_bytes)
        self._told: dict[str, int] = {}
        super().__init__(offloading_spec, primary_kv_view, tier_type, store, backpressure_detector=backpressure_detector,
                         locality=locality, options=options)  # fmt: skip
        self._objects = store

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        """Every tier's, and the bucket's."""
        ours = {PREFIX + count: OffloadingCounterMetadata(text) for count, text in DESCRIPTIONS.items()}
        return {**super().build_metric_definitions(extra_config), **ours}

    def get_stats(self) -> OffloadingConnectorStats | None:
        """Every tier's, and what the bucket's counters grew by."""
        counts = {str(count): amount for count, amount in self._objects.counts().items()}
        grown = {name: amount - self._told.get(name, 0) for name, amount in counts.items() if amount != self._told.get(name, 0)}
        stats = super().get_stats()
        if not grown:
            return stats
        self._told = counts
        stats = stats or OffloadingConnectorStats()
        for name, amount in grown.items():
            stats.increase_counter(PREFIX + name, amount)
        return stats


def split(settings: dict[str, Any], engine_id: str) -> tuple[ObjectConfig, TierOptions]:
    """A tier's keys as what they configure: the store and the tier. Raises ConfigError."""
    ours = {field.name for field in dataclasses.fields(ObjectConfig)}
    tiers = {field.name for field in dataclasses.fields(TierOptions)}
    unknown = sorted(set(settings) - ours - tiers)
    if unknown:
        raise ConfigError(f"object tier: unknown key {unknown[0]!r}; known are {', '.join(sorted(ours | tiers))}")
    given = {name: value for name, value in settings.items() if name in ours}
    config = ObjectConfig(**{**given, "worker_id": given.get("worker_id") or engine_id})
    # As many threads as connections: S3 answers one request after a while, and many at once.
    defaults = {"threads": config.connections, "job_deadline_s": _JOB_DEADLINE_S, "lookup_deadline_s": config.probe_deadline_s}
    return config, TierOptions(**{**defaults, **{name: value for name, value in settings.items() if name in tiers}})
