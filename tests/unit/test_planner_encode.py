# SPDX-License-Identifier: Apache-2.0
"""Encode workers as a pool of the planner: by the requests at them, within their bounds, beside the pools that a profile plans."""

from dataclasses import replace

import pytest

from planner_rig import Engine, pools, steady
from tandem_planner.arguments import parse
from tandem_planner.config import PlannerConfig
from tandem_planner.connectors.triton import sort_models
from tandem_planner.connectors.triton_server import Model, ModelState
from tandem_planner.plan import Planner
from tandem_planner.terms import Decision, Mode, Observation, Pool, WorkerLoad
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role

CONFIG = PlannerConfig(ttft=200, itl=12, adjustment_interval=60, worker_start=0, max_encode=4, max_gpu_budget=16, scale_down_window=30)


def encoders(count: int, requests: float) -> Pool:
    """Settled, with so many requests at each."""
    return Pool(count, count, tuple(WorkerLoad(f"e{at}", active_requests=requests) for at in range(count)))


def looks(planner: Planner, pool: Pool, times: int, *, begin_s: float = 0.0, every_s: float = 5.0) -> Decision:
    """The last of so many decisions about the same pool, with idle prefill and decode workers beside it."""
    for at in range(1, times + 1):
        decision = planner.decide(Observation(begin_s + every_s * at, {**pools(1, 1), Role.ENCODE: pool}))
    return decision


def test_a_crowd_of_requests_makes_the_pool_grow_to_its_most() -> None:
    """Half as much again at the second look, at once when it is twice too much, and never beyond the bound."""
    planner = Planner(CONFIG, None)
    assert looks(planner, encoders(2, 12.0), 1).target[Role.ENCODE] == 2
    decision = looks(planner, encoders(2, 12.0), 1, begin_s=5)
    assert decision.target[Role.ENCODE] == 3
    assert "encode 2 -> 3: engines have more than they can serve in time" in decision.reason
    assert looks(Planner(CONFIG, None), encoders(3, 100.0), 1).target[Role.ENCODE] == 4
    capped = looks(Planner(replace(CONFIG, max_encode=3), None), encoders(3, 100.0), 2)
    assert capped.target[Role.ENCODE] == 3
    assert "3 are the most" in capped.reason


def test_idle_encoders_go_one_by_one_to_the_fewest() -> None:
    """When a window long none of them had much to do; one that is half busy keeps all."""
    planner = Planner(replace(CONFIG, min_encode=2, min_endpoint=0), None)
    assert looks(planner, encoders(4, 0.0), 8).target[Role.ENCODE] == 3
    assert looks(planner, encoders(3, 0.0), 8, begin_s=100).target[Role.ENCODE] == 2
    assert looks(planner, encoders(2, 0.0), 20, begin_s=200).target[Role.ENCODE] == 2
    assert looks(Planner(CONFIG, None), encoders(3, 5.0), 20).target[Role.ENCODE] == 3


def test_the_engines_own_queue_counts_without_a_router() -> None:
    """Whichever is more."""
    pool = Pool(1, 1, (WorkerLoad("e0", queued_requests=40.0),))
    assert looks(Planner(CONFIG, None), pool, 1).target[Role.ENCODE] == 2


def test_a_profile_plans_the_others_and_leaves_encoders_to_their_load() -> None:
    """Traffic says nothing about images; budget and decision count all three pools."""
    planner = Planner(replace(CONFIG, encode_engine_num_gpu=2), Engine().profile(16))
    decision = planner.decide(Observation(60, {**pools(1, 1), Role.ENCODE: encoders(1, 0.0)}, steady(20.0)))
    assert decision.target[Role.PREFILL] > 1
    assert decision.target[Role.ENCODE] == 1
    [gpus] = [term.value for term in decision.terms if term.name == "gpus"]
    assert gpus == decision.target[Role.PREFILL] + decision.target[Role.DECODE] + 2


def test_without_a_most_encoders_are_left_alone() -> None:
    """Their pool is seen and no decision is about it."""
    decision = looks(Planner(replace(CONFIG, max_encode=0), None), encoders(2, 100.0), 3)
    assert set(decision.target) == {Role.PREFILL, Role.DECODE}


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"min_encode": 5}, "min_encode is 5 and max_encode 4"),
    ({"load_scaling": False}, "encode workers are scaled by load only"),
    ({"max_gpu_budget": 2}, "the fewest workers need 3 GPUs"),
])
def test_wrong_bounds_are_refused(changes: dict[str, int], sentence: str) -> None:
    """With the fix."""
    with pytest.raises(ConfigError, match=sentence):
        replace(CONFIG, **changes)  # type: ignore[arg-type]


def test_the_settings_reach_the_roles_and_the_models_of_a_server() -> None:
    """Ensembles that chain encode workers with others are no encode workers."""
    chosen = parse(["--mode", "agg", "--max-encode", "2", "--encode-engine-num-gpu", "4"], {"TANDEM_DISCOVERY": "file:/tmp/x"})
    assert chosen.config.mode is Mode.AGGREGATED
    assert chosen.config.roles == (Role.AGGREGATED, Role.ENCODE)
    assert (chosen.config.gpus(Role.ENCODE), chosen.config.gpus(Role.AGGREGATED)) == (4, 1)
    names = ("encode", "encode_1", "encode_agg", "encode_disagg", "vllm")
    models = [Model(name, ModelState.UNAVAILABLE) for name in names]
    assert sort_models(models, [], chosen.service.triton_patterns[Role.ENCODE]).spare == ("encode", "encode_1")
