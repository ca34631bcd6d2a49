# SPDX-License-Identifier: Apache-2.0
"""A worker's record, and keeping it in discovery in the worker's state."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from discovery_contract import WAIT_S, until, worker
from tandem_protocol import workers
from tandem_protocol.discovery import Registration
from tandem_protocol.discovery.memory import MemoryDiscovery, MemoryStore
from tandem_protocol.errors import ConfigError, UnavailableError
from tandem_protocol.roles import Role
from tandem_protocol.workers import EventSource, WorkerRecord
from tandem_worker.arguments import kv_events_config
from tandem_worker.config import WorkerSettings, load_settings
from tandem_worker.registration import RegisteredPresence, Unregistered, WorkerNames, build_record
from tandem_worker.status import WorkerState, WorkerStatus

NAMES = WorkerNames("prefill", "f00", 8082, ("a", "b"))
SETTINGS = WorkerSettings(role=Role.PREFILL, grpc_url="10.0.0.7:9001")


def engine_config(**events: object) -> Any:
    """The parts of vLLM's VllmConfig that a record needs."""
    kv_events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": "tcp://*:20080", "replay_endpoint": "tcp://*:21080"}
    return SimpleNamespace(
        model_config=SimpleNamespace(model="org/name"),
        cache_config=SimpleNamespace(block_size=32, num_gpu_blocks=77),
        scheduler_config=SimpleNamespace(max_num_seqs=16, max_num_batched_tokens=2048),
        kv_events_config=SimpleNamespace(**{**kv_events, **events}),
        speculative_config=None,
    )


class AwayDiscovery(MemoryDiscovery):
    """A store that can't be reached for its first `failures` registrations."""

    def __init__(self, store: MemoryStore, failures: int) -> None:
        super().__init__(store)
        self.failures = failures

    async def register(self, record: WorkerRecord) -> Registration:
        """Fails, then works."""
        if self.failures:
            self.failures -= 1
            raise UnavailableError("the store is away")
        return await super().register(record)


def test_the_record_is_the_engines_own() -> None:
    """Not what was asked for, but what the engine made of it."""
    assert build_record(SETTINGS, NAMES, engine_config()) == WorkerRecord(
        id="prefill-f00", role=Role.PREFILL, state=workers.WorkerState.READY, model="org/name", grpc_url="10.0.0.7:9001",
        triton_model="prefill", admin_url="http://127.0.0.1:8082", block_size=32, total_blocks=77, max_num_seqs=16,
        max_num_batched_tokens=2048, loras=("a", "b"),
        event_sources=(EventSource(dp_rank=0, endpoint="tcp://10.0.0.7:20080", replay_endpoint="tcp://10.0.0.7:21080"),),
    )


def test_each_rank_has_its_port() -> None:
    """vLLM adds the rank to the port; an address that is not `any` stays."""
    config = engine_config(endpoint="tcp://10.0.0.9:20080", replay_endpoint=None)
    assert build_record(SETTINGS, NAMES, config, (2, 3)).event_sources == (
        EventSource(dp_rank=2, endpoint="tcp://10.0.0.9:20082"), EventSource(dp_rank=3, endpoint="tcp://10.0.0.9:20083"),
    )


@pytest.mark.parametrize("events", [{"enable_kv_cache_events": False}, {"publisher": "null"}])
def test_who_publishes_nothing_has_no_sources(events: dict[str, object]) -> None:
    """A router must not wait for events of it."""
    assert build_record(SETTINGS, NAMES, engine_config(**events)).event_sources == ()


def test_without_event_configuration_there_are_no_sources() -> None:
    """Decode workers have none."""
    config = engine_config()
    config.kv_events_config = None
    assert build_record(SETTINGS, NAMES, config).event_sources == ()


