# SPDX-License-Identifier: Apache-2.0
"""Where a consolidator's streams are, when there is one, and how launcher and worker agree on it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tandem_cli.serve.consolidators import plan_sidecars, workers_environment
from tandem_cli.serve.layout import RunFolder
from tandem_cli.serve.preflight import Port, check_ports
from tandem_kvbm.consolidator.config import load_settings, wanted
from tandem_kvbm.consolidator.plan import ALL_RANKS, Publisher
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role
from tandem_protocol.workers import EventSource
from tandem_worker.config import WorkerSettings
from tandem_worker.registration import WorkerNames, build_record

_FOLDER = RunFolder(Path("/run/8000"))
_KVBM = WorkerSettings(role=Role.AGGREGATED, connector=("kvbm",))


def test_the_stream_is_where_dynamos_is() -> None:
    """1000 above the leader's port, all addresses; replay 1000 above that; the engine's ranks on successive ports."""
    settings = load_settings({}, {"TANDEM_CONSOLIDATOR_RANKS": "2"})
    plan = settings.plan()
    assert (plan.endpoint, plan.replay_endpoint) == ("tcp://0.0.0.0:57001", "tcp://0.0.0.0:58001")
    assert plan.publishers == (
        Publisher("engine0", "tcp://127.0.0.1:20080", "tcp://127.0.0.1:21080", 0),
        Publisher("engine1", "tcp://127.0.0.1:20081", "tcp://127.0.0.1:21081", 1),
    )
    assert load_settings({}, {"DYN_KVBM_LEADER_ZMQ_PUB_PORT": "40000", "TANDEM_CONSOLIDATOR_WORKER_INDEX": "3"}).published_port == 41003
    assert load_settings({}, {"TANDEM_CONSOLIDATOR_PORT": "30000", "TANDEM_CONSOLIDATOR_WORKER_INDEX": "3"}).published_port == 30003


def test_further_publishers_are_named_with_their_rank() -> None:
    """Without one they are every rank's."""
    text = "disk,tcp://10.0.0.1:1,tcp://10.0.0.1:2,0 bucket,ipc:///tmp/x"
    assert load_settings({}, {"TANDEM_CONSOLIDATOR_PUBLISHERS": text}).publishers == (
        Publisher("disk", "tcp://10.0.0.1:1", "tcp://10.0.0.1:2", 0), Publisher("bucket", "ipc:///tmp/x", "", ALL_RANKS))


@pytest.mark.parametrize(("environ", "said"), [
    ({"DYN_KVBM_LEADER_ZMQ_PUB_PORT": "65000"}, "beyond 65535"),
    ({"TANDEM_CONSOLIDATOR_PORT": "65000"}, "beyond 65535"),
    ({"TANDEM_CONSOLIDATOR_PUBLISHERS": "engine0,tcp://a:1"}, "name of its own"),
    ({"TANDEM_CONSOLIDATOR_PUBLISHERS": "disk,tcp://a:1,,5"}, "rank"),
    ({"TANDEM_CONSOLIDATOR_PUBLISHERS": "tcp://a:1"}, "expected name"),
])
def test_settings_that_cannot_work_are_refused(environ: dict[str, str], said: str) -> None:
    """Before anything starts."""
    with pytest.raises(ConfigError, match=said):
        load_settings({}, environ)


@pytest.mark.parametrize(("environ", "connectors", "caching", "publishes", "answer"), [
    ({}, ("kvbm",), True, True, True),
    ({}, ("kvbm", "nixl"), True, True, True),
    ({}, ("nixl",), True, True, False),
    ({}, ("kvbm",), False, True, False),
    ({}, ("kvbm",), True, False, False),
    ({"DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR": "0"}, ("kvbm",), True, True, False),
])
def test_when_a_worker_gets_a_consolidator(environ: dict[str, str], connectors: tuple[str, ...], caching: bool, publishes: bool,
                                           answer: bool) -> None:
    """With kvbm, prefix caching, and a router's interest; unless it is switched off."""
    assert wanted(load_settings({}, environ), connectors, prefix_caching=caching, publishes=publishes) is answer


