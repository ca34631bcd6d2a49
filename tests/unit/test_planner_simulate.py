# SPDX-License-Identifier: Apache-2.0
"""A simulated fleet answers every request once, takes as long as its profile says, and gets no worse by more workers."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_planner.config import PlannerConfig
from tandem_planner.predict.arima import ArimaPredictor
from tandem_planner.predict.forecast import Forecaster, TrafficHistory
from tandem_planner.predict.kalman import KalmanPredictor
from tandem_planner.predict.seasonal import SeasonalPredictor
from tandem_planner.predict.series import ConstantPredictor, Point
from tandem_planner.simulate.analytic import Roofline
from tandem_planner.simulate.fleet import Fleet, FleetSettings
from tandem_planner.simulate.load import Lengths, Load, arrivals, constant, parse_shape
from tandem_planner.simulate.observing import observe
from tandem_planner.simulate.policies import StaticPolicy
from tandem_planner.simulate.requests import SimRequest
from tandem_planner.simulate.run import Run, Schedule, simulate
from tandem_planner.simulate.times import EngineTimes, PrefillTimes, engine_times
from tandem_planner.simulate.traces import cached_tokens, read_trace
from tandem_planner.simulate.workers import EngineLimits, Life
from tandem_planner.terms import Decision, Mode, Observation
from tandem_planner.traces import TraceRequest
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role

PROFILE = Roofline().profile()
TIMES = engine_times(PROFILE)
DISAGG, AGG = FleetSettings(start_s=20.0), FleetSettings(mode=Mode.AGGREGATED, start_s=20.0)


@dataclass
class Restless:
    """Wants other sizes at every look; keeps what it saw."""

    sizes: Iterator[int]
    seen: list[Observation] = field(default_factory=list)

    def decide(self, observation: Observation) -> Decision:
        self.seen.append(observation)
        return Decision(observation.at_s, {role: next(self.sizes) for role in observation.pools}, "restless")


def sizes(mode: Mode, *counts: int) -> dict[Role, int]:
    return dict(zip(mode.roles, counts, strict=True))


def one(tokens: int, output: int, cached: int = 0, count: int = 1) -> Load:
    """`count` equal requests at once."""
    return Load("one", np.zeros(count), np.full(count, tokens), np.full(count, output), np.full(count, cached), 10.0)


def static(load: Load, fleet: FleetSettings, counts: Mapping[Role, int], times: EngineTimes = TIMES) -> Run:
    return simulate(load, times, fleet, StaticPolicy(counts), counts)


def mean_latency_s(run: Run) -> float:
    return float(np.mean([request.end_s - request.at_s for request in run.requests]))


@settings(max_examples=40, deadline=None)
@given(mode=st.sampled_from((Mode.DISAGGREGATED, Mode.AGGREGATED)), seed=st.integers(0, 999), rate=st.floats(0.5, 30),
       counts=st.lists(st.integers(0, 4), max_size=12), sigma=st.sampled_from((0.0, 1.0)))
def test_every_request_ends_once_however_the_fleet_is_scaled(mode: Mode, seed: int, rate: float, counts: list[int], sigma: float) -> None:
    """Even when pools go down to nothing for a while."""
    load = arrivals(constant(rate, 20), Lengths(2000, 50, sigma), seed) if rate * 20 > 40 else one(2000, 50, count=5)
    fleet = FleetSettings(mode=mode, start_s=3.0)
    policy = Restless(itertools.chain(counts, itertools.repeat(1)))
    done = simulate(load, TIMES, fleet, policy, dict.fromkeys(mode.roles, 1), Schedule(5, 10))
    assert not done.gave_up
    assert len(done.requests) == len(load)
    assert all(request.at_s <= request.first_s <= request.end_s + 1e-9 for request in done.requests)


def test_the_books_of_a_fleet_are_right_at_every_look() -> None:
    """Requests come, run or have ended; nothing is noted twice."""
    load = arrivals(constant(20, 30), Lengths(3000, 100, 0.8), 3)
    fleet = Fleet(TIMES, DISAGG, sizes(Mode.DISAGGREGATED, 2, 1))
    requests = [SimRequest(number, *row) for number, row in enumerate(zip(load.at_s.tolist(), load.input_tokens.tolist(),
                                                                          load.output_tokens.tolist(), strict=True))]
    arrived = 0
    for at, count in zip(range(5, 100, 5), itertools.cycle((1, 3, 2))):
        arrived = fleet.run_until(load, requests, arrived, float(at))
        fleet.scale(Role.PREFILL, count)
        fleet.check_integrity()
        assert arrived == fleet.in_flight + len(fleet.ends)
    assert fleet.in_flight == 0
    assert set(Counter(milestone.request.number for milestone in fleet.ends).values()) == {1}
    assert set(Counter(milestone.request.number for milestone in fleet.firsts).values()) == {1}


def test_a_lonely_request_takes_what_the_profile_says() -> None:
    """Disaggregated: prefill, transfer and a step to the first token, then a step per token."""
    (request,) = static(one(3072, 101), DISAGG, sizes(Mode.DISAGGREGATED, 1, 1)).requests
    roof = Roofline()
    transfer = DISAGG.transfer_s + 3072 * DISAGG.transfer_token_s
    assert request.ttft_s == pytest.approx(roof.prefill_s(3072) + transfer + roof.decode_s(0, 3072), rel=0.01)
    assert request.itl_s == pytest.approx(roof.decode_s(0, 3122), rel=0.02)


def test_a_lonely_request_on_an_aggregated_worker_has_its_first_token_from_the_prefill() -> None:
    (request,) = static(one(3072, 101), AGG, sizes(Mode.AGGREGATED, 1)).requests
    assert request.ttft_s == pytest.approx(Roofline().prefill_s(3072), rel=0.01)
    assert request.itl_s == pytest.approx(Roofline().decode_s(0, 3122), rel=0.02)


def test_a_batch_decodes_at_the_profiles_step_time() -> None:
    """All requests come at once, so that nearly all of the time the batch is whole."""
    done = static(one(1000, 400, count=64), DISAGG, sizes(Mode.DISAGGREGATED, 1, 1))
    context = 1200
    expected = Roofline().decode_s(64 * context / TIMES.max_kv_tokens, context)
    assert done.requests[-1].itl_s == pytest.approx(expected, rel=0.1)


def test_prompts_wait_in_order_for_one_prefill_worker() -> None:
    """Ten prompts of 8,192 tokens fill a step each."""
    done = static(one(8192, 1, count=10), DISAGG, sizes(Mode.DISAGGREGATED, 1, 1))
    firsts = [request.first_s for request in done.requests]
    assert firsts == sorted(firsts)
    assert firsts[-1] - firsts[0] == pytest.approx(9 * Roofline().prefill_s(8192), rel=0.01)


def test_a_cached_prefix_saves_its_time_and_not_that_of_the_attention_to_it() -> None:
    """From 16,384 tokens with half of them cached to the whole, and to a prompt of the other half."""
    ttft = [static(one(tokens, 1, cached), AGG, sizes(Mode.AGGREGATED, 1)).requests[0].ttft_s
            for tokens, cached in ((16384, 0), (16384, 8192), (8192, 0))]
    assert ttft[0] > ttft[1] > ttft[2]


def test_a_prompt_slows_down_what_decodes_beside_it() -> None:
    """An aggregated worker's ITL suffers from prompts, a decode worker's doesn't."""
    first, second = one(500, 300), Load("later", np.array([0.5]), np.array([8192]), np.array([10]), np.array([0]), 10.0)
    both = Load("both", np.array([0.0, 0.5]), np.array([500, 8192]), np.array([300, 10]), np.array([0, 0]), 10.0)
    assert len(second) == 1
    alone = static(first, AGG, sizes(Mode.AGGREGATED, 1)).requests[0].end_s
    beside = static(both, AGG, sizes(Mode.AGGREGATED, 1)).requests[0].end_s
    assert beside - alone == pytest.approx(Roofline().prefill_s(8192), rel=0.1)
    assert static(both, DISAGG, sizes(Mode.DISAGGREGATED, 1, 1)).requests[0].end_s == pytest.approx(alone, rel=0.2)


