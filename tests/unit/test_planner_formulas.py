# SPDX-License-Identifier: Apache-2.0
"""The formulas: the reference's with its own cases, queueing against known figures, the budget, our plan against the engine's formula."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner_rig import Engine
from tandem_planner import reference
from tandem_planner.budget import Ask, within_budget
from tandem_planner.capacity import Capacity, Demand
from tandem_planner.queueing import Queue, erlang_c
from tandem_planner.reference import Engines, Interval
from tandem_planner.sla_plan import MOST_WORKERS, Corrections, SlaModel, Targets
from tandem_protocol.roles import Role

P95 = 0.95
PLANNED = (Role.PREFILL, Role.DECODE, Role.AGGREGATED)
"""Roles that the planner knows pools of."""


def _both(requests: float, prefill_rate: float, decode_rate: float, engines: Engines, isl: float = 3000, osl: float = 150,
          correction: float = 1.0) -> tuple[int, int]:
    """The reference's decision for one interval of 60 s, its interpolators replaced by figures."""
    interval = Interval(requests, isl, osl, 60.0)
    prefill = reference.prefill_replicas(interval, prefill_rate, engines, correction)
    return reference.budgeted(prefill, reference.decode_replicas(interval, decode_rate, engines), engines)


@pytest.mark.parametrize(("name", "found", "expected"), [
    ("one of each is enough", _both(10, 40_000, 10_000, Engines(max_gpu_budget=10)), (1, 1)),
    ("from low to high load", _both(500, 40_000, 1_000, Engines(max_gpu_budget=10)), (1, 2)),
    ("a budget of three", _both(50, 40_000, 10_000, Engines(max_gpu_budget=3)), (1, 1)),
    ("at least two", _both(1, 40_000, 10_000, Engines(min_endpoint=2, max_gpu_budget=10), isl=100, osl=10), (2, 2)),
    ("a correction above one is ignored", _both(10, 40_000, 10_000, Engines(max_gpu_budget=10), correction=2.5), (1, 1)),
    ("engines of two and four GPUs", _both(20, 40_000, 5_000, Engines(2, 4, max_gpu_budget=10)), (1, 1)),
    ("five GPUs for engines of two", _both(100, 10_000, 1_000, Engines(2, 2, max_gpu_budget=5)), (1, 1)),
    ("a correction below one counts", _both(2_000, 10_000, 10_000, Engines(max_gpu_budget=-1), correction=0.5), (5, 1)),
    ("a load in proportion", _both(4_000, 40_000, 1_000, Engines(max_gpu_budget=-1)), (5, 10)),
])
def test_the_reference_decides_as_in_its_own_cases(name: str, found: tuple[int, int], expected: tuple[int, int]) -> None:
    """Rates in tokens/s per GPU, intervals of 60 s, prompts of 3000 and answers of 150 tokens unless said otherwise."""
    assert found == expected, name


@pytest.mark.parametrize(("counts", "engines", "expected"), [
    ((4, 4), Engines(max_gpu_budget=8), (4, 4)),
    ((8, 8), Engines(max_gpu_budget=8), (4, 4)),
    ((1, 30), Engines(max_gpu_budget=8), (1, 7)),
    ((30, 1), Engines(max_gpu_budget=8), (7, 1)),
    ((6, 6), Engines(2, 4, max_gpu_budget=12), (2, 2)),
    ((3, 1), Engines(4, 1, max_gpu_budget=12), (2, 4)),
    ((3, 3), Engines(4, 4, max_gpu_budget=7), (0, 0)),
    ((100, 100), Engines(max_gpu_budget=-1), (100, 100)),
])
def test_the_references_budget(counts: tuple[int, int], engines: Engines, expected: tuple[int, int]) -> None:
    """Prefill in proportion, decode the rest, even more than it asked for; nothing at all if the minima don't fit."""
    assert reference.budgeted(*counts, engines) == expected


def test_a_decode_correction_of_nothing_leaves_the_target() -> None:
    """Zero and below can't be divided by."""
    assert [reference.decode_target_ms(10.0, one) for one in (0.0, -1.0, 2.0)] == [10.0, 10.0, 5.0]