@pytest.mark.parametrize(
    ("host", "port", "url"),
    [("127.0.0.1", 8081, "http://127.0.0.1:8081"), ("0.0.0.0", 8081, "http://10.0.0.7:8081"), ("127.0.0.1", -1, "")],
)
def test_the_admin_url_is_reachable(host: str, port: int, url: str) -> None:
    """An address to listen on is not always one to connect to."""
    record = build_record(replace(SETTINGS, admin_host=host), replace(NAMES, admin_port=port), engine_config())
    assert record.admin_url == url


async def test_the_record_follows_the_worker() -> None:
    """Ready, draining, gone."""
    store = MemoryStore()
    watch = MemoryDiscovery(store).watch()
    presence = RegisteredPresence(MemoryDiscovery(store), worker(state=workers.WorkerState.STARTING))
    assert presence.status == "unregistered"
    presence.follow(WorkerState.READY)
    await until(watch, lambda snapshot: snapshot.records == (worker(),))
    assert presence.status == "registered"
    presence.follow(WorkerState.DRAINING)
    await until(watch, lambda snapshot: snapshot.records == (worker(state=workers.WorkerState.DRAINING),))
    await presence.leave()
    await presence.leave()
    assert (store.records, presence.status) == ((), "unregistered")


async def test_the_record_follows_the_adapters() -> None:
    """As they are loaded and unloaded, in whatever state the worker is."""
    store = MemoryStore()
    watch = MemoryDiscovery(store).watch()
    presence = RegisteredPresence(MemoryDiscovery(store), worker())
    presence.follow(WorkerState.READY)
    presence.carry(("a", "b"))
    await until(watch, lambda snapshot: snapshot.records == (worker(loras=("a", "b")),))
    presence.follow(WorkerState.DRAINING)
    presence.carry(())
    await until(watch, lambda snapshot: snapshot.records == (worker(loras=(), state=workers.WorkerState.DRAINING),))
    await presence.leave()


@pytest.mark.parametrize("state", [WorkerState.DEAD, WorkerState.HUNG, WorkerState.STOPPED])
async def test_a_dead_worker_leaves_at_once(state: WorkerState) -> None:
    """Nobody has to ask it to."""
    store = MemoryStore()
    watch = MemoryDiscovery(store).watch()
    presence = RegisteredPresence(MemoryDiscovery(store), worker())
    presence.follow(WorkerState.READY)
    await until(watch, lambda snapshot: snapshot.records != ())
    presence.follow(state)
    await until(watch, lambda snapshot: snapshot.records == ())
    await presence.leave()


async def test_an_unwell_worker_stays_known_but_is_not_placed() -> None:
    """A router gives up the streams of a worker that it no longer finds; this one may yet finish them."""
    store = MemoryStore()
    watch = MemoryDiscovery(store).watch()
    presence = RegisteredPresence(MemoryDiscovery(store), worker())
    presence.follow(WorkerState.UNWELL)
    snapshot = await until(watch, lambda snapshot: snapshot.records != ())
    assert not snapshot.records[0].placeable
    presence.follow(WorkerState.READY)
    await until(watch, lambda snapshot: snapshot.records == (worker(),))
    await presence.leave()


async def test_the_state_may_be_told_from_any_thread() -> None:
    """Triton's main thread stops a worker."""
    store = MemoryStore()
    watch = MemoryDiscovery(store).watch()
    presence = RegisteredPresence(MemoryDiscovery(store), worker())
    await asyncio.to_thread(presence.follow, WorkerState.READY)
    await until(watch, lambda snapshot: snapshot.records == (worker(),))
    await presence.leave()


async def test_a_store_that_is_away_is_tried_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """With the state that the worker has by then; one line in the log."""
    monkeypatch.setattr("tandem_worker.registration._FIRST_RETRY_S", 0.001)
    store = MemoryStore()
    watch = MemoryDiscovery(store).watch()
    presence = RegisteredPresence(AwayDiscovery(store, failures=3), worker())
    presence.follow(WorkerState.READY)
    await until(watch, lambda snapshot: snapshot.records == (worker(),))
    assert presence.status == "registered"
    assert [record.message for record in caplog.records if "discovery.unavailable" in record.message] == [
        "discovery.unavailable worker=vllm-1 error=the store is away: serving goes on, trying again",
    ]
    await presence.leave()


