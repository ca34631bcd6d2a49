# SPDX-License-Identifier: Apache-2.0
"""The tiers below host memory as vLLM's framework wants them: one dict each, with the class, its module and its arguments."""

from typing import Any

from tandem_kvbm.config import KvbmSettings
from tandem_kvbm.sizing import TierPlan

TierConfig = dict[str, Any]
_DAY_S = 86_400


def secondary_tiers(settings: KvbmSettings, plan: TierPlan | None) -> list[TierConfig]:
    """Disk before objects: the nearer tier is asked first. Without a plan (for names of metrics only) sizes are left out."""
    tiers = []
    if settings.has_disk:
        tiers.append(_disk(settings, plan))
    if settings.object_enabled:
        tiers.append(_objects(settings, plan))
    return tiers


def _disk(settings: KvbmSettings, plan: TierPlan | None) -> TierConfig:
    return {
        "type": "DiskTier", "module_path": "tandem_kvbm.disk.tier",
        "folder": settings.disk_cache_dir,
        "quota_bytes": plan.disk_bytes if plan else 0,
        "direct_io": not settings.disk_disable_o_direct,
        "policy": settings.disk_policy,
        "shared": settings.disk_shared,
        "fdatasync": settings.disk_fdatasync,
        "forget_s": settings.disk_forget_days * _DAY_S,
        "admission_filter": not settings.disable_disk_offload_filter and settings.has_host,
    }


def _objects(settings: KvbmSettings, plan: TierPlan | None) -> TierConfig:
    return {
        "type": "ObjectTier", "module_path": "tandem_kvbm.objects.tier",
        "bucket": settings.object_bucket,
        "endpoint": settings.object_endpoint,
        "region": settings.object_region,
        "access_key": settings.object_access_key,
        "secret_key": settings.object_secret_key,
        "worker_id": settings.worker_id,
        "num_blocks": plan.object_blocks if plan else 0,
    }