def test_the_references_corrections_are_observed_over_profiled() -> None:
    """TTFT at the prompt length; ITL at the concurrency of whole requests."""
    capacity, engine = Capacity.of(Engine().profile()), Engine()
    assert capacity.prefill is not None
    assert capacity.decode is not None
    assert reference.prefill_correction(190.0, capacity.prefill, 3000) == pytest.approx(190 / engine.ttft_ms(3000), rel=0.01)
    seen = Interval(600, 3000, 300, 60.0)  # 10 requests/s of 3 s on one worker: 30 in flight of 3150 tokens
    expected = 20.0 / engine.itl_ms(30 * 3150 / 1e6, 3150)
    assert reference.decode_correction(20.0, capacity.decode, seen, 1, 3.0) == pytest.approx(expected, rel=0.05)
    assert reference.replicas(seen, capacity.prefill, capacity.decode, Engines(), 12.0) == (1, 1)


@pytest.mark.parametrize(("engines", "offered", "expected"), [
    (1, 0.5, 0.5), (2, 1.0, 1 / 3), (3, 2.0, 0.4444), (10, 8.0, 0.4092), (5, 6.0, 1.0),
])
def test_erlang_c(engines: int, offered: float, expected: float) -> None:
    """Against tables; an overload always waits."""
    assert erlang_c(engines, offered) == pytest.approx(expected, abs=2e-4)


def test_waiting_times_of_one_engine_are_those_of_the_books() -> None:
    """M/M/1 and M/D/1 at half load, service 0.1 s: means 0.1 and 0.05 s; p95 of M/M/1 is ln(0.5 / 0.05) x 0.2 s."""
    assert Queue(5.0, 0.1).wait_s(1, None) == pytest.approx(0.1)
    assert Queue(5.0, 0.1, variability=0.5).wait_s(1, None) == pytest.approx(0.05)
    assert Queue(5.0, 0.1).wait_s(1, P95) == pytest.approx(math.log(10) * 0.2)
    assert Queue(9.9, 0.1).wait_s(1, P95) == math.inf
    assert Queue(0.0, 0.1).wait_s(0, P95) == 0.0


@given(st.floats(0.01, 200), st.floats(0.001, 2), st.floats(0.001, 5), st.sampled_from([None, 0.5, P95, 0.99]))
def test_the_fewest_engines_are_enough_and_no_more(rate: float, service_s: float, wait_s: float, quantile: float | None) -> None:
    """One fewer would wait too long."""
    queue = Queue(rate, service_s)
    engines = queue.engines_for(wait_s, quantile, MOST_WORKERS)
    assert queue.wait_s(engines, quantile) <= wait_s
    assert engines == 1 or queue.wait_s(engines - 1, quantile) > wait_s


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 8), st.integers(1, 8), st.integers(0, 3), st.integers(0, 3),
       st.integers(0, 60))
def test_the_budget_raises_the_pool_that_is_worst_off(p: int, d: int, gp: int, gd: int, fp: int, fd: int, spare: int) -> None:
    """Within the budget and never above the wish; no other grant gives the worse-off pool a larger share."""
    budget = fp * gp + fd * gd + spare
    granted = within_budget({Role.PREFILL: Ask(p, gp, fp), Role.DECODE: Ask(d, gd, fd)}, budget)
    mine, yours = granted[Role.PREFILL], granted[Role.DECODE]
    want_p, want_d = max(p, fp), max(d, fd)
    assert mine * gp + yours * gd <= budget
    assert fp <= mine <= want_p
    assert fd <= yours <= want_d

    def worst(one: int, two: int) -> float:
        return min(one / want_p if want_p else 1.0, two / want_d if want_d else 1.0)

    every = itertools.product(range(fp, want_p + 1), range(fd, want_d + 1))
    fits = [worst(one, two) for one, two in every if one * gp + two * gd <= budget]
    assert worst(mine, yours) == pytest.approx(max(fits))


def test_where_the_reference_gives_decode_more_than_it_asked_for_ours_does_not() -> None:
    """Three prefill engines of four GPUs and one decode engine, of twelve GPUs: the rest stays free."""
    assert within_budget({Role.PREFILL: Ask(3, 4, 1), Role.DECODE: Ask(1, 1, 1)}, 12) == {Role.PREFILL: 2, Role.DECODE: 1}
    assert within_budget({Role.DECODE: Ask(9, 2, 1)}, 7) == {Role.DECODE: 3}
    assert within_budget({Role.DECODE: Ask(9, 2, 1)}, None) == {Role.DECODE: 9}