async def test_a_state_is_waited_for_until_the_store_has_it() -> None:
    """Within a bound, and at once when it has it; a worker that wants to be gone is gone."""
    store = MemoryStore()
    presence = RegisteredPresence(MemoryDiscovery(store), worker())
    for state, stored in ((WorkerState.READY, workers.WorkerState.READY), (WorkerState.ASLEEP, workers.WorkerState.ASLEEP)):
        presence.follow(state)
        assert await presence.settle(state, WAIT_S)
        assert [record.state for record in store.records] == [stored]
    presence.follow(WorkerState.DEAD)
    assert await presence.settle(WorkerState.DEAD, WAIT_S)
    assert store.records == ()
    assert not await presence.settle(WorkerState.READY, 0.01)
    await presence.leave()
    assert await Unregistered().settle(WorkerState.ASLEEP, 0)


async def test_a_state_that_the_store_does_not_take_is_not_waited_for_long() -> None:
    """The worker goes on without it."""
    presence = RegisteredPresence(AwayDiscovery(MemoryStore(), failures=1_000_000), worker())
    presence.follow(WorkerState.READY)
    assert not await presence.settle(WorkerState.READY, 0.01)
    await presence.leave()


async def test_leaving_while_the_store_is_away() -> None:
    """It ends within its bound."""
    presence = RegisteredPresence(AwayDiscovery(MemoryStore(), failures=1_000_000), worker())
    presence.follow(WorkerState.READY)
    async with asyncio.timeout(WAIT_S):
        await presence.leave()
    assert presence.status == "unregistered"


async def test_without_discovery_nothing_happens() -> None:
    """And `/health` does not speak of it."""
    nobody = Unregistered()
    nobody.follow(WorkerState.READY)
    await nobody.leave()
    status = WorkerStatus(WorkerState.READY, Role.AGGREGATED, 0, 0, 0, 0.0, 0.0, nobody.status)
    assert "registration" not in status.as_json("vllm")
    assert replace(status, registration="registered").as_json("vllm")["registration"] == "registered"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [("TANDEM_DISCOVERY", "redis://x", "expected file:/folder"), ("TANDEM_GRPC_URL", "localhost", "expected host:port"),
     ("TANDEM_GRPC_URL", "localhost:0", "expected host:port"), ("TANDEM_CONDITIONAL_DISAGG", "maybe", "expected true or false")],
)
def test_bad_settings_are_refused(variable: str, value: str, message: str) -> None:
    """At once, and not when the engine has started."""
    with pytest.raises(ConfigError, match=f"{variable}='{value}' is not valid: {message}"):
        load_settings({}, {variable: value})


def test_settings_by_default() -> None:
    """No discovery, Triton's own port, unconditional."""
    settings = load_settings({}, {})
    assert (settings.discovery, settings.grpc_url, settings.conditional_disagg) == ("", "127.0.0.1:8001", False)


@pytest.mark.parametrize("conditional", [False, True])
def test_the_engine_of_a_decode_worker_gets_its_publisher(conditional: bool) -> None:
    """The setting reaches vLLM's own configuration."""
    settings = WorkerSettings(role=Role.DECODE, conditional_disagg=conditional, kv_event_port=20100, worker_index=2)
    config = kv_events_config(settings, {"enable_prefix_caching": True})
    assert (config is not None and config["endpoint"] == "tcp://*:20102") is conditional


@pytest.mark.parametrize(
    ("role", "conditional", "publishes"),
    [(Role.AGGREGATED, False, True), (Role.PREFILL, False, True), (Role.DECODE, False, False), (Role.DECODE, True, True)],
)
def test_decode_workers_publish_only_for_conditional_disaggregation(role: Role, conditional: bool, publishes: bool) -> None:
    """Else nobody has a use for their events."""
    assert WorkerSettings(role=role, conditional_disagg=conditional).publishes_kv_events is publishes