def test_what_no_worker_can_hold_is_refused_and_ends() -> None:
    done = static(one(TIMES.max_kv_tokens, 1), DISAGG, sizes(Mode.DISAGGREGATED, 1, 1))
    assert done.requests[0].refused
    assert not done.gave_up


def test_kv_cache_bounds_the_batch() -> None:
    """Requests that fill a third of it each: three at a time."""
    done = static(one(TIMES.max_kv_tokens // 3 - 100, 100, count=6), DISAGG, sizes(Mode.DISAGGREGATED, 6, 1))
    ends = sorted(request.end_s for request in done.requests)
    assert ends[3] - ends[2] > 50 * Roofline().decode_s(0.5, 1e5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), rate=st.floats(3, 25), prefill=st.integers(1, 3), decode=st.integers(1, 2),
       sigma=st.sampled_from((0.0, 0.7)))
def test_more_workers_are_never_worse_on_average(seed: int, rate: float, prefill: int, decode: int, sigma: float) -> None:
    """Of either role; 3 % for the chance that another placement makes."""
    load = arrivals(constant(rate, 30), Lengths(3000, 100, sigma), seed)
    base = mean_latency_s(static(load, DISAGG, sizes(Mode.DISAGGREGATED, prefill, decode)))
    for more in ((prefill + 1, decode), (prefill, decode + 1)):
        assert mean_latency_s(static(load, DISAGG, sizes(Mode.DISAGGREGATED, *more))) <= base * 1.03


def test_the_same_arguments_make_the_same_run() -> None:
    def once() -> list[tuple[float, float]]:
        load = arrivals(parse_shape("sine:5-20:60:60"), Lengths(2000, 100, 0.5), 7)
        done = simulate(load, TIMES, DISAGG, Restless(itertools.cycle((1, 3, 2))), sizes(Mode.DISAGGREGATED, 1, 1))
        return [(request.first_s, request.end_s) for request in done.requests]

    assert once() == once()


def test_a_worker_costs_from_its_start_and_serves_after_it() -> None:
    fleet = Fleet(TIMES, DISAGG, sizes(Mode.DISAGGREGATED, 1, 1))
    fleet.scale(Role.PREFILL, 2)
    fleet.run_until(one(1, 1), [], 1, 10.0)
    assert (fleet.pools()[Role.PREFILL].ready, fleet.pools()[Role.PREFILL].wanted) == (1, 2)
    assert fleet.gpu_seconds() == pytest.approx(30.0)
    fleet.run_until(one(1, 1), [], 1, 20.0)
    assert fleet.pools()[Role.PREFILL].settled
    fleet.scale(Role.PREFILL, 1)
    assert fleet.gpu_seconds() == pytest.approx(60.0)


def test_a_draining_worker_ends_its_requests_first_and_costs_until_then() -> None:
    load = one(3000, 200, count=2)
    fleet = Fleet(TIMES, DISAGG, sizes(Mode.DISAGGREGATED, 2, 2))
    fleet.run_until(load, [SimRequest(0, 0.0, 3000, 200), SimRequest(1, 0.0, 3000, 200)], 0, 0.5)
    fleet.scale(Role.DECODE, 1)
    assert fleet.in_flight == 2
    assert fleet.pools()[Role.DECODE].ready == 1
    fleet.run_until(load, [], 2, 10.0)
    assert fleet.in_flight == 0
    (gone,) = fleet.gone
    assert gone.life is Life.GONE
    assert 0.5 < gone.ended_s < 10


def test_a_worker_that_is_not_wanted_any_more_never_starts() -> None:
    fleet = Fleet(TIMES, DISAGG, sizes(Mode.DISAGGREGATED, 1, 1))
    fleet.scale(Role.DECODE, 3)
    fleet.scale(Role.DECODE, 1)
    fleet.run_until(one(1, 1), [], 1, 100.0)
    assert fleet.pools()[Role.DECODE].ready == 1
    assert fleet.gpu_seconds() == pytest.approx(200.0)


def test_what_a_planner_sees_is_what_happened() -> None:
    """Traffic comes once per window, with the requests that arrived in it."""
    load = arrivals(constant(10, 60), Lengths(1000, 20), 5)
    policy = Restless(itertools.cycle([2]))
    done = simulate(load, TIMES, DISAGG, policy, sizes(Mode.DISAGGREGATED, 2, 2), Schedule(5, 30))
    traffic = [seen.traffic for seen in policy.seen if seen.traffic is not None]
    assert [round(seen.at_s) for seen in policy.seen if seen.traffic is not None][:2] == [30, 60]
    assert sum(item.requests for item in traffic) == sum(request.at_s <= policy.seen[-1].at_s // 30 * 30 for request in done.requests)
    assert traffic[0].isl == 1000
    assert traffic[0].ttft.p50 == pytest.approx(np.median([r.ttft_s for r in done.requests]), rel=0.2)
    assert all(math.isfinite(item.request_s) for item in traffic)


def test_without_an_ended_request_there_is_no_traffic() -> None:
    fleet = Fleet(TIMES, DISAGG, sizes(Mode.DISAGGREGATED, 1, 1))
    fleet.run_until(one(1, 1), [], 1, 60.0)
    seen = observe(fleet, 60.0)
    assert seen.traffic is None
    assert seen.missing


def test_traces_are_read_with_what_a_cache_would_have(tmp_path: Path) -> None:
    """The second prompt repeats two blocks of the first; a cache of one block has less."""
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 5000, "input_length": 1200, "output_length": 7, "hash_ids": [1, 2, 9]}\n'
                    '{"timestamp": 1000, "input_length": 1500, "output_length": 3, "hash_ids": [1, 2, 3]}\n')
    load = read_trace(path, 10_000)
    assert load.at_s.tolist() == [0.0, 4.0]
    assert load.cached_tokens.tolist() == [0, 1024]
    assert read_trace(path, 512, speed=2).cached_tokens.tolist() == [0, 512]
    assert read_trace(path, 512, speed=2).at_s.tolist() == [0.0, 2.0]