def _model(targets: Targets | None = None, corrections: Corrections | None = None) -> SlaModel:
    targets = targets or Targets(ttft_s=0.2, itl_s=0.012, quantile=P95)
    return SlaModel(Capacity.of(Engine().profile(loads=24)), targets, 1, 1, corrections or Corrections())


def test_prefill_knows_of_queueing() -> None:
    """95 ms a prompt: at 40 requests/s the reference's 4 engines would be busy for 95 %, and p95 of TTFT 0.6 s; ours keeps 200 ms."""
    model, demand = _model(), Demand(40.0, 3000, 300)
    capacity = model.capacity.prefill
    assert capacity is not None
    references = reference.prefill_replicas(Interval(40 * 60, 3000, 300, 60), capacity.throughput_per_gpu(3000), Engines(max_gpu_budget=-1))
    assert references == 4
    assert model.ttft_s(Role.PREFILL, demand, references, P95) > 0.4
    workers = model.need(Role.PREFILL, demand).workers
    assert model.ttft_s(Role.PREFILL, demand, workers, P95) <= 0.2
    assert model.ttft_s(Role.PREFILL, demand, workers - 1, P95) > 0.2


def test_cached_tokens_are_not_computed() -> None:
    """Half of each prompt in the cache: about half of the prefill engines, and just as many for decode."""
    whole, half = Demand(60.0, 6000, 300), Demand(60.0, 6000, 300, cached_fraction=0.5)
    assert _model().need(Role.PREFILL, half).workers < 0.65 * _model().need(Role.PREFILL, whole).workers
    assert _model().need(Role.DECODE, half).workers == _model().need(Role.DECODE, whole).workers


def test_decode_keeps_the_itl_of_the_engine() -> None:
    """As many engines as the formula of the engine itself gives, with room for chance only with a quantile."""
    demand, engine = Demand(40.0, 3000, 300), Engine()
    use = max(step / 1000 for step in range(1, 900) if engine.itl_ms(step / 1000, demand.context) <= 12.0)
    exact = 40 * 300 / (use * 1e6 / demand.context / 0.012)
    mean = _model(Targets(0.2, 0.012)).need(Role.DECODE, demand).workers
    assert mean == math.ceil(exact)
    assert mean <= _model().need(Role.DECODE, demand).workers <= mean + 1


def test_corrections_move_both_ways() -> None:
    """A slower fleet needs more engines, a faster one fewer."""
    demand = Demand(160.0, 3000, 300)
    for role in PLANNED:
        slow, as_is, fast = (_model(corrections=Corrections(one, one, min(1.0, one))).need(role, demand).workers for one in (1.5, 1.0, 0.6))
        assert slow > as_is > fast


def test_a_target_out_of_reach_buys_no_gpus() -> None:
    """Prompts of 30,000 tokens take four times the TTFT: engines are kept from queueing, and the term says so."""
    need = _model().need(Role.PREFILL, Demand(1.0, 16_000, 300))
    assert need.workers <= 3
    assert any("beyond the target" in term.how for term in need.terms)
    itl = _model(Targets(0.2, 0.001)).need(Role.DECODE, Demand(10.0, 3000, 300))
    assert itl.workers <= 10
    assert any("out of reach" in term.how for term in itl.terms)


def test_an_aggregated_pool_does_both() -> None:
    """More engines than either part alone, and no more than the sum of both pools and one."""
    model, demand = _model(Targets(0.3, 0.015, P95)), Demand(30.0, 3000, 300)
    prefill, decode, both = (model.need(role, demand).workers for role in (Role.PREFILL, Role.DECODE, Role.AGGREGATED))
    assert max(prefill, decode) < both <= prefill + decode + 1


@given(st.floats(0.01, 500), st.floats(1, 50_000), st.floats(1, 5000), st.floats(0, 1), st.sampled_from([None, 0.5, P95, 0.99]),
       st.sampled_from(PLANNED))
def test_more_traffic_never_needs_fewer_workers(rate: float, isl: float, osl: float, cached: float, quantile: float | None,
                                                role: Role) -> None:
    """And every need is a sensible number, for any traffic."""
    model = _model(Targets(0.2, 0.012, quantile))
    demand = Demand(rate, isl, osl, cached)
    workers = model.need(role, demand).workers
    assert 1 <= workers <= MOST_WORKERS
    assert workers <= model.need(role, demand.times(1.3)).workers
