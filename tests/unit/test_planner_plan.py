# SPDX-License-Identifier: Apache-2.0
"""The planner as a whole: single decisions, restarts, missing data, and properties over random profiles and observations."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner_rig import Engine, Fleet, latency, pools, steady
from tandem_planner.config import PlannerConfig, PredictorName, Statistic, load_config
from tandem_planner.plan import Planner
from tandem_planner.profile_data import Profile
from tandem_planner.queueing import Queue
from tandem_planner.state import PlannerState
from tandem_planner.terms import Decision, Mode, Observation, Pool, Traffic, WorkerLoad
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role

Drawn = tuple[int, int, list[tuple[float, float, float]]]
Seen = tuple[float, Drawn, Drawn, Traffic | None]
CONFIG = PlannerConfig(ttft=200, itl=12, osl=300, adjustment_interval=60, max_gpu_budget=16, worker_start=0)
PROFILE = Engine().profile(loads=16)


def _counts(decision: Decision) -> tuple[int, int]:
    return decision.target[Role.PREFILL], decision.target[Role.DECODE]


def _term(decision: Decision, name: str, role: Role | None = None) -> float:
    return next(term.value for term in decision.terms if term.name == name and term.role is role)


def test_a_plan_covers_the_traffic_at_once() -> None:
    """40 requests/s on one worker each: prefill for 3.8 engines always busy, with the queue in mind."""
    decision = Planner(CONFIG, PROFILE).decide(Observation(60, pools(1, 1), steady(40)))
    assert _counts(decision) == (6, 1)
    assert decision.reason == "prefill 1 -> 6: the traffic needs them; decode stays at 1"
    assert _term(decision, "prefill_offered", Role.PREFILL) == pytest.approx(3.8, rel=0.01)
    assert _term(decision, "gpus") == 7


def test_nothing_to_go_by_is_no_decision() -> None:
    """No traffic and no load figures: the fleet stays, whatever it is."""
    planner = Planner(CONFIG, PROFILE)
    bare = {role: Pool(pool.ready, pool.wanted) for role, pool in pools(5, 4).items()}
    for at in range(1, 100):
        assert _counts(planner.decide(Observation(60.0 * at, bare))) == (5, 4)


@pytest.mark.parametrize("broken", [
    {"requests": math.nan}, {"isl": math.inf}, {"osl": -1.0}, {"interval_s": 0.0}, {"requests": 0.0}, {"ttft": latency(math.nan)},
])
def test_figures_that_are_none_are_no_traffic(broken: dict[str, object]) -> None:
    """Whoever observed them."""
    planner = Planner(CONFIG, PROFILE)
    decision = planner.decide(Observation(60, pools(3, 3), replace(steady(40), **broken)))  # type: ignore[arg-type]
    assert _counts(decision) == (3, 3)
    assert planner.state.planned_at_s is None


def test_a_pool_that_cant_be_read_keeps_its_count() -> None:
    """And counts against the budget; one of which nothing was ever seen is left out."""
    planner = Planner(replace(CONFIG, max_gpu_budget=8), PROFILE)
    assert Role.DECODE not in planner.decide(Observation(5, {Role.PREFILL: pools(1, 1)[Role.PREFILL]})).target
    planner.decide(Observation(60, pools(3, 4), steady(10)))
    decision = planner.decide(Observation(120, {Role.PREFILL: pools(3, 1)[Role.PREFILL]}, steady(60)))
    assert _counts(decision) == (4, 4)
    assert "decode stays at 4: it could not be read" in decision.reason


def test_a_step_of_traffic_is_met_within_two_intervals() -> None:
    """Three times as much: after two plans the fleet has what it keeps from then on, with every predictor that is there."""
    for name in (PredictorName.CONSTANT, PredictorName.KALMAN):
        fleet = Fleet(Planner(replace(CONFIG, load_predictor=name), PROFILE), Engine())
        fleet.run(lambda _: 12.0, 1200)
        before = fleet.prefill
        fleet.run(lambda _: 36.0, 120)
        after = fleet.prefill
        fleet.run(lambda _: 36.0, 1200)
        assert before < fleet.prefill <= after


def test_a_burst_is_met_by_load_before_the_next_plan() -> None:
    """Twenty seconds after it began."""
    fleet = Fleet(Planner(replace(CONFIG, adjustment_interval=180), PROFILE), Engine(), interval_s=180)
    fleet.run(lambda _: 8.0, 900)
    before = fleet.prefill
    fleet.run(lambda _: 40.0, 20)
    assert fleet.prefill >= before + 2


@pytest.mark.parametrize(("rate", "slower", "noise", "statistic"), [
    (21.0, 1.0, 0.0, Statistic.P95), (37.0, 1.3, 0.0, Statistic.P95), (9.9, 1.0, 0.1, Statistic.P95), (37.0, 1.25, 0.1, Statistic.MEAN),
    (2.0, 0.7, 0.05, Statistic.P95), (37.0, 1.6, 0.15, Statistic.P95),
])
def test_constant_load_does_not_oscillate(rate: float, slower: float, noise: float, statistic: Statistic) -> None:
    """Two hours, engines other than the profile says, noisy arrivals: it settles, and without noise it doesn't turn at all."""
    fleet = Fleet(Planner(replace(CONFIG, sla_statistic=statistic), PROFILE), Engine(), slower=slower, noise=noise)
    fleet.run(lambda _: rate, 600)
    fleet.counts.clear()
    fleet.run(lambda _: rate, 7200)
    assert fleet.changes <= (6 if noise else 0)
    assert len(set(fleet.counts[len(fleet.counts) * 3 // 4:])) == 1


@pytest.mark.parametrize(("slower", "variability", "service"), [(1.0, 0.5, 1.0), (0.5, 0.5, 0.6), (1.5, 1.0, 1.5)])
def test_what_is_learnt_keeps_the_target(slower: float, variability: float, service: float) -> None:
    """Queues shorter than modelled make no engine faster; faster engines, and slower ones once they miss the target, are known as such."""
    fleet = Fleet(Planner(CONFIG, PROFILE), Engine(), slower=slower, variability=variability)
    fleet.run(lambda _: 37.0, 3600)
    learnt = math.exp(fleet.planner.state.of(Role.PREFILL).log_service)
    assert learnt == pytest.approx(service, abs=0.0 if service == 1 else 0.15)
    assert Engine().ttft_ms(3000) / 1e3 * slower + Queue(37.0, 0.095 * slower, variability).wait_s(fleet.prefill, 0.95) <= 0.2


def test_without_a_profile_load_alone_scales_and_does_not_oscillate() -> None:
    """The case of issue 4420: one worker is too few, two look idle. After one try the lesson is learnt."""
    fleet = Fleet(Planner(replace(CONFIG, itl=1000), None), Engine())
    fleet.run(lambda _: 12.0, 4 * 3600)
    assert fleet.prefill == 2
    assert fleet.changes <= 4


def test_an_idle_fleet_goes_down_to_its_floors() -> None:
    """When traffic ended the plan lapses, and workers that have nothing to do go, one by one; a fleet that can't be read stays."""
    planner = Planner(replace(CONFIG, min_prefill=2), PROFILE)
    fleet = Fleet(planner, Engine())
    fleet.run(lambda _: 40.0, 600)
    high = (fleet.prefill, fleet.decode)
    fleet.run(lambda _: 0.0, 3600)
    assert high[0] > 4
    assert (fleet.prefill, fleet.decode) == (2, 1)


def test_a_partly_read_pool_does_not_shrink() -> None:
    """One worker of four is silent: perhaps it is the one with the queue."""
    planner, seen = Planner(CONFIG, None), pools(4, 4)
    partly = {role: replace(pool, loads=pool.loads[1:]) for role, pool in seen.items()}
    for at in range(1, 200):
        assert _counts(planner.decide(Observation(5.0 * at, partly))) == (4, 4)


def test_workers_that_start_are_not_asked_for_again() -> None:
    """While one of three starts, the same overload asks for the same three."""
    planner = Planner(CONFIG, None)
    loads = tuple(WorkerLoad(f"p{at}", queued_prefill_tokens=13_000.0) for at in range(2))
    first = planner.decide(Observation(5, {Role.PREFILL: Pool(2, 2, loads), Role.DECODE: Pool(1, 1)}))
    again = planner.decide(Observation(10, {Role.PREFILL: Pool(2, 2, loads), Role.DECODE: Pool(1, 1)}))
    later = [planner.decide(Observation(15.0 + 5 * at, {Role.PREFILL: Pool(2, 3, loads), Role.DECODE: Pool(1, 1)})) for at in range(10)]
    assert [decision.target[Role.PREFILL] for decision in (first, again, *later)] == [2] + [3] * 11


def test_a_restart_makes_no_jump() -> None:
    """A planner with the state of another decides as that one would have."""
    fleet = Fleet(Planner(CONFIG, PROFILE), Engine(), slower=1.2)
    fleet.run(lambda at: 20 + 10 * math.sin(at / 300), 2000)
    again = Planner(CONFIG, PROFILE, PlannerState.decode(fleet.planner.state.encode()))
    for at in range(60):
        seen = Observation(fleet.at_s + 5.0 * (at + 1), pools(3, 2, 500.0, 0.2), steady(24.0) if at % 12 == 0 else None)
        assert again.decide(seen) == fleet.planner.decide(seen)
    with pytest.raises(ConfigError, match="no state of a planner"):
        PlannerState.decode(b'{"roles": 3}')


def test_an_agg_fleet_and_single_pools_are_planned() -> None:
    """Only the pools of the mode appear."""
    for mode, role in ((Mode.AGGREGATED, Role.AGGREGATED), (Mode.PREFILL, Role.PREFILL), (Mode.DECODE, Role.DECODE)):
        planner = Planner(replace(CONFIG, mode=mode, itl=20), PROFILE)
        decision = planner.decide(Observation(60, {role: Pool(1, 1), **{one: Pool(1, 1) for one in Role if one is not role}}, steady(160)))
        assert set(decision.target) == {role}
        assert decision.target[role] > 1


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"ttft": 50}, r"TTFT 50 ms is not reachable at ISL 3000: the profile's best is 95 ms; it is up to ISL 1160"),
    ({"ttft": 1}, "the profile's best is 95 ms$"),
    ({"itl": 4}, r"ITL 4 ms is not reachable at a context of 3150 tokens: the profile's best is 5\.\d ms"),
])
def test_targets_out_of_reach_are_refused_with_what_is_reachable(changes: dict[str, float], sentence: str) -> None:
    """At start, since no number of workers would help."""
    with pytest.raises(ConfigError, match=sentence):
        Planner(replace(CONFIG, **changes), PROFILE)  # type: ignore[arg-type]


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"ttft": 0}, "ttft is 0, but must be above 0: set TANDEM_PLANNER_TTFT"),
    ({"itl": -5}, "itl is -5"),
    ({"ttft": math.nan}, "ttft is nan"),
    ({"max_gpu_budget": 1}, "the fewest workers need 2 GPUs, but the budget is 1"),
    ({"load_interval": 100}, "lower it"),
])
def test_wrong_settings_are_refused(changes: dict[str, float], sentence: str) -> None:
    """Negative, zero and contradictory ones, with the fix."""
    with pytest.raises(ConfigError, match=sentence):
        replace(CONFIG, **changes)  # type: ignore[arg-type]