def test_a_cache_forgets_what_was_used_longest_ago() -> None:
    lines = [TraceRequest(0.0, 512, 1, [block]) for block in (1, 2, 1, 3, 2, 3)]
    assert cached_tokens(lines, 1024) == [0, 0, 512, 0, 0, 512]


@pytest.mark.parametrize("text", ["", '{"timestamp": 1}', "nonsense", '{"timestamp": 1, "input_length": 0, "output_length": 1}'])
def test_what_is_no_trace_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError):
        read_trace(path, 0)


@pytest.mark.parametrize("text", ["", "sine", "sine:5:6:7", "sine:5-45:0:10", "constant:0:10", "constant:nan:10", "burst:1-2:3:4",
                                  "step:-1-2:3:4", "constant:1e9:1e9"])
def test_a_wrong_load_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(ConfigError):
        arrivals(parse_shape(text), Lengths(), 1)


@pytest.mark.parametrize(("text", "early", "late"), [("sine:5-45:600:600", 5, 44), ("step:10-30:300:600", 10, 30),
                                                     ("burst:10-30:20+560:600", 10, 30)])
def test_arrivals_follow_their_rate(text: str, early: float, late: float) -> None:
    load = arrivals(parse_shape(text), Lengths(), 1)
    assert (load.at_s < 20).sum() / 20 == pytest.approx(early, rel=0.35)
    assert ((load.at_s > 300) & (load.at_s < 330)).sum() / 30 == pytest.approx(late, rel=0.15)


