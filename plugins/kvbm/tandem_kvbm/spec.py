# SPDX-License-Identifier: Apache-2.0
"""KvbmSpec: Tandem's settings as a specification of vLLM's offloading framework. Edge module.

vLLM builds one in the scheduler's process (`get_manager`) and one per worker rank (`get_worker`), each from the same settings.
`OffloadingConnector` finds it by `spec_name` and `spec_module_path`.
"""

import dataclasses
import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingManager, OffloadingMetricMetadata, OffloadingWorker
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from tandem_kvbm import control
from tandem_kvbm.checks import bounded, check_disk, check_host_memory, folder_bytes
from tandem_kvbm.config import KvbmSettings, ignored_variables, load_settings
from tandem_kvbm.cpu_worker import HostCopyWorker
from tandem_kvbm.manager import LEVELS, KvbmManager
from tandem_kvbm.metrics import definitions
from tandem_kvbm.sizing import TierPlan, padded_block_bytes, plan_tiers
from tandem_kvbm.stats import KvbmStats, Level
from tandem_kvbm.tiers import secondary_tiers
from tandem_protocol.errors import ConfigError

log = logging.getLogger(__name__)

DISK_FOLDER = "tandem-kv"
"""Below `disk_cache_dir`: what the disk tiers of this host hold already (tandem_kvbm.disk.seat)."""


class KvbmSpec(TieringOffloadingSpec):  # type: ignore[misc]  # vLLM's classes are Any here
    """vLLM's tiering spec, configured by KvbmSettings, with a copy worker for the CPU platform."""

    def __init__(self, config: OffloadingConfig) -> None:
        self.settings = _of_rank(load_settings(config.extra_config), config)
        self.plan = plan_tiers(self.settings, block_bytes(config))
        super().__init__(dataclasses.replace(config, extra_config=translate(config.extra_config, self.settings, self.plan)))
        self._manager: KvbmManager | None = None
        self._worker: OffloadingWorker | None = None
        if config.canonical_layout and current_platform.is_cpu():
            raise ConfigError("canonical_layout needs a GPU: remove it from kv_connector_extra_config on the CPU")

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        """vLLM's metrics, those of our tiers, and Dynamo's."""
        settings = load_settings(extra_config)
        tiers = secondary_tiers(settings, None)
        return {**super().build_metric_definitions({**extra_config, "secondary_tiers": tiers}), **definitions()}

    def get_manager(self) -> OffloadingManager:
        """The scheduler's side; built once. Raises ConfigError with the fix if a tier can't work."""
        if self._manager is None:
            for name, reason in ignored_variables().items():
                log.warning("kvbm.ignored variable=%s reason=%s", name, reason)
            with bounded("setting up the KV tiers", self.settings.leader_worker_init_timeout_s, _end_process):
                self._manager = self._build_manager()
            control.install()
        return self._manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """A rank's side; built once."""
        if self._worker is None:
            with bounded("mapping the host tier", self.settings.leader_worker_init_timeout_s, _end_process):
                self._check_host_memory()
                self._worker = self._host_copy_worker(kv_caches) if current_platform.is_cpu() else self._device_worker(kv_caches)
        return self._worker

    def _device_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """vLLM's, which copies on streams of its own; on CUDA with the faster way to move pages."""
        worker = self.create_worker(kv_caches)
        if current_platform.is_cuda():
            from tandem_kvbm.cuda_copies import choose_copies  # compiled for CUDA only

            choose_copies(worker, self.settings.copy_method)
        return worker

    def _build_manager(self) -> KvbmManager:
        self._check_host_memory()
        if self.plan.disk_bytes is not None:
            folder = Path(self.settings.disk_cache_dir)
            check_disk(folder, self.plan.disk_bytes, folder_bytes(folder, DISK_FOLDER))
        tiers: list[Any] = []
        with ExitStack() as undo:
            region = self._region(rank=None)
            undo.callback(region.cleanup)
            primary = CPUPrimaryTierOffloadingManager(
                num_chunks=self.num_chunks, cache_policy=self.eviction_policy, cache_policy_module_path=self.cache_policy_module_path,
                enable_events=self.kv_events_config.enable_kv_cache_events, mmap_region=region,
            )
            view = primary.get_kv_memoryview()
            undo.callback(view.release)
            for config in self.secondary_tier_configs:
                tiers.append(SecondaryTierFactory.create_secondary_tier(config, view, self))
                undo.callback(tiers[-1].shutdown)
            levels = (Level.HOST, *(LEVELS[tier.tier_type] for tier in tiers))
            stats = KvbmStats(levels, self.tokens_per_block[0] * self.blocks_per_chunk, self.settings.cache_stats_max_requests)
            manager = KvbmManager(primary, tiers, self.plan, stats, self.settings.cache_stats_log_interval_s)
            undo.pop_all()
        log.info("kvbm.ready host_blocks=%d staging=%s disk_blocks=%s object_blocks=%s block_bytes=%d", self.plan.host_blocks,
                 self.plan.staging, self.plan.disk_blocks, self.plan.object_blocks, self.plan.block_bytes)
        return manager

    def _host_copy_worker(self, kv_caches: CanonicalKVCaches) -> HostCopyWorker:
        region = self._region(rank=0 if self.replicated_layout else self.config.parallel.rank)
        with ExitStack() as undo:
            undo.callback(region.cleanup)
            worker = HostCopyWorker(kv_caches, self.blocks_per_chunk, region)
            undo.pop_all()
        return worker

    def _region(self, rank: int | None) -> SharedOffloadRegion:
        return SharedOffloadRegion(engine_id=self._engine_id, num_chunks=self.num_chunks, rank=rank,
                                   kv_bytes_per_chunk=self.kv_bytes_per_chunk, cpu_page_size=self.cpu_page_size_per_worker)

    def _check_host_memory(self) -> None:
        """Only whoever comes first: afterwards the tier itself is what /dev/shm is short of."""
        if not Path(f"/dev/shm/vllm_offload_{self._engine_id}.mmap").exists():  # noqa: S108 - where vLLM puts it
            check_host_memory(self.plan.host_bytes)


