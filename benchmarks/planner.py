# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.planner`: what planners make of one simulated fleet, in virtual time: goodput per GPU, SLA, oscillations.

The profile is by default one of an 8B shape measured on one H200 (benchmarks/profiles), or another measured one (`--profile DIR`, see
benchmarks/gpu/run.sh planner-profile). `--profile analytic` is the ANALYTIC roofline of tandem_planner.simulate.analytic, which nobody
measured.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.planner_oracle import make_oracle, uphill
from benchmarks.planner_scenarios import MAX_GPUS, SCENARIOS, SETTLED_S, START_S, Scenario, beginning, fleet
from tandem_planner.capacity import Capacity
from tandem_planner.plan import Planner
from tandem_planner.predict.warmup import history_of
from tandem_planner.profile_data import Profile, read_profile
from tandem_planner.simulate.analytic import Roofline
from tandem_planner.simulate.choosing import make_policy, parse_sizes
from tandem_planner.simulate.load import Load
from tandem_planner.simulate.report import Subject, milliseconds, page
from tandem_planner.simulate.results import Summary, summarize
from tandem_planner.simulate.run import Schedule, simulate
from tandem_planner.simulate.times import EngineTimes, engine_times
from tandem_planner.sla_plan import SlaModel
from tandem_planner.sla_plan import Targets as SlaTargets
from tandem_planner.terms import Mode
from tandem_protocol.roles import Role

MEASURED = Path(__file__).parent / "profiles" / "h200-llama-8b-shape"
ANALYTIC = "analytic"
PLANNERS, WARM = ("tandem", "hpa", "reference"), "tandem_warm"
TICK_S = 5.0
WITHIN_SLA = 0.95
"""Of the intervals: what a split or a schedule must keep to count as one within the SLA."""
JUDGED_S = 30.0
"""Of the intervals that are within the SLA or not; whatever the planner's own."""
_COLUMNS = ("goodput_per_gpu_hour", "sla_attainment", "request_attainment", "mean_gpus", "gpu_hours", "oscillations", "scale_up_s")
_BY_SCENARIO = ("goodput_vs_best_static_within_sla", "goodput_of_oracle", "goodput_of_oracle_within_sla")
"""Ratios of Tandem's planner."""


@dataclass
class Bench:
    """One scenario's runs, each made once."""

    scenario: Scenario
    profile: Profile
    times: EngineTimes
    load: Load
    interval_s: float
    seed: int
    done: dict[str, Subject] = field(default_factory=dict)

    def run(self, name: str) -> Summary:
        """A planner by name, as `tandem simulate --planner` knows it."""
        if name not in self.done:
            policy = self._warm_planner() if name == WARM else make_policy(name, self.scenario.config(self.interval_s), self.profile)
            run = simulate(self.load, self.times, fleet(), policy, self._begin(name), Schedule(TICK_S, self.interval_s))
            self.done[name] = Subject(summarize(name, run, self.scenario.targets, JUDGED_S, SETTLED_S), run)
        return self.done[name].summary

    def _warm_planner(self) -> Planner:
        """As after `load_predictor_warmup_trace`, with a trace that ends when the run begins. The past's last interval is left out."""
        past = self.scenario.load(self.profile, self.seed + 1)
        requests = zip(past.at_s.tolist(), past.input_tokens.tolist(), past.output_tokens.tolist(), strict=True)
        planner = Planner(self.scenario.config(self.interval_s), self.profile)
        planner.warm_up(history_of(requests, self.interval_s, end_s=-self.interval_s))
        return planner

    def oracle(self, worth: "Worth", best_static: str) -> str:
        """The schedule that is worth most of those that know the load beforehand (`planner_oracle`), by name; to stay as it is is one."""
        found = oracle_name(uphill(lambda prefill, decode: worth(self.run_oracle((prefill, decode)))))
        return max((found, best_static), key=lambda name: worth(self.run(name)))

    def run_oracle(self, factors: tuple[float, float]) -> Summary:
        """One schedule, made with these headrooms of prefill and decode."""
        name = oracle_name(factors)
        if name not in self.done:
            config = self.scenario.config(self.interval_s)
            model = SlaModel(Capacity.of(self.profile), SlaTargets.of(config), 1, 1)
            policy = make_oracle(self.load, model, START_S, dict(zip(Mode.DISAGGREGATED.roles, factors, strict=True)), MAX_GPUS)
            run = simulate(self.load, self.times, fleet(), policy, policy.beginning(), Schedule(TICK_S, self.interval_s))
            self.done[name] = Subject(summarize(name, run, self.scenario.targets, JUDGED_S, SETTLED_S), run)
        return self.done[name].summary

    def _begin(self, name: str) -> dict[Role, int]:
        kind, _, sizes = name.partition(":")
        return parse_sizes(sizes, Mode.DISAGGREGATED) if kind == "static" else beginning(self.scenario, self.profile, self.load)

    def best_static(self, worth: "Worth") -> tuple[int, int]:
        """The split that is worth most: the best of a coarse grid, then uphill to a neighbour while one is better."""

        def of(split: tuple[int, int]) -> float:
            return worth(self.run(static(split)))

        best = max(((prefill, decode) for prefill in (2, 4, 6, 9) for decode in (1, 2, 4)), key=of)
        while (better := max(_neighbours(best), key=of)) != best:
            best = better
        return best