def test_lengths_have_the_mean_that_was_asked_for() -> None:
    load = arrivals(constant(50, 200), Lengths(3000, 300, 0.8), 1)
    assert load.input_tokens.mean() == pytest.approx(3000, rel=0.05)
    assert load.output_tokens.min() >= 1


def test_times_between_and_beyond_points() -> None:
    """Linear, also beyond the last point; never below the first one's share."""
    curve = PrefillTimes((100, 200), (0.02, 0.03))
    assert curve.step_s == pytest.approx(0.01)
    assert curve.of(150) == pytest.approx(0.025)
    assert curve.of(400) == pytest.approx(0.05)
    assert curve.of(50) == pytest.approx(0.015)
    with pytest.raises(ConfigError):
        PrefillTimes((2, 1), (1.0, 1.0))


def test_a_fleet_that_answers_nobody_is_refused() -> None:
    with pytest.raises(ConfigError, match="agg or disagg"):
        FleetSettings(mode=Mode.DECODE)


def test_limits_of_an_engine_bound_its_batch() -> None:
    """Two sequences at most: four requests take two rounds."""
    fleet = FleetSettings(limits=EngineLimits(max_num_seqs=2))
    ends = sorted(request.end_s for request in static(one(100, 200, count=4), fleet, sizes(Mode.DISAGGREGATED, 4, 1)).requests)
    assert ends[2] - ends[1] > 100 * Roofline().decode_s(0, 200)