def block_bytes(config: OffloadingConfig) -> int:
    """Bytes of one offloaded block over all ranks, as vLLM's spec will compute them."""
    copies = 1 if config.replicated_layout else config.parallel.world_size
    return padded_block_bytes(config.worker_kv_bytes_per_block, copies, config.cache.blocks_per_chunk)


def _of_rank(settings: KvbmSettings, config: OffloadingConfig) -> KvbmSettings:
    """Data-parallel ranks are engines of their own: each keeps its own account of what it wrote."""
    if not settings.worker_id or config.parallel.data_parallel_size == 1:
        return settings
    return dataclasses.replace(settings, worker_id=f"{settings.worker_id}-dp{config.parallel.data_parallel_index}")


def translate(extra_config: Any, settings: KvbmSettings, plan: TierPlan) -> dict[str, Any]:
    """Settings as the keys that vLLM's framework reads. What stands in `extra_config` already wins, except the tiers."""
    policy, _, name = settings.host_policy.partition(":")
    ours: dict[str, Any] = {
        "eviction_policy": name or policy,
        "offload_prompt_only": not settings.offload_decode_blocks,
        # Events that name tokens and parent, so that a router can place by what lies in host memory and storage.
        "self_describing_kv_events": True,
    }
    if name:
        ours["cache_policy_module_path"] = policy
    return {**ours, **extra_config, "cpu_bytes_to_use": plan.host_bytes, "secondary_tiers": secondary_tiers(settings, plan)}


def _end_process(sentence: str) -> None:
    log.error("kvbm.init_timeout %s", sentence)
    os._exit(1)