def test_a_planner_that_can_decide_by_nothing_is_refused() -> None:
    """No profile and no load scaling; and a profile without the part that its mode needs."""
    with pytest.raises(ConfigError, match="nothing can decide"):
        Planner(replace(CONFIG, load_scaling=False), None)
    with pytest.raises(ConfigError, match="no decode figures"):
        Planner(CONFIG, Profile(prefill=PROFILE.prefill))
    Planner(replace(CONFIG, mode=Mode.PREFILL), Profile(prefill=PROFILE.prefill))


def test_settings_come_from_flags_then_the_environment() -> None:
    """Dynamo's names; an unknown one is an error."""
    config = load_config({"ttft": "321"}, {"TANDEM_PLANNER_TTFT": "5", "TANDEM_PLANNER_ITL": "7", "TANDEM_PLANNER_MODE": "agg"})
    assert (config.ttft, config.itl, config.mode) == (321, 7, Mode.AGGREGATED)
    assert load_config({"max_gpu_budget": "-1"}, {}).budget is None
    with pytest.raises(ConfigError, match="TANDEM_PLANNER_SLA_STATISTIC"):
        load_config({"sla_statistic": "p42"}, {})
    with pytest.raises(ConfigError, match="unknown planner setting"):
        load_config({"ttfft": "1"}, {})


