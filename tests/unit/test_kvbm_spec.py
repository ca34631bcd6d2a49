# SPDX-License-Identifier: Apache-2.0
"""KvbmSpec: settings to vLLM's tiering, the manager's counters and events, the control of a running engine."""

import dataclasses
import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector  # noqa: E402
from vllm.v1.kv_offload.base import (  # noqa: E402
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
    LookupResult,
    Medium,
    OffloadingEvent,
    ReqContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.config import (  # noqa: E402
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.base import TieringOffloadingMetrics  # noqa: E402
from vllm.v1.kv_offload.tiering.metrics import PRIMARY_TIER_LABEL  # noqa: E402

from tandem_kvbm import checks, control, spec  # noqa: E402
from tandem_kvbm.config import KvbmSettings  # noqa: E402
from tandem_kvbm.disk.options import DiskOptions  # noqa: E402
from tandem_kvbm.manager import KvbmManager  # noqa: E402
from tandem_kvbm.metrics import METRICS  # noqa: E402
from tandem_kvbm.sizing import plan_tiers  # noqa: E402
from tandem_kvbm.spec import KvbmSpec, translate  # noqa: E402
from tandem_kvbm.stats import HitWindow, KvbmStats, Level  # noqa: E402
from tandem_protocol.errors import ConfigError  # noqa: E402

ROOT = Path(__file__).parents[2]
PAGE = 4096
TOKENS = 32
HOST_BLOCKS = 4


def offloading_config(**extra: Any) -> OffloadingConfig:
    """One rank, one group of blocks of a page, with KV events."""
    return OffloadingConfig(
        groups=(OffloadingGroupConfig(tokens_per_block=TOKENS, layer_names=("0",), group_id=0),), worker_kv_bytes_per_block=PAGE,
        enable_kv_cache_events=True, extra_config={"kvbm": {"cpu_cache_override_num_blocks": HOST_BLOCKS}, **extra},
        engine_id=f"test-{uuid.uuid4()}", model=OffloadingModelConfig("model", "float32"), cache=OffloadingCacheConfig(TOKENS, 1),
        parallel=OffloadingParallelConfig(rank=0, world_size=1, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, data_parallel_index=0,
                                          data_parallel_size=1, data_parallel_rank_local=None, is_parallelism_agnostic=False),
    )


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of whoever runs the tests doesn't matter, and EngineCore stays as it is."""
    for name in spec.os.environ:
        if "KVBM" in name:
            monkeypatch.delenv(name)
    monkeypatch.setattr(control, "install", lambda: None)


@pytest.fixture
def made() -> KvbmSpec:
    """A spec with a host tier of four blocks."""
    return KvbmSpec(offloading_config())


@contextmanager
def ended(manager: KvbmManager) -> Iterator[KvbmManager]:
    """The manager, shut down at the end."""
    try:
        yield manager
    finally:
        manager.shutdown()


@pytest.fixture
def manager(made: KvbmSpec) -> Iterator[KvbmManager]:
    """Its manager."""
    with ended(made.get_manager()) as manager:
        yield manager


def keys(*numbers: int) -> list[bytes]:
    """Keys of blocks of the first group."""
    return [number.to_bytes(32, "big") + bytes(4) for number in numbers]


def store(manager: KvbmManager, request: ReqContext, *numbers: int, success: bool = True) -> None:
    """What the scheduler does when a request's blocks are computed."""
    output = manager.prepare_store(keys(*numbers), request)
    assert output is not None
    manager.complete_store(output.keys_to_store, request, success)


def request(manager: KvbmManager, name: str = "r") -> ReqContext:
    """A new request."""
    context = ReqContext(req_id=name)
    manager.on_new_request(context)
    return context


def test_settings_become_vllms_keys() -> None:
    """Sizes, policy, events and which blocks are offloaded."""
    settings = KvbmSettings(cpu_cache_override_num_blocks=4, host_policy="arc")
    assert translate({"spec_name": "KvbmSpec"}, settings, plan_tiers(settings, PAGE)) == {
        "spec_name": "KvbmSpec", "eviction_policy": "arc", "offload_prompt_only": False, "self_describing_kv_events": True,
        "cpu_bytes_to_use": 4 * PAGE, "secondary_tiers": [],
    }
    settings = KvbmSettings(cpu_cache_gb=1, host_policy="my.module:Policy", offload_decode_blocks=False)
    extra = translate({"offload_prompt_only": False}, settings, plan_tiers(settings, PAGE))
    assert (extra["eviction_policy"], extra["cache_policy_module_path"]) == ("Policy", "my.module")
    assert extra["offload_prompt_only"] is False, "what stands in model.json wins"


def test_disk_comes_before_objects_and_the_filter_needs_a_host_tier() -> None:
    """Each tier is found by its module; disk alone takes every block, as Dynamo's does."""
    settings = KvbmSettings(disk_cache_override_num_blocks=9, object_enabled=True, object_bucket="b", staging_gb=0.001)
    disk, objects = translate({}, settings, plan_tiers(settings, PAGE))["secondary_tiers"]
    assert (disk["type"], disk["module_path"], disk["quota_bytes"]) == ("DiskTier", "tandem_kvbm.disk.tier", 9 * 2 * PAGE)
    assert disk["admission_filter"] is False
    assert (objects["type"], objects["module_path"], objects["bucket"]) == ("ObjectTier", "tandem_kvbm.objects.tier", "b")
    with_host = dataclasses.replace(settings, cpu_cache_gb=1)
    assert translate({}, with_host, plan_tiers(with_host, PAGE))["secondary_tiers"][0]["admission_filter"] is True


def test_settings_of_the_disk_become_its_options() -> None:
    """Each by its name: a key that the tier doesn't know would only be seen when an engine starts."""
    settings = KvbmSettings(disk_cache_override_num_blocks=9, disk_cache_dir="/disk", disk_policy="tinylfu", disk_shared=True,
                            disk_fdatasync=True, disk_forget_days=2,
                            disk_disable_o_direct=True, disable_disk_offload_filter=True, staging_gb=0.001)
    [disk] = translate({}, settings, plan_tiers(settings, PAGE))["secondary_tiers"]
    own = {name: value for name, value in disk.items() if name not in ("type", "module_path", "admission_filter")}
    assert DiskOptions(**own) == DiskOptions("/disk", 9 * 2 * PAGE, direct_io=False,
                                               fdatasync=True, shared=True, forget_s=172_800, policy="tinylfu")


def test_vllm_gets_the_planned_number_of_blocks(made: KvbmSpec) -> None:
    """Its own arithmetic must agree with ours, padding included."""
    assert made.num_chunks == made.plan.host_blocks == HOST_BLOCKS
    assert made.kv_bytes_per_chunk == made.plan.block_bytes == PAGE
    padded = KvbmSpec(dataclasses.replace(offloading_config(), worker_kv_bytes_per_block=PAGE + 1))
    assert (padded.num_chunks, padded.kv_bytes_per_chunk) == (HOST_BLOCKS, 2 * PAGE)


def test_a_host_tier_beyond_free_memory_is_refused_and_leaves_nothing(made: KvbmSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is mapped."""
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=PAGE))
    with pytest.raises(ConfigError, match="lower DYN_KVBM_CPU_CACHE_GB"):
        made.get_manager()
    assert not Path(f"/dev/shm/vllm_offload_{made.config.engine_id}.mmap").exists()


def test_a_manager_that_fails_to_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host tier is unmapped and its file removed."""
    made = KvbmSpec(offloading_config())
    monkeypatch.setattr(spec, "KvbmManager", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.get_manager()
    assert not Path(f"/dev/shm/vllm_offload_{made.config.engine_id}.mmap").exists()


def test_scheduler_and_worker_share_the_host_tier(made: KvbmSpec, manager: KvbmManager) -> None:
    """What the worker stores, the manager's view shows: tiers below read it there."""
    tensor = torch.randint(-128, 128, (8, PAGE), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    worker = KvbmSpec(made.config).get_worker(CanonicalKVCaches([CanonicalKVCacheTensor(tensor, PAGE)], [[CanonicalKVCacheRef(0, PAGE)]]))
    output = manager.prepare_store(keys(1, 2), request(manager))
    worker.submit_store(1, GPULoadStoreSpec([3, 5], [2], [0]), output.store_spec)
    worker.wait({1})
    view = np.asarray(manager.primary_tier.get_kv_memoryview())
    assert [view[row].tobytes() for row in output.store_spec.chunk_ids] == [tensor[row].numpy().tobytes() for row in (3, 5)]
    del view
    worker.shutdown()


def test_blocks_and_tokens_are_counted(manager: KvbmManager) -> None:
    """Under Dynamo's names; a store that failed is none."""
    first = request(manager)
    store(manager, first, 1, 2)
    store(manager, first, 3, success=False)
    manager.prepare_load(keys(1, 2), first)
    manager.complete_load(keys(1, 2), first)
    values = manager.values()
    assert (values["offload_blocks_d2h"], values["onboard_blocks_h2d"], values["matched_tokens"]) == (2, 2, 2 * TOKENS)
    assert (values["host_blocks"], values["host_blocks_used"]) == (HOST_BLOCKS, 2)


def test_the_hit_rate_is_that_of_scheduled_requests(manager: KvbmManager) -> None:
    """A block counts once per request, and a preempted request doesn't count again."""
    store(manager, request(manager, "writer"), 1, 2, 3)
    reader = request(manager, "reader")
    for _ in range(2):
        assert [manager.lookup(key, reader) for key in keys(1, 2, 3, 9)] == [LookupResult.HIT] * 3 + [LookupResult.MISS]
    manager.on_schedule_end(ScheduleEndContext({"reader"}, ()))
    assert manager.values()["host_cache_hit_rate"] == 0.75
    manager.lookup(keys(9)[0], reader)
    manager.on_schedule_end(ScheduleEndContext({"reader"}, ()))
    assert manager.values()["host_cache_hit_rate"] == 0.75
    assert manager.stats.requests == 1


def test_vllm_gets_each_value_once(manager: KvbmManager) -> None:
    """It forwards what it gets at every step."""
    payload = manager.get_stats().data["data"]
    assert payload["kvbm_host_blocks"] == {(): HOST_BLOCKS}
    assert not any(name.startswith("kvbm_") for name in manager.get_stats().data["data"])
    store(manager, request(manager), 1)
    changed = {name: values[()] for name, values in manager.get_stats().data["data"].items() if name.startswith("kvbm_")}
    assert changed == {"kvbm_offload_blocks_d2h": 1, "kvbm_host_blocks_used": 1}


def test_every_value_has_a_definition(manager: KvbmManager) -> None:
    """vLLM fails on a metric that it doesn't know."""
    defined = KvbmSpec.build_metric_definitions({"kvbm": {"cpu_cache_gb": 1}})
    assert {f"kvbm_{name}" for name in manager.values()} <= set(defined)
    stats = KvbmStats((Level.HOST, Level.DISK, Level.OBJECT), TOKENS, 10)
    assert set(stats.values()) <= set(METRICS)


def test_a_reset_takes_back_what_events_announced(manager: KvbmManager) -> None:
    """vLLM's own reset says nothing, and a router would go on sending prompts here for blocks that are gone."""
    first = request(manager)
    store(manager, first, 1, 2, 3, 4)
    assert [(sorted(event.keys), event.removed) for event in manager.take_events()] == [(keys(1, 2, 3, 4), False)]
    manager.on_request_finished(first)
    store(manager, request(manager, "s"), 5)
    manager.reset_cache()
    [event] = manager.take_events()
    assert (sorted(event.keys), event.removed, event.medium) == (keys(1, 2, 3, 4), True, Medium.CPU)
    assert list(manager.take_events()) == []
    assert manager.host_blocks_used == 0


def test_a_reset_loses_no_event_of_other_tiers(manager: KvbmManager) -> None:
    """They keep their blocks."""
    on_disk = OffloadingEvent(keys=keys(7), medium=Medium.STORAGE, removed=False)
    manager.primary_tier.events.append(on_disk)
    manager.reset_cache()
    assert list(manager.take_events()) == [on_disk]


def test_the_window_forgets() -> None:
    """The rate is that of the last requests; one that asked nothing doesn't count."""
    window = HitWindow(2)
    assert window.rate == 0
    window.record(10, 10)
    window.record(0, 0)
    window.record(10, 0)
    assert window.rate == 0.5
    window.record(30, 30)
    assert window.rate == 0.75


class FakeCore:
    """EngineCore as far as the control needs it."""

    def __init__(self, manager: KvbmManager, wrap: Callable[[Any], Any]) -> None:
        self.connector = OffloadingConnector.__new__(OffloadingConnector)
        self.connector.connector_scheduler = SimpleNamespace(manager=manager, reset_cache=manager.reset_cache,
                                                             take_events=manager.take_events)
        pool = SimpleNamespace(num_gpu_blocks=10, get_num_free_blocks=lambda: 7)
        blocks = SimpleNamespace(block_pool=pool, take_events=lambda: None)
        self.published: list[Any] = []
        publisher = SimpleNamespace(publish=lambda batch: self.published.extend(batch.events))
        self.scheduler = SimpleNamespace(connector=wrap(self.connector), kv_cache_manager=blocks, kv_event_publisher=publisher)

    def reset_prefix_cache(self, running: bool, connector: bool) -> bool:
        """Refuses, as vLLM does while requests run."""
        return running or connector


@pytest.fixture(params=["alone", "in a MultiConnector"])
def core(request: pytest.FixtureRequest, manager: KvbmManager) -> FakeCore:
    """An engine with our connector."""
    def several(own: Any) -> Any:
        return SimpleNamespace(_connectors=[object(), own], take_events=own.take_events)

    return FakeCore(manager, several if "Multi" in request.param else lambda own: own)


def test_the_status_tells_each_tier(core: FakeCore, manager: KvbmManager) -> None:
    """In plain types: it crosses vLLM's processes."""
    store(manager, request(manager), 1)
    status = json.loads(json.dumps(control.serve(core, "status", "")))
    device, host = status["tiers"]
    assert device == {"tier": "G1", "blocks": 10, "used_blocks": 3}
    assert (host["tier"], host["blocks"], host["used_blocks"], host["offloaded_blocks"], host["staging"]) == ("G2", 4, 1, 1, False)
    assert host["size_bytes"] == HOST_BLOCKS * PAGE


def test_one_tier_is_reset(core: FakeCore, manager: KvbmManager) -> None:
    """The device's answers for itself."""
    store(manager, request(manager), 1)
    assert control.serve(core, "reset", "G2") == {"tier": "G2", "reset": True, "blocks": 1}
    assert manager.host_blocks_used == 0
    assert control.serve(core, "reset", "G1") == {"tier": "G1", "reset": False}


def test_a_reset_is_told_at_once(core: FakeCore, manager: KvbmManager) -> None:
    """An idle engine makes no step after which its events would go out."""
    store(manager, request(manager), 1)
    told = [event.removed for event in manager.take_events()]
    assert told == [False]
    control.serve(core, "reset", "G2")
    assert [event.removed for event in core.published] == [True]
    control.serve(core, "reset", "G2")
    assert len(core.published) == 1


@pytest.mark.parametrize(("command", "tier", "message"),
                         [("reset", "G9", "G9"), ("reset", "G3", "no tier G3"), ("sing", "", "status or reset")])
def test_other_commands_are_refused(core: FakeCore, command: str, tier: str, message: str) -> None:
    """vLLM hands the sentence to the caller."""
    with pytest.raises(ValueError, match=message):
        control.serve(core, command, tier)


def test_an_engine_without_tiers_says_so() -> None:
    """Whatever its connector is."""
    with pytest.raises(ValueError, match="no KV block tiers"):
        control.serve(SimpleNamespace(scheduler=SimpleNamespace(connector=None)), "status", "")


def test_data_parallel_ranks_write_under_names_of_their_own() -> None:
    """Each is an engine with its own quota."""
    config = offloading_config()
    config = dataclasses.replace(config, extra_config={"kvbm": {"cpu_cache_gb": 1, "worker_id": "host-0"}})
    assert KvbmSpec(config).settings.worker_id == "host-0"
    second = dataclasses.replace(config.parallel, data_parallel_size=2, data_parallel_index=1)
    assert KvbmSpec(dataclasses.replace(config, parallel=second)).settings.worker_id == "host-0-dp1"


@pytest.fixture
def with_disk(tmp_path: Path) -> Iterator[KvbmManager]:
    """A manager with host memory and a disk tier that takes every block."""
    settings = {"cpu_cache_override_num_blocks": HOST_BLOCKS, "disk_cache_override_num_blocks": 3, "disk_cache_dir": tmp_path,
                "disable_disk_offload_filter": True}
    with ended(KvbmSpec(offloading_config(kvbm=settings)).get_manager()) as manager:
        yield manager


def settle(manager: KvbmManager) -> None:
    """Ends the step, lets every transfer end, and has the next step see it."""
    manager.on_schedule_end(ScheduleEndContext((), ()))
    for tier in manager.secondary_tiers:
        tier.drain_jobs()
    manager.on_schedule_end(ScheduleEndContext((), ()))


def test_blocks_go_to_the_disk_and_come_back(with_disk: KvbmManager) -> None:
    """Counted under Dynamo's names; a hit on disk is a miss in host memory."""
    store(with_disk, request(with_disk, "writer"), 1, 2)
    settle(with_disk)
    assert with_disk.values()["offload_blocks_h2d"] == 2
    with_disk.reset_cache()
    reader = request(with_disk, "reader")
    assert [with_disk.lookup(key, reader) for key in keys(1, 2)] == [LookupResult.HIT_PENDING] * 2
    with_disk.on_schedule_end(ScheduleEndContext({"reader"}, ()))
    settle(with_disk)
    assert [with_disk.lookup(key, reader) for key in keys(1, 2)] == [LookupResult.HIT] * 2
    values = with_disk.values()
    assert (values["onboard_blocks_d2d"], values["host_cache_hit_rate"], values["disk_cache_hit_rate"]) == (2, 0, 1)


def test_known_blocks_are_offered_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token of a long prompt doesn't wait for the tiers below; the request stays known to them until all are offered."""
    monkeypatch.setattr("tandem_kvbm.manager.OFFERED_PER_STEP", 1)
    settings = {"cpu_cache_override_num_blocks": HOST_BLOCKS, "disk_cache_override_num_blocks": 9, "disk_cache_dir": tmp_path}
    with ended(KvbmSpec(offloading_config(kvbm=settings)).get_manager()) as manager:
        store(manager, request(manager), 1, 2, 3)
        settle(manager)
        again = request(manager, "again")
        assert manager.prepare_store(keys(1, 2, 3), again) is not None
        manager.on_request_finished(again)
        for waiting in (2, 1):
            assert len(manager._req_state["again"].pending_cascade_keys) == waiting
            manager.on_schedule_end(ScheduleEndContext((), ()))
        settle(manager)
        assert manager.values()["offload_blocks_h2d"] == 3
        assert "again" not in manager._req_state


def test_hits_of_the_host_tier_are_in_vllms_counters_too(manager: KvbmManager) -> None:
    """Once per request and block, though they are answered past vLLM's own counting."""
    store(manager, request(manager), 1, 2)
    asks = request(manager, "asks")
    assert [manager.lookup(key, asks) for key in keys(1, 2, 1, 3)] == [LookupResult.HIT] * 3 + [LookupResult.MISS]
    stats = manager._metrics.take_stats()
    assert stats is not None
    assert stats._values[TieringOffloadingMetrics.CHUNK_QUERIES] == {PRIMARY_TIER_LABEL: 3}, "two blocks found, one not"
    assert stats._values[TieringOffloadingMetrics.CHUNK_HITS] == {PRIMARY_TIER_LABEL: 2}


def test_the_disk_tier_is_shown_and_reset(with_disk: KvbmManager) -> None:
    """Its override is a number of blocks, footers apart; host memory keeps its own."""
    core = FakeCore(with_disk, lambda own: own)
    for number in range(HOST_BLOCKS):
        store(with_disk, request(with_disk, f"r{number}"), number)
        settle(with_disk)
    disk = control.serve(core, "status", "")["tiers"][2]
    assert (disk["tier"], disk["used_blocks"], disk["write_failures"]) == ("G3", 3, 0)
    assert control.serve(core, "reset", "G3") == {"tier": "G3", "reset": True, "blocks": 3}
    host, disk = control.serve(core, "status", "")["tiers"][1:]
    assert (host["used_blocks"], disk["used_blocks"]) == (HOST_BLOCKS, 0)


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a tier is made; what tiers of this folder hold already counts as room."""
    made = KvbmSpec(offloading_config(kvbm={"cpu_cache_gb": 0.001, "disk_cache_gb": 1, "disk_cache_dir": tmp_path}))
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20 if path == tmp_path else 1 << 40))
    with pytest.raises(ConfigError, match="lower DYN_KVBM_DISK_CACHE_GB"):
        made.get_manager()
