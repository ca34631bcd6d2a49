# SPDX-License-Identifier: Apache-2.0
"""What an operator may ask of the tiers of a running engine: a status, and the reset of one tier. Edge module.

The tiers live in the scheduler's process, on its thread. vLLM's clients can call any method of EngineCore by name, between two steps
and also while the engine is idle (`call_utility_async`), so the spec gives EngineCore one more. Nothing else gets there: a collective
call reaches the worker ranks only, and `reset_prefix_cache(reset_connector=True)` empties the device's cache along with the host's.

Answers are plain dicts, since that is what vLLM carries between its processes.
"""

import time
from typing import Any

from vllm.distributed.kv_events import KVEventBatch
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector

from tandem_kvbm.manager import KvbmManager
from tandem_kvbm.stats import Level

METHOD = "tandem_kvbm"
"""Name of the method; the worker calls it by this name."""


def install() -> None:
    """Gives this process's EngineCore the method; a second call changes nothing."""
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, METHOD, serve)


def serve(core: Any, command: str, tier: str) -> dict[str, Any]:
    """`status`, or `reset` of a tier (G1 to G4). Raises ValueError for anything else, which vLLM hands to the caller."""
    connector, manager = _find(core)
    if command == "status":
        return status(core, manager)
    if command == "reset":
        done = _reset(core, connector, manager, Level(tier))
        _publish(core.scheduler)
        return {"tier": tier, **done}
    raise ValueError(f"unknown command {command!r}: status or reset")


def status(core: Any, manager: KvbmManager) -> dict[str, Any]:
    """Sizes, use and hit rates of every tier."""
    pool = core.scheduler.kv_cache_manager.block_pool
    device = {"tier": Level.DEVICE.value, "blocks": pool.num_gpu_blocks, "used_blocks": pool.num_gpu_blocks - pool.get_num_free_blocks()}
    plan, stats = manager.plan, manager.stats
    tiers = [device, {**_counted(manager, Level.HOST), "blocks": plan.host_blocks, "used_blocks": manager.host_blocks_used,
                      "size_bytes": plan.host_bytes, "staging": plan.staging}]
    for level, tier in zip(manager.levels, manager.secondary_tiers, strict=True):
        held = tier.store.stats()
        tiers.append({**_counted(manager, level), "used_blocks": held.blocks, "used_bytes": held.size_bytes,
                      "size_bytes": held.capacity_bytes})
    return {"block_bytes": plan.block_bytes, "matched_tokens": stats.matched_tokens, "requests": stats.requests, "tiers": tiers}


def _counted(manager: KvbmManager, level: Level) -> dict[str, Any]:
    tier = manager.stats.tiers[level]
    return {"tier": level.value, "hit_rate": manager.stats.windows[level].rate, "offloaded_blocks": tier.offloaded_blocks,
            "onboarded_blocks": tier.onboarded_blocks, "read_failures": tier.read_failures, "write_failures": tier.write_failures}


def _reset(core: Any, connector: OffloadingConnector, manager: KvbmManager, level: Level) -> dict[str, Any]:
    """What the reset did. The device's cache refuses while requests use it; the others don't."""
    if level is Level.DEVICE:
        return {"reset": bool(core.reset_prefix_cache(False, False))}
    if level is Level.HOST:
        blocks = manager.host_blocks_used
        connector.reset_cache()
        return {"reset": True, "blocks": blocks}
    for own, tier in zip(manager.levels, manager.secondary_tiers, strict=True):
        if own is level:
            return {"reset": True, "blocks": tier.reset()}
    raise ValueError(f"this engine has no tier {level}")


def _publish(scheduler: Any) -> None:
    """Tells the KV events that wait. vLLM does so after a step, but an idle engine makes none, and routers would go on believing."""
    events = [*(scheduler.kv_cache_manager.take_events() or ()), *(scheduler.connector.take_events() or ())]
    if events:
        scheduler.kv_event_publisher.publish(KVEventBatch(ts=time.time(), events=events))


def _find(core: Any) -> tuple[OffloadingConnector, KvbmManager]:
    """Our connector, alone or as a child of vLLM's MultiConnector."""
    connector = core.scheduler.connector
    for child in getattr(connector, "_connectors", [connector]):
        if isinstance(child, OffloadingConnector) and isinstance(child.scheduler.manager, KvbmManager):
            return child, child.scheduler.manager
    raise ValueError("this engine has no KV block tiers")