_engines = st.builds(
    Engine, first_ms=st.floats(1, 100), tokens_per_ms=st.floats(1, 400), step_ms=st.floats(1, 30), per_request_ms=st.floats(0.001, 1),
    per_kv_ms=st.floats(0.1, 30), max_kv_tokens=st.floats(2e4, 5e6),
)
_load = st.tuples(st.floats(0, 50), st.floats(0, 2e5), st.floats(0, 1))
_pool = st.tuples(st.integers(0, 12), st.integers(0, 12), st.lists(_load, max_size=6))
_traffic = st.none() | st.builds(
    steady, rate=st.floats(0.01, 300), isl=st.floats(1, 30_000), osl=st.floats(1, 3000), interval_s=st.sampled_from([10.0, 60.0]),
    ttft_s=st.floats(0.001, 90), itl_s=st.floats(1e-4, 2),
)
_configs = st.builds(
    PlannerConfig, ttft=st.just(1e6), itl=st.just(1e6), adjustment_interval=st.sampled_from([10.0, 60.0]),
    max_gpu_budget=st.integers(18, 60) | st.just(-1), min_endpoint=st.integers(0, 3), min_decode=st.none() | st.integers(0, 3),
    prefill_engine_num_gpu=st.integers(1, 3), decode_engine_num_gpu=st.integers(1, 3), max_throughput_scaling_replicas=st.integers(1, 6),
    sla_statistic=st.sampled_from(list(Statistic)), load_scaling=st.booleans(), scale_down_window=st.just(10.0),
    scale_down_patience=st.integers(1, 2), load_predictor=st.just(PredictorName.KALMAN),
)


