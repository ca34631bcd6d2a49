# SPDX-License-Identifier: Apache-2.0
"""Which models a server runs, and on what."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_cli.serve.fleet import Counts, Fleet, Hardware, Mode, plan_fleet
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role

CPU = Hardware(cores=(0, 1, 2, 3, 4, 5), gpus=0)


def plan(mode: Mode = Mode.BOTH, prefill: int = 1, decode: int = 1, only: Role | None = None, hardware: Hardware = CPU,
         workers: int = 1, routers: int = 0, **arguments: Any) -> Fleet:
    """A fleet with defaults."""
    return plan_fleet(mode, Counts(workers, prefill, decode, routers), only, hardware, arguments)


@pytest.mark.parametrize(
    ("mode", "only", "names"),
    [(Mode.AGG, None, ("vllm",)), (Mode.DISAGG, None, ("prefill", "decode", "disagg")),
     (Mode.BOTH, None, ("vllm", "prefill", "decode", "disagg")), (Mode.BOTH, Role.PREFILL, ("prefill",)),
     (Mode.BOTH, Role.DECODE, ("decode",))],
)
def test_models_by_mode(mode: Mode, only: Role | None, names: tuple[str, ...]) -> None:
    """Workers first, then the ensembles that chain them."""
    assert plan(mode, only=only).model_names == names


def test_several_aggregated_workers_and_routers() -> None:
    """The router is one model however many instances it has."""
    fleet = plan(Mode.AGG, workers=3, routers=2)
    assert fleet.model_names == ("vllm", "vllm_1", "vllm_2", "router")
    assert ([worker.index for worker in fleet.workers], fleet.routers) == ([0, 1, 2], 2)


def test_negative_routers_are_refused() -> None:
    """None is 0."""
    with pytest.raises(ConfigError, match="must be at least 0"):
        plan(routers=-1)


@pytest.mark.parametrize(("mode", "indexes"), [(Mode.AGG, [0]), (Mode.DISAGG, [1, 2]), (Mode.BOTH, [0, 1, 2])])
def test_index_0_is_the_aggregated_workers(mode: Mode, indexes: list[int]) -> None:
    """Admin ports don't move with the mode."""
    assert [worker.index for worker in plan(mode).workers] == indexes


@pytest.mark.parametrize(
    ("prefill", "decode", "pairs"),
    [(1, 1, [("prefill", "decode")]), (1, 2, [("prefill", "decode"), ("prefill", "decode_1")]),
     (3, 2, [("prefill", "decode"), ("prefill_1", "decode_1"), ("prefill_2", "decode")])],
)
def test_every_worker_is_in_an_ensemble(prefill: int, decode: int, pairs: list[tuple[str, str]]) -> None:
    """The shorter side is used again."""
    ensembles = plan(Mode.DISAGG, prefill, decode).ensembles
    assert [tuple(one.steps.values()) for one in ensembles] == pairs
    assert [one.name for one in ensembles] == ["disagg", "disagg_1", "disagg_2"][: len(pairs)]


@pytest.mark.parametrize(
    ("mode", "names"),
    [(Mode.AGG, ["encode_agg", "encode_agg_1"]), (Mode.DISAGG, ["disagg", "encode_disagg", "encode_disagg_1"]),
     (Mode.BOTH, ["disagg", "encode_agg", "encode_agg_1", "encode_disagg", "encode_disagg_1"])],
)
def test_encode_workers_are_chained_with_every_other_way(mode: Mode, names: list[str]) -> None:
    """They come last, so that no port of another worker moves."""
    fleet = plan_fleet(mode, Counts(encode=2), None, Hardware((0, 1), 0), {})
    assert [worker.name for worker in fleet.workers][-2:] == ["encode", "encode_1"]
    assert [one.name for one in fleet.ensembles] == names
    assert all(one.steps[Role.ENCODE] in ("encode", "encode_1") for one in fleet.ensembles if one.template != "disagg")


