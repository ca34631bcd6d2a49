# SPDX-License-Identifier: Apache-2.0
"""`tandem simulate`: a fleet under a load or a trace, in virtual time, scaled by a planner; what it would have served and cost.

Workers take as long as the profile says; everything else (placement, transfers, starts) is a model, see docs/limits.md.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from tandem_cli.turn import positive_float
from tandem_planner.config import PlannerConfig, load_config
from tandem_planner.profile_data import Profile, read_profile
from tandem_planner.simulate.analytic import Roofline
from tandem_planner.simulate.choosing import NAMES, beginning, make_policy, parse_sizes
from tandem_planner.simulate.fleet import FleetSettings
from tandem_planner.simulate.load import Lengths, Load, arrivals, parse_shape
from tandem_planner.simulate.report import Subject, milliseconds, page
from tandem_planner.simulate.results import Summary, Targets, summarize, to_json
from tandem_planner.simulate.run import Schedule, simulate
from tandem_planner.simulate.times import engine_times
from tandem_planner.simulate.traces import read_trace
from tandem_planner.terms import Mode
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role

ANALYTIC = "analytic"
_FLAGS = ("mode", "adjustment_interval", "load_interval", "max_gpu_budget", "min_endpoint", "prefill_engine_num_gpu",
          "decode_engine_num_gpu", "ttft", "itl", "load_predictor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--load", help="sine:5-45:600:1800 (requests/s, period, duration), constant:, step:, burst:")
    what.add_argument("--trace", type=Path, help="a Mooncake-style trace (JSON lines)")
    parser.add_argument("--profile", required=True, help=f"folder of `tandem profile`, or `{ANALYTIC}`: an 8B roofline, not measured")
    parser.add_argument("--planner", action="append", metavar="NAME", help=f"one of {', '.join(NAMES)}; repeatable (default: tandem)")
    parser.add_argument("--begin", metavar="SIZES", help="workers at the beginning, such as 2x1 (default: one per role, or static's own)")
    add_load_arguments(parser)
    for name in _FLAGS:
        parser.add_argument(f"--{name.replace('_', '-')}", help="as the planner's setting (docs/configuration.md)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page with plots")


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """What a load and a fleet are made of."""
    parser.add_argument("--isl", type=positive_float, default=3000, help="prompt tokens of a --load, mean (default: %(default)s)")
    parser.add_argument("--osl", type=positive_float, default=300, help="generated tokens of a --load, mean (default: %(default)s)")
    parser.add_argument("--sigma", type=float, default=0.0, help="of log-normal lengths of a --load; 0: all equal (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of arrivals and lengths (default: %(default)s)")
    parser.add_argument("--speed", type=positive_float, default=1.0, help="trace: so many times as fast (default: %(default)s)")
    parser.add_argument("--cache-tokens", type=int, help="of the prefix cache before the fleet, for a trace (default: one worker's KV)")
    parser.add_argument("--start-s", type=float, default=60.0, help="seconds a worker takes to start (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    profile, note = load_profile(args.profile)
    config = load_config({name: text for name in _FLAGS if (text := getattr(args, name)) is not None})
    load = make_load(args, profile)
    targets = Targets(config.ttft_s, config.itl_s)
    subjects = [_subject(name, args, config, profile, load, targets) for name in args.planner or ["tandem"]]
    if args.report:
        args.report.write_text(page(f"tandem simulate: {load.name}", note, targets, subjects))
    if args.json:
        print(json.dumps({"notes": note, "runs": [to_json(subject.summary) for subject in subjects]}))
    else:
        print("\n".join([*note, *(line(subject.summary) for subject in subjects)]))
    return 0


def load_profile(text: str) -> tuple[Profile, list[str]]:
    """The profile, and what a reader must know of it."""
    if text == ANALYTIC:
        roofline = Roofline()
        return roofline.profile(), [roofline.assumptions()]
    return read_profile(Path(text)), [f"profile: {text}"]


def make_load(args: argparse.Namespace, profile: Profile) -> Load:
    """The trace, or arrivals of the shape."""
    if args.trace is not None:
        whole = profile.decode.max_kv_tokens if profile.decode else 0
        return read_trace(args.trace, int(whole) if args.cache_tokens is None else args.cache_tokens, args.speed)
    if args.sigma < 0 or args.seed < 0:
        raise ConfigError("--sigma and --seed must not be negative")
    return arrivals(parse_shape(args.load), Lengths(args.isl, args.osl, args.sigma), args.seed)


def _subject(name: str, args: argparse.Namespace, config: PlannerConfig, profile: Profile, load: Load, targets: Targets) -> Subject:
    settings = fleet_settings(config, args.start_s)
    sizes = parse_sizes(args.begin, config.mode) if args.begin else beginning(name, config.mode)
    expected = replace(config, isl=float(load.input_tokens.mean()), osl=float(load.output_tokens.mean()), worker_start=args.start_s)
    policy = make_policy(name, expected, profile)
    done = simulate(load, engine_times(profile), settings, policy, sizes, Schedule(config.load_interval, config.adjustment_interval))
    return Subject(summarize(name, done, targets, config.adjustment_interval), done)


def fleet_settings(config: PlannerConfig, start_s: float) -> FleetSettings:
    """A fleet of this planner's engines."""
    if config.mode not in (Mode.AGGREGATED, Mode.DISAGGREGATED):
        raise ConfigError("simulate scales whole fleets: --mode agg or disagg")
    return FleetSettings(mode=config.mode, start_s=start_s, gpus={role: config.gpus(role) for role in Role})


def line(summary: Summary) -> str:
    """One run for people."""
    return (f"{summary.policy:<12} {summary.good}/{summary.requests} good, {summary.goodput_per_gpu_hour:.0f} per GPU hour, "
            f"{summary.sla_attainment:.1%} of intervals within SLA, {summary.mean_gpus:.2f} GPUs, "
            f"TTFT p50/p95/p99 {milliseconds(summary.ttft_s)} ms, ITL {milliseconds(summary.itl_s)} ms, {summary.oscillations} turns")
