# SPDX-License-Identifier: Apache-2.0
"""`tandem plan`: how many workers the planner would want for a steady load, and why, term by term. Nothing is scaled or asked."""

import argparse
from pathlib import Path

import msgspec

from tandem_cli.turn import positive_float, print_json
from tandem_planner.config import PlannerConfig, Statistic
from tandem_planner.explain import lines
from tandem_planner.plan import Planner
from tandem_planner.profile_data import read_profile
from tandem_planner.terms import Decision, Latency, Mode, Observation, Pool, Traffic
from tandem_protocol.errors import ConfigError

MOST_WORKERS = 10_000
_DEFAULTS = PlannerConfig()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--profile", type=Path, required=True, metavar="DIR", help="what `tandem profile` or Dynamo's profiler wrote")
    parser.add_argument("--rate", type=positive_float, required=True, help="requests per second")
    parser.add_argument("--isl", type=positive_float, default=_DEFAULTS.isl, help="prompt tokens (default: %(default)g)")
    parser.add_argument("--osl", type=positive_float, default=_DEFAULTS.osl, help="generated tokens (default: %(default)g)")
    parser.add_argument("--cached", type=_fraction, default=0.0, metavar="SHARE",
                        help="of prompt tokens that need no prefill, 0 to 1 (default: %(default)g)")
    parser.add_argument("--ttft", type=positive_float, default=_DEFAULTS.ttft, help="target in ms (default: %(default)g)")
    parser.add_argument("--itl", type=positive_float, default=_DEFAULTS.itl, help="target in ms (default: %(default)g)")
    parser.add_argument("--statistic", choices=[one.value for one in Statistic], default=_DEFAULTS.sla_statistic.value,
                        help="what the targets are for (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=_DEFAULTS.max_gpu_budget, help="budget; -1: no bound (default: %(default)s)")
    parser.add_argument("--mode", choices=[one.value for one in Mode], default=_DEFAULTS.mode.value, help="pools (default: %(default)s)")
    parser.add_argument("--prefill-engine-num-gpu", type=int, default=1, metavar="N", help="GPUs of a prefill engine (default: 1)")
    parser.add_argument("--decode-engine-num-gpu", type=int, default=1, metavar="N", help="GPUs of any other engine (default: 1)")
    parser.add_argument("--explain", action="store_true", help="print every term")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every term")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    decision = decide(args)
    if args.json:
        print_json(msgspec.to_builtins(decision))
    else:
        print("\n".join(lines(decision)) if args.explain else _summary(decision))
    return 0


def decide(args: argparse.Namespace) -> Decision:
    """One decision for an empty fleet. Raises ConfigError for a bad profile, and for targets that are out of reach."""
    if not args.profile.is_dir():
        raise ConfigError(f"{args.profile} is not a folder: name the one that `tandem profile` wrote")
    config = PlannerConfig(
        mode=Mode(args.mode), isl=args.isl, osl=args.osl, ttft=args.ttft, itl=args.itl, sla_statistic=Statistic(args.statistic),
        max_gpu_budget=args.gpus, prefill_engine_num_gpu=args.prefill_engine_num_gpu, decode_engine_num_gpu=args.decode_engine_num_gpu,
        load_scaling=False, no_correction=True, max_throughput_scaling_replicas=MOST_WORKERS,
    )
    return Planner(config, read_profile(args.profile)).decide(_observation(args, config))


def _observation(args: argparse.Namespace, config: PlannerConfig) -> Observation:
    """A steady load on pools that have nobody yet; latencies are not looked at without correction."""
    requests = args.rate * config.adjustment_interval
    ttft, itl = (Latency(target, target, target, target) for target in (config.ttft_s, config.itl_s))
    traffic = Traffic(config.adjustment_interval, requests, args.isl, args.osl, ttft, itl, request_s=0.0, cached_fraction=args.cached)
    return Observation(0.0, {role: Pool(0, 0) for role in config.mode.roles}, traffic)


def _summary(decision: Decision) -> str:
    gpus = next(term for term in decision.terms if term.name == "gpus")
    counts = ", ".join(f"{workers} {role.value}" for role, workers in decision.target.items())
    wanted = {term.role: term.value for term in decision.terms if term.name == "wanted"}
    cut = f"; {decision.reason}" if any(workers < wanted[role] for role, workers in decision.target.items()) else ""
    return f"{counts}: {gpus.value:.0f} GPUs, {gpus.how}{cut}"


def _fraction(text: str) -> float:
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value