@pytest.mark.parametrize(("prefill", "decode"), [(0, 1), (1, 0), (-1, 1)])
def test_each_side_needs_a_worker(prefill: int, decode: int) -> None:
    """Zero workers would serve nothing."""
    with pytest.raises(ConfigError, match="must be at least 1"):
        plan(prefill=prefill, decode=decode)


@pytest.mark.parametrize("gpus", [0, 2])
def test_routers_may_be_alone(gpus: int) -> None:
    """A server of routers only, in front of workers of other servers; with neither there is nothing to serve."""
    hardware = Hardware(cores=(0, 1), gpus=gpus)
    fleet = plan_fleet(Mode.AGG, Counts(aggregated=0, routers=2), None, hardware, {})
    assert (fleet.workers, fleet.model_names) == ((), ("router",))
    with pytest.raises(ConfigError, match="nothing to serve"):
        plan_fleet(Mode.AGG, Counts(aggregated=0, routers=0), None, hardware, {})


@pytest.mark.parametrize(
    ("mode", "decode", "cores"),
    [(Mode.AGG, 1, ["0,1,2,3,4,5"]), (Mode.DISAGG, 1, ["0,1,2", "3,4,5"]), (Mode.BOTH, 1, ["4,5", "0,1", "2,3"]),
     (Mode.DISAGG, 3, ["0", "1", "2", "3"])],
)
def test_cores_are_shared_equally(mode: Mode, decode: int, cores: list[str]) -> None:
    """Prefill and decode come first, the aggregated worker takes the last share."""
    assert [worker.cores for worker in plan(mode, decode=decode).workers] == cores


def test_with_fewer_cores_than_engines_they_take_one_each_in_turn() -> None:
    """Overlapping shares of several cores would make OpenMP threads spin on each other."""
    fleet = plan(Mode.DISAGG, 1, 2, hardware=Hardware((3, 7), 0))
    assert [worker.cores for worker in fleet.workers] == ["3", "7", "3"]


@given(st.integers(1, 64), st.integers(1, 5), st.integers(1, 5), st.sampled_from([Mode.DISAGG, Mode.BOTH]))
def test_core_shares_overlap_only_when_there_are_too_few(count: int, prefill: int, decode: int, mode: Mode) -> None:
    """Every engine has at least one core, and all have as many."""
    workers = plan(mode, prefill, decode, hardware=Hardware(tuple(range(count)), 0)).workers
    shares = [worker.cores.split(",") for worker in workers]
    assert len({len(share) for share in shares}) == 1
    if count >= len(workers):
        used = [core for share in shares for core in share]
        assert len(set(used)) == len(used)


@pytest.mark.parametrize(
    ("gpus", "mode", "tensor_parallel", "placed"),
    [(1, Mode.AGG, 1, ["0"]), (2, Mode.DISAGG, 1, ["0", "1"]), (4, Mode.DISAGG, 2, ["0,1", "2,3"]),
     (8, Mode.BOTH, 2, ["4,5", "0,1", "2,3"]), (2, Mode.BOTH, 1, ["0", "0", "1"]), (2, Mode.DISAGG, 2, ["0,1", "0,1"])],
)
def test_gpus_are_given_out_in_turn(gpus: int, mode: Mode, tensor_parallel: int, placed: list[str]) -> None:
    """As many per engine as its tensor parallelism needs."""
    fleet = plan(mode, hardware=Hardware((0,), gpus), tensor_parallel_size=tensor_parallel)
    assert [worker.gpus for worker in fleet.workers] == placed
    assert {worker.cores for worker in fleet.workers} == {""}


@pytest.mark.parametrize(("gpus", "decode", "share"), [(1, 1, 0.45), (1, 2, 0.3), (2, 3, 0.45)])
def test_engines_that_meet_on_a_gpu_share_its_memory(gpus: int, decode: int, share: float) -> None:
    """vLLM's own default would give each nine tenths."""
    workers = plan(Mode.DISAGG, 1, decode, hardware=Hardware((0,), gpus)).workers
    assert {worker.arguments["gpu_memory_utilization"] for worker in workers} == {share}