@given(_configs, st.none() | _engines, st.lists(st.tuples(st.floats(1, 200), _pool, _pool, _traffic), min_size=1, max_size=25))
@settings(max_examples=120, deadline=None)
def test_every_decision_respects_budget_floors_and_steps(config: PlannerConfig, engine: Engine | None, seen: list[Seen]) -> None:
    """Whatever the profile, and however absurd the sequence of observations."""
    if engine is None and not config.load_scaling:
        config = replace(config, load_scaling=True)
    planner, at_s = Planner(config, engine.profile(4, 4) if engine else None), 0.0
    for passed, prefill, decode, traffic in seen:
        at_s += passed
        seen_pools = {Role.PREFILL: _pool_of(prefill), Role.DECODE: _pool_of(decode)}
        decision = planner.decide(Observation(at_s, seen_pools, traffic))
        _check(config, seen_pools, decision)


def _pool_of(drawn: Drawn) -> Pool:
    ready, wanted, loads = drawn
    return Pool(ready, wanted, tuple(WorkerLoad(str(at), *load) for at, load in enumerate(loads[:ready])))


def _check(config: PlannerConfig, seen: dict[Role, Pool], decision: Decision) -> None:
    used = sum(workers * config.gpus(role) for role, workers in decision.target.items())
    assert config.budget is None or used <= config.budget
    for role, workers in decision.target.items():
        now, step = seen[role].wanted, config.max_throughput_scaling_replicas
        assert workers >= config.floor(role)
        assert workers <= max(now + step, config.floor(role))
        assert workers >= now - step or config.budget is not None  # a budget may take more at once
    assert all(not math.isnan(term.value) for term in decision.terms)
    assert decision.reason