def test_the_launcher_plans_one_per_worker_with_tiers() -> None:
    """At the worker's own event port, with ports that don't collide."""
    third = WorkerSettings(role=Role.PREFILL, connector=("kvbm", "nixl"), worker_index=2)
    sidecars = plan_sidecars([_KVBM, WorkerSettings(role=Role.PREFILL, worker_index=1), third], {}, {}, _FOLDER)
    assert [(one.worker_index, one.port, one.admin_port) for one in sidecars] == [(0, 57001, 8481), (2, 57003, 8483)]
    assert sidecars[1].environment["TANDEM_CONSOLIDATOR_ENGINE"] == "tcp://127.0.0.1:20082"
    assert [port.number for port in sidecars[1].ports()] == [57003, 58003, 8483]
    assert workers_environment(sidecars) == {"TANDEM_CONSOLIDATED_PORT": "57001"}
    assert workers_environment(sidecars[1:]) == {"TANDEM_CONSOLIDATED_PORT": "57001"}
    assert workers_environment(()) == {}


def test_two_consolidators_may_not_share_a_port() -> None:
    """One sentence, before anything starts."""
    [sidecar] = plan_sidecars([_KVBM], {}, {"DYN_KVBM_LEADER_ZMQ_PUB_PORT": "19080", "TANDEM_CONSOLIDATOR_ADMIN_PORT": "0"}, _FOLDER)
    with pytest.raises(ConfigError, match="would share port 20080: set DYN_KVBM_LEADER_ZMQ_PUB_PORT differently"):
        check_ports([Port(20080, "KV events of worker 0", "--kv-event-port"), *sidecar.ports()])


def test_somebody_elses_consolidators_are_left_alone() -> None:
    """The caller's environment names their port; workers inherit it."""
    assert plan_sidecars([_KVBM], {}, {"TANDEM_CONSOLIDATED_PORT": "40000"}, _FOLDER) == ()


@pytest.mark.parametrize("arguments", [{"enable_prefix_caching": False}, {"kv_events_config": {"publisher": "null"}}])
def test_without_events_of_the_usual_kind_there_is_none(arguments: dict[str, Any]) -> None:
    """Nothing would come in."""
    assert plan_sidecars([_KVBM], arguments, {}, _FOLDER) == ()


def test_ranks_that_begin_above_0_have_none() -> None:
    """A consolidator would count them from 0: routers follow the engine itself."""
    there = {"data_parallel_size": 4, "data_parallel_size_local": 2, "data_parallel_hybrid_lb": True}
    assert plan_sidecars([_KVBM], {**there, "data_parallel_start_rank": 2}, {}, _FOLDER) == ()
    [sidecar] = plan_sidecars([_KVBM], there, {"TANDEM_CONSOLIDATOR_ADMIN_PORT": "0"}, _FOLDER)
    assert sidecar.environment["TANDEM_CONSOLIDATOR_RANKS"] == "2"


def test_the_workers_record_names_the_consolidated_stream() -> None:
    """In place of the engine's; with several ranks, as one that carries all of them."""
    settings = WorkerSettings(role=Role.AGGREGATED, connector=("kvbm",), worker_index=2, consolidated_port=57001, grpc_url="10.0.0.7:9001")
    there = {"endpoint": "tcp://10.0.0.7:57003", "replay_endpoint": "tcp://10.0.0.7:58003"}
    assert _sources(settings, 1) == (EventSource(dp_rank=0, **there),)
    assert _sources(settings, 2) == tuple(EventSource(dp_rank=rank, **there, merged=True) for rank in range(2))


def test_a_worker_without_tiers_or_launcher_names_its_engine() -> None:
    """Nobody else publishes for it."""
    for settings in (WorkerSettings(consolidated_port=57001), _KVBM):
        assert _sources(settings, 1) == (EventSource(dp_rank=0, endpoint="tcp://127.0.0.1:20080", replay_endpoint="tcp://127.0.0.1:21080"),)


def _sources(settings: WorkerSettings, ranks: int) -> tuple[EventSource, ...]:
    config = SimpleNamespace(
        model_config=SimpleNamespace(model="m"), cache_config=SimpleNamespace(block_size=16, num_gpu_blocks=1),
        scheduler_config=SimpleNamespace(max_num_seqs=1, max_num_batched_tokens=1), speculative_config=None,
        kv_events_config=SimpleNamespace(enable_kv_cache_events=True, publisher="zmq", endpoint="tcp://*:20080",
                                         replay_endpoint="tcp://*:21080"),
    )
    return build_record(settings, WorkerNames("vllm", "t", -1), config, tuple(range(ranks))).event_sources