def test_an_engine_alone_on_its_gpu_keeps_vllms_default() -> None:
    """Nothing is set then."""
    assert plan(Mode.DISAGG, hardware=Hardware((0,), 2)).workers[0].arguments == {}


def test_a_given_memory_share_wins() -> None:
    """The operator may know better."""
    workers = plan(Mode.DISAGG, hardware=Hardware((0,), 1), gpu_memory_utilization=0.2).workers
    assert {worker.arguments["gpu_memory_utilization"] for worker in workers} == {0.2}


def test_an_engine_larger_than_the_host_is_refused() -> None:
    """Pipeline stages count as well."""
    with pytest.raises(ConfigError, match="one engine needs 4 GPUs, this host has 2"):
        plan(Mode.AGG, hardware=Hardware((0,), 2), tensor_parallel_size=2, pipeline_parallel_size=2)


@pytest.mark.parametrize(("hardware", "eager"), [(CPU, True), (Hardware((0,), 2), None)])
def test_only_cpu_engines_start_without_compilation(hardware: Hardware, eager: bool | None) -> None:
    """It triples their start; on a GPU it is worth it."""
    assert [worker.arguments.get("enforce_eager") for worker in plan(Mode.DISAGG, hardware=hardware).workers] == [eager, eager]


@pytest.mark.parametrize(("given", "dtype"), [({}, "float32"), ({"dtype": "bfloat16"}, "bfloat16")])
def test_cores_without_bfloat16_compute_in_float32(given: dict[str, str], dtype: str) -> None:
    """Emulated bfloat16 is slower; what is given wins."""
    workers = plan(Mode.DISAGG, hardware=Hardware((0,), 0, fast_bf16=False), **given).workers
    assert {worker.arguments["dtype"] for worker in workers} == {dtype}


def test_compilation_on_the_cpu_can_be_asked_for() -> None:
    """What is given wins."""
    assert plan(Mode.AGG, enforce_eager=False).workers[0].arguments == {"enforce_eager": False}


def test_engine_arguments_reach_every_worker_as_its_own() -> None:
    """No two workers share one dict."""
    workers = plan(max_model_len=99).workers
    assert [worker.arguments["max_model_len"] for worker in workers] == [99, 99, 99]
    assert len({id(worker.arguments) for worker in workers}) == 3


@pytest.mark.parametrize(
    ("mode", "ranks", "cores"),
    [(Mode.AGG, 2, ["0,1,2|3,4,5"]), (Mode.AGG, 4, ["0|1|2|3"]), (Mode.DISAGG, 2, ["0|1", "2|3"]), (Mode.AGG, 8, ["0|1|2|3|4|5|0|1"])],
)
def test_every_rank_has_a_group_of_cores(mode: Mode, ranks: int, cores: list[str]) -> None:
    """vLLM wants one for each process that computes; with too few cores they take turns."""
    assert [worker.cores for worker in plan(mode, data_parallel_size=ranks).workers] == cores


def test_every_rank_has_gpus() -> None:
    """As many as its tensor parallelism needs."""
    arguments = {"tensor_parallel_size": 2, "data_parallel_size": 2}
    assert [worker.gpus for worker in plan(Mode.DISAGG, hardware=Hardware((0,), 8), **arguments).workers] == ["0,1,2,3", "4,5,6,7"]
    with pytest.raises(ConfigError, match=r"one engine needs 4 GPUs, this host has 2: lower .* or --data-parallel-size"):
        plan(Mode.AGG, hardware=Hardware((0,), 2), **arguments)


def test_only_the_ranks_of_this_host_count() -> None:
    """The others are another worker's."""
    arguments = {"data_parallel_size": 4, "data_parallel_size_local": 2, "data_parallel_start_rank": 2}
    assert [worker.gpus for worker in plan(Mode.AGG, hardware=Hardware((0,), 2), **arguments).workers] == ["0,1"]
