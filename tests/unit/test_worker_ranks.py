# SPDX-License-Identifier: Apache-2.0
"""Which data-parallel ranks a worker serves, and what is refused before an engine would wait for them."""

from dataclasses import replace
from typing import Any

import pytest

from tandem_protocol.errors import ConfigError
from tandem_worker.arguments import Platform, complete
from tandem_worker.config import WorkerSettings
from tandem_worker.ranks import LocalRanks, check_cores, engine_processes, local_ranks

KNOWN = frozenset({"model", "data_parallel_size", "data_parallel_rank", "data_parallel_hybrid_lb", "data_parallel_size_local",
                   "data_parallel_start_rank", "data_parallel_address", "data_parallel_rpc_port"})
CPU, GPU = Platform(True, KNOWN), Platform(False, KNOWN)
HYBRID = {"data_parallel_size": 4, "data_parallel_size_local": 2, "data_parallel_hybrid_lb": True}


MEETING = {"data_parallel_address": "10.0.0.1", "data_parallel_rpc_port": 13445}


def dp(**arguments: Any) -> dict[str, Any]:
    """size=4 for data_parallel_size=4."""
    return {f"data_parallel_{name}": value for name, value in arguments.items()}


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [({}, LocalRanks(0, 1)), (dp(size=None), LocalRanks(0, 1)), (dp(size=4), LocalRanks(0, 4)),
     (dp(size=4, size_local=4), LocalRanks(0, 4)), (dp(size=4, rank=3), LocalRanks(3, 1)), (HYBRID, LocalRanks(0, 2)),
     (dp(size=4, rank=0, size_local=1), LocalRanks(0, 1)), ({**HYBRID, **dp(start_rank=2)}, LocalRanks(2, 2)),
     (dp(size=4, size_local=1, start_rank=3), LocalRanks(3, 1)), (dp(size=2, backend="mp"), LocalRanks(0, 2)),
     ({**dp(size=4, size_local=1), **MEETING}, LocalRanks(0, 1, 3)), ({"headless": False, **dp(size=2)}, LocalRanks(0, 2)),
     ({"headless": True, **dp(size=4, size_local=2, start_rank=2), **MEETING}, LocalRanks(2, 2)),
     (dp(size=2, address="10.0.0.1", rpc_port=13445), LocalRanks(0, 2))],
)
def test_the_ranks_of_this_worker(arguments: dict[str, Any], ranks: LocalRanks) -> None:
    """All of one host's, those of this host (hybrid), one (external), a leader's with how many follow, a follower's."""
    assert local_ranks(arguments) == ranks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dp(size=0), "data_parallel_size must be a positive integer, got 0"),
        (dp(size="2"), "data_parallel_size must be a positive integer, got '2'"),
        (dp(size=True), "data_parallel_size must be a positive integer, got True"),
        (dp(size=2, rank=2), r"data_parallel_rank must be a rank below data_parallel_size \(2\), got 2"),
        (dp(rank=1), r"data_parallel_rank must be a rank below data_parallel_size \(1\), got 1"),
        (dp(size=2, rank=-1), "data_parallel_rank must be a rank"),
        (dp(size=2, external_lb=True), "data_parallel_external_lb needs data_parallel_rank"),
        (dp(size=2, hybrid_lb=True), "data_parallel_hybrid_lb needs data_parallel_size_local"),
        ({**HYBRID, **dp(start_rank=3)}, "ranks 3 to 4 are on this host and data_parallel_size is 4"),
        (dp(size=4, size_local=2), "a leader and its followers meet at data_parallel_address.*data_parallel_hybrid_lb"),
        ({**dp(size=4, size_local=5), **MEETING}, "data_parallel_size_local 5 is more than data_parallel_size 4"),
        ({"headless": True, **dp(size=4)}, "headless needs data_parallel_size_local and data_parallel_start_rank"),
        ({"headless": True, **dp(size=4, size_local=2, start_rank=0), **MEETING}, r"headless needs .* \(above 0, which is the leader's\)"),
        ({"headless": True, **dp(size=4, size_local=2, start_rank=2)}, "a leader and its followers meet at"),
        ({"headless": True, **dp(size=4, size_local=2, start_rank=3), **MEETING}, "ranks 3 to 4 are on this host"),
        ({"headless": True, **dp(size=2, rank=0), **MEETING}, "headless and data_parallel_rank exclude each other"),
        ({"headless": True, **HYBRID, **MEETING}, "headless and data_parallel_hybrid_lb exclude each other"),
        ({"headless": True, "nnodes": 2, **dp(size=4, size_local=2), **MEETING}, "headless and nnodes exclude each other"),
        (dp(size=2, backend="ray"), "data_parallel_backend 'ray': its processes are not this worker's"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    """In a sentence with the fix; vLLM would wait ten minutes for engines that nobody starts, or end in an assertion."""
    with pytest.raises(ConfigError, match=message):
        local_ranks(arguments)
    with pytest.raises(ConfigError, match=message):
        complete({"model": "m", **arguments}, WorkerSettings(), Platform(False, KNOWN | arguments.keys()))


def test_ports_of_ranks_that_begin_above_0() -> None:
    """vLLM adds the rank, which counts over all hosts: this host's ports begin at the setting all the same."""
    settings = replace(WorkerSettings(), worker_index=1)
    config = complete({"model": "m", **HYBRID, **dp(start_rank=2)}, settings, GPU)["kv_events_config"]
    assert (config["endpoint"], config["replay_endpoint"]) == ("tcp://*:20080", "tcp://*:21080")
    assert list(LocalRanks(2, 2).ports(20080, 1)) == [20082, 20083]
    assert [LocalRanks(2, 2).first_port(20080, 1) + rank for rank in (2, 3)] == [20082, 20083]


@pytest.mark.parametrize(("index", "port"), [(0, 20080), (3, 20083)])
def test_one_worker_per_rank(index: int, port: int) -> None:
    """Four workers of one host with a rank each: as four workers without ranks."""
    config = complete({"model": "m", **dp(size=4, rank=index)}, WorkerSettings(worker_index=index), GPU)["kv_events_config"]
    assert int(config["endpoint"].rpartition(":")[2]) + index == port


@pytest.mark.parametrize(("arguments", "processes"), [({}, 1), (dp(size=3), 3), ({"tensor_parallel_size": 2, **dp(size=2)}, 4),
                                                      ({"pipeline_parallel_size": 2, **HYBRID}, 4),
                                                      ({"tensor_parallel_size": 16, "nnodes": 2}, 8)])
def test_processes_that_compute(arguments: dict[str, Any], processes: int) -> None:
    """Of this host only."""
    assert engine_processes(arguments) == processes


def test_an_engine_over_hosts_is_shared_equally() -> None:
    """As vLLM requires it; told before an engine starts."""
    with pytest.raises(ConfigError, match=r"6 GPUs .* can't be shared equally by nnodes=4"):
        engine_processes({"tensor_parallel_size": 6, "nnodes": 4})


@pytest.mark.parametrize(("cores", "ranks"), [("", 2), ("auto", 2), ("nobind", 2), ("0|1", 2), ("0-3|4-7", 2), ("0,1", 1)])
def test_cores_of_every_rank(cores: str, ranks: int) -> None:
    """One group each, or vLLM's own choice."""
    check_cores(cores, dp(size=ranks))


@pytest.mark.parametrize(("cores", "ranks"), [("0,1", 2), ("0|1", 1), ("0|1|2", 2)])
def test_groups_of_cores_that_do_not_fit(cores: str, ranks: int) -> None:
    """Before the engine's processes end in an assertion, a minute later. A GPU engine has no use for them."""
    settings = WorkerSettings(cpu_cores=cores)
    with pytest.raises(ConfigError, match=r"give one group each, with \| between"):
        complete({"model": "m", **dp(size=ranks)}, settings, CPU)
    assert complete({"model": "m", **dp(size=ranks)}, settings, GPU)


def test_a_leader_needs_an_admin_port() -> None:
    """Its followers come there; a follower of a leader that has none would look for it in vain."""
    leader = {"model": "m", **dp(size=2, size_local=1), **MEETING}
    with pytest.raises(ConfigError, match="a leader of followers needs an admin port"):
        complete(leader, replace(WorkerSettings(), admin_port=-1), CPU)
    assert complete(leader, WorkerSettings(), CPU)