Worth = Callable[[Summary], float]


def goodput(summary: Summary) -> float:
    """Good requests per GPU hour, however many intervals miss the SLA."""
    return summary.goodput_per_gpu_hour


def goodput_within_sla(summary: Summary) -> float:
    """The same where the SLA is kept; below 0 where it isn't, the better kept the higher."""
    return summary.goodput_per_gpu_hour if summary.sla_attainment >= WITHIN_SLA else summary.sla_attainment - 1


def _neighbours(split: tuple[int, int]) -> list[tuple[int, int]]:
    """Itself first, so that equals don't move."""
    prefill, decode = split
    around = [(prefill, decode), (prefill + 1, decode), (prefill - 1, decode), (prefill, decode + 1), (prefill, decode - 1)]
    return [(p, d) for p, d in around if p >= 1 and d >= 1 and p + d <= MAX_GPUS]


def static(split: tuple[int, int]) -> str:
    """The name of a static policy."""
    return f"static:{split[0]}x{split[1]}"


def oracle_name(factors: tuple[float, float]) -> str:
    """The name of a schedule that was made beforehand."""
    return f"oracle:{factors[0]:g}x{factors[1]:g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; progress goes to stderr."""
    args = _parser().parse_args(argv)
    profile, note = _profile(args.profile)
    results = {}
    for scenario in SCENARIOS:
        if scenario.name in args.scenarios:
            results[scenario.name] = _scenario(scenario, profile, args)
    report = {"profile": note, "command": " ".join(sys.argv), "start_s": START_S, "interval_s": args.interval_s, "seed": args.seed,
              "max_gpus": MAX_GPUS, **headline(results, args.interval_s), "scenarios": results}
    print(json.dumps(report) if args.json else to_text(report))
    return 0


def _profile(name: str) -> tuple[Profile, str]:
    """The profile, and what is to be said of it."""
    if name == ANALYTIC:
        return Roofline().profile(), Roofline().assumptions()
    folder = MEASURED if name == MEASURED.name else Path(name)
    return read_profile(folder), f"profile: {folder.name}" if folder == MEASURED else f"profile: {folder}"


