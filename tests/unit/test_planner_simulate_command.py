# SPDX-License-Identifier: Apache-2.0
"""`tandem simulate` from its words to its figures, and the benchmark's search and headline."""

import functools
import json
from pathlib import Path

import pytest
from benchmarks.planner import WITHIN_SLA, Bench, goodput, goodput_within_sla, headline, oracle_name, static
from benchmarks.planner_oracle import make_oracle
from benchmarks.planner_scenarios import MAX_GPUS, Scenario, beginning

from tandem_cli.main import main
from tandem_planner.capacity import Capacity
from tandem_planner.profile_data import write_profile
from tandem_planner.simulate.analytic import Roofline
from tandem_planner.simulate.choosing import make_policy, parse_sizes
from tandem_planner.simulate.load import Lengths, arrivals, constant, step
from tandem_planner.simulate.results import Targets
from tandem_planner.simulate.times import engine_times
from tandem_planner.sla_plan import SlaModel
from tandem_planner.sla_plan import Targets as SlaTargets
from tandem_planner.terms import Mode, Observation
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role

SHORT = ["simulate", "--load", "step:4-12:60:120", "--ttft", "400", "--itl", "15", "--adjustment-interval", "30", "--start-s", "10"]
PROFILE = Roofline().profile()


def test_planners_are_compared_over_one_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over a profile from files; the page is written, the figures agree with it."""
    write_profile(PROFILE, tmp_path / "profile")
    page = tmp_path / "report.html"
    names = ["tandem", "hpa", "reference", "static:2x1"]
    flags = [flag for name in names for flag in ("--planner", name)]
    assert main([*SHORT, "--profile", str(tmp_path / "profile"), *flags, "--json", "--report", str(page)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [run["policy"] for run in told["runs"]] == names
    assert len({run["requests"] for run in told["runs"]}) == 1
    assert all(run["unfinished"] == 0 and run["gpu_hours"] > 0 for run in told["runs"])
    assert told["runs"][3]["mean_gpus"] == pytest.approx(3)
    assert page.read_text().count("<svg") == 4 * len(names)


def test_the_analytic_profile_says_that_nobody_measured_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "--profile", "analytic", "--planner", "static:2", "--mode", "agg"]) == 0
    said = capsys.readouterr().out
    assert "NOT MEASURED" in said
    assert "static:2" in said


def test_a_trace_is_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(f'{{"timestamp": {number * 500}, "input_length": 600, "output_length": 20, "hash_ids": [1, {number + 2}]}}\n'
                             for number in range(40)))
    assert main(["simulate", "--trace", str(trace), "--profile", "analytic", "--planner", "static:1x1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["requests"] == 40


@pytest.mark.parametrize("wrong", [["--planner", "magic"], ["--planner", "static:0x1"], ["--begin", "3"], ["--mode", "decode"],
                                   ["--planner", "reference", "--mode", "agg"], ["--sigma", "-1"]])
def test_what_makes_no_sense_is_misuse(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "--profile", "analytic", *wrong]) == 2
    assert capsys.readouterr().err.startswith("tandem: ")


def test_sizes_are_as_many_as_the_mode_has_roles() -> None:
    assert parse_sizes("4x2", Mode.DISAGGREGATED) == {Role.PREFILL: 4, Role.DECODE: 2}
    assert parse_sizes("4", Mode.AGGREGATED) == {Role.AGGREGATED: 4}
    with pytest.raises(ConfigError):
        parse_sizes("4x", Mode.DISAGGREGATED)


@functools.cache
def bench() -> Bench:
    """One for all tests: it keeps its runs."""
    scenario = Scenario("small", lambda profile, seed: arrivals(constant(12, 60), Lengths(3000, 100), seed), Targets(0.3, 0.015))
    return Bench(scenario, PROFILE, engine_times(PROFILE), scenario.load(PROFILE, 1), 15.0, 1)


def test_the_best_static_split_is_not_worse_than_any_other_small_one() -> None:
    """The search finds what trying all finds."""
    made = bench()
    best = made.best_static(goodput)
    worth = made.run(static(best)).goodput_per_gpu_hour
    others = [made.run(static((prefill, decode))).goodput_per_gpu_hour for prefill in range(1, 5) for decode in range(1, 4)]
    assert worth == max(others)
    assert sum(best) <= MAX_GPUS


def test_the_best_split_within_the_sla_keeps_it() -> None:
    made = bench()
    kept = made.run(static(made.best_static(goodput_within_sla)))
    assert kept.sla_attainment >= WITHIN_SLA
    assert kept.goodput_per_gpu_hour <= made.run(static(made.best_static(goodput))).goodput_per_gpu_hour


def test_the_oracle_is_the_best_of_its_schedules() -> None:
    made = bench()
    best = made.oracle(goodput, static((4, 4)))
    assert made.run(best).goodput_per_gpu_hour >= made.run_oracle((1.0, 1.0)).goodput_per_gpu_hour
    assert oracle_name((1.0, 0.9)) == "oracle:1x0.9"
    assert made.run(made.oracle(goodput_within_sla, static((4, 4)))).sla_attainment >= WITHIN_SLA


def test_what_stays_as_it_is_counts_as_a_schedule_too() -> None:
    made = bench()
    split = static(made.best_static(goodput))
    assert made.run(made.oracle(goodput, split)).goodput_per_gpu_hour >= made.run(split).goodput_per_gpu_hour


def test_the_oracle_asks_for_workers_a_start_before_they_are_needed_and_within_the_budget() -> None:
    load = arrivals(step(2, 30, 300, 600), Lengths(3000, 300), 1)
    scenario = Scenario("jump", lambda *_: load, Targets(0.3, 0.010))
    model = SlaModel(Capacity.of(PROFILE), SlaTargets.of(scenario.config(15.0)), 1, 1)
    ones = {Role.PREFILL: 1.0, Role.DECODE: 1.0}
    wide = make_oracle(load, model, 30.0, ones, 16).schedule
    for counts in wide.values():
        before, after = counts[200 // 5], counts[400 // 5]
        assert before < after
        assert counts[(300 - 30) // 5] > before
    tight = make_oracle(load, model, 30.0, ones, 5)
    assert max(map(sum, zip(*tight.schedule.values(), strict=True))) <= 5
    assert min(min(counts) for counts in tight.schedule.values()) >= 1
    assert tight.decide(Observation(1e9, {})).target == {role: counts[-1] for role, counts in tight.schedule.items()}


def test_every_planner_begins_with_what_the_first_half_minute_asks_for() -> None:
    made = bench()
    sizes = beginning(made.scenario, PROFILE, made.load)
    assert sizes[Role.PREFILL] >= 2
    assert made.run("hpa").requests == len(made.load)
    policy = make_policy("tandem", made.scenario.config(15.0), PROFILE)
    assert policy is not make_policy("tandem", made.scenario.config(15.0), PROFILE)


def test_the_headline_is_of_the_scenarios_that_it_names() -> None:
    def result(worth: float, attained: float, turns: int, scale_up: float | None) -> dict[str, object]:
        planners = {"tandem": {"sla_attainment": attained, "oscillations": turns, "scale_up_s": scale_up}}
        return {"goodput_vs_best_static": {"tandem": worth}, "planners": planners, "goodput_of_oracle": {"tandem": 0.8},
                "goodput_of_oracle_within_sla": {"tandem": 0.9}, "goodput_vs_best_static_within_sla": {"tandem": 1.5}}

    found = headline({"sine": result(1.4, 0.96, 9, None), "constant": result(1.0, 1.0, 0, None), "burst": result(1.1, 0.9, 3, 30.0)}, 15.0)
    near = dict.fromkeys( ("sine", "constant", "burst"), 0.8)
    assert found == {"goodput_vs_best_static": 1.4, "sla_attainment": 0.96, "oscillations": 0, "goodput_of_oracle": near,
                     "goodput_of_oracle_within_sla": dict.fromkeys(near, 0.9),
                     "goodput_vs_best_static_within_sla": dict.fromkeys(near, 1.5),
                     "scale_up_intervals": {"step": None, "burst": 2.0}}