def test_traffic_is_foreseen_for_the_time_at_which_a_new_worker_serves() -> None:
    """On a line every predictor that knows slopes goes on along it for a start more; the constant one can't."""
    step_s, points = 30.0, [Point(30.0 * number, 10.0 + number) for number in range(30)]
    assert KalmanPredictor().ahead(points, step_s, 3.0) == pytest.approx(42.0, abs=0.5)
    assert ArimaPredictor().ahead(points, step_s, 3.0) == pytest.approx(42.0, abs=0.5)
    assert ConstantPredictor().ahead(points, step_s, 3.0) == 39.0
    config = PlannerConfig(adjustment_interval=30.0, worker_start=60.0)
    demand, degraded = Forecaster(config).next(TrafficHistory(tuple(points), tuple(points), tuple(points)))
    assert demand.requests_per_s == pytest.approx(42.0, abs=0.5)
    assert not degraded


def test_a_seasonal_series_is_foreseen_through_its_turn() -> None:
    """A noisy sine: at its trough, the rise to come is known; a filter of slopes can't know it."""
    rng = np.random.default_rng(1)
    values = [25 - 20 * math.cos(2 * math.pi * number / 40) + rng.normal(0, 1) for number in range(81)]
    points = [Point(15.0 * number, value) for number, value in enumerate(values)]
    seasonal = SeasonalPredictor(KalmanPredictor(r=1.0, q_trend=1.0))
    truth = 25 - 20 * math.cos(2 * math.pi * 88 / 40)
    assert seasonal.ahead(points, 15.0, 8.0) == pytest.approx(truth, abs=2)
    assert abs(seasonal.trend.ahead(points, 15.0, 8.0) - truth) > 5
    shifted = [Point(point.at_s, point.value + (10 if number > 70 else 0)) for number, point in enumerate(points)]
    assert seasonal.ahead(shifted, 15.0, 8.0) == pytest.approx(truth + 10, abs=4)


@pytest.mark.parametrize("kind", ["noise", "line", "step", "same", "short"])
def test_what_has_no_season_is_left_to_the_filter(kind: str) -> None:
    rng = np.random.default_rng(2)
    series = {"noise": 20 + rng.normal(0, 1, 100), "line": np.arange(100.0), "step": np.where(np.arange(100) < 50, 10.0, 30.0),
              "same": np.full(100, 7.0), "short": 25 - 20 * np.cos(2 * np.pi * np.arange(45) / 40)}[kind]
    points = [Point(15.0 * number, float(value)) for number, value in enumerate(series)]
    assert SeasonalPredictor().ahead(points, 15.0, 3.0) == KalmanPredictor().ahead(points, 15.0, 3.0)