def _scenario(scenario: Scenario, profile: Profile, args: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(scenario, profile, engine_times(profile), scenario.load(profile, args.seed), args.interval_s, args.seed)
    names = _names(bench)
    figures = {what: _figures(bench.run(name)) for what, name in names.items()}
    for what in names:
        print(f"{scenario.name:<9} {what:<17} {_line(bench.run(names[what]))}", file=sys.stderr, flush=True)
    if args.report:
        args.report.mkdir(parents=True, exist_ok=True)
        shown = [bench.done[name] for name in dict.fromkeys(names.values())]
        text = page(f"Planner benchmark: {scenario.name}", [_profile(args.profile)[1]], scenario.targets, shown)
        (args.report / f"{scenario.name}.html").write_text(text)
    return {"targets_ms": [scenario.targets.ttft_s * 1e3, scenario.targets.itl_s * 1e3], "requests": len(bench.load), "planners": figures,
            "goodput_vs_best_static": _over(figures, "best_static"),
            "goodput_vs_best_static_within_sla": _over(figures, "static_within_sla"),
            "goodput_of_oracle": _over(figures, "oracle"), "goodput_of_oracle_within_sla": _over(figures, "oracle_within_sla")}


def _names(bench: Bench) -> dict[str, str]:
    """What is shown -> the policy's name."""
    split = bench.best_static(goodput)
    best, kept = static(split), static(bench.best_static(goodput_within_sla))
    return {
        "best_static": best, "bad_static": static(split[::-1]) if split[0] != split[1] else static((split[0] + 2, 1)),
        "static_within_sla": kept, **{name: name for name in PLANNERS}, **({WARM: WARM} if bench.scenario.warm else {}),
        "oracle": bench.oracle(goodput, best), "oracle_within_sla": bench.oracle(goodput_within_sla, kept),
    }


def _over(figures: dict[str, dict[str, Any]], what: str) -> dict[str, float | None]:
    """Every policy's goodput per GPU over that of one; null where that has none."""
    worth = figures[what]["goodput_per_gpu_hour"]
    return {name: one["goodput_per_gpu_hour"] / worth if worth else None for name, one in figures.items()}


def _figures(summary: Summary) -> dict[str, Any]:
    latencies = {"ttft_ms": milliseconds(summary.ttft_s), "itl_ms": milliseconds(summary.itl_s)}
    return {"policy": summary.policy, **{name: getattr(summary, name) for name in _COLUMNS}, **latencies}


def _line(summary: Summary) -> str:
    return (f"{summary.policy:<11} {summary.goodput_per_gpu_hour:7.0f} good/GPU h  {summary.sla_attainment:6.1%} of intervals  "
            f"{summary.mean_gpus:5.2f} GPUs  {summary.oscillations} turns")


def headline(results: dict[str, dict[str, Any]], interval_s: float) -> dict[str, Any]:
    """The keys by which runs are compared; null for a scenario that was not run. The first two are of `sine`."""

    def tandem(scenario: str, name: str) -> Any:
        return results[scenario]["planners"]["tandem"][name] if scenario in results else None

    scale_up = {name: tandem(name, "scale_up_s") for name in ("step", "burst")}
    return {
        "goodput_vs_best_static": results["sine"]["goodput_vs_best_static"]["tandem"] if "sine" in results else None,
        "sla_attainment": tandem("sine", "sla_attainment"),
        "oscillations": tandem("constant", "oscillations"),
        **{key: {name: result[key]["tandem"] for name, result in results.items()} for key in _BY_SCENARIO},
        "scale_up_intervals": {name: None if seconds is None else seconds / interval_s for name, seconds in scale_up.items()},
    }


def to_text(report: dict[str, Any]) -> str:
    """For people."""
    keys = ("goodput_vs_best_static", "sla_attainment", "oscillations", "scale_up_intervals", *_BY_SCENARIO)
    rows = [f"{scenario:<9} {what:<17} {figures['policy']:<11} {figures['goodput_per_gpu_hour']:7.0f} {figures['sla_attainment']:7.1%} "
            f"{figures['mean_gpus']:6.2f} {figures['oscillations']:3d}  {figures['ttft_ms']}  {figures['itl_ms']}"
            for scenario, result in report["scenarios"].items() for what, figures in result["planners"].items()]
    columns = "scenario, planner, good/GPU hour, intervals within SLA, GPUs, turns, TTFT, ITL"
    return "\n".join([report["profile"], report["command"], "", columns, *rows, "", *(f"{key}: {report[key]}" for key in keys)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", action="store_true", help="end with one line of JSON instead of a table")
    add("--profile", default=MEASURED.name, help="folder of `tandem profile`, or `analytic`, which is not measured (default: %(default)s)")
    names = tuple(scenario.name for scenario in SCENARIOS)
    add("--scenarios", type=lambda text: tuple(text.split(",")), default=names, help=f"comma-separated, of {', '.join(names)}")
    add("--interval-s", type=float, default=15.0, help="adjustment interval (default: %(default)s)")
    add("--seed", type=int, default=1, help="of the loads (default: %(default)s)")
    add("--report", type=Path, metavar="FOLDER", help="write a page with plots per scenario")
    return parser


if __name__ == "__main__":
    sys.exit(main())
