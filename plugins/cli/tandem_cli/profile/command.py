# SPDX-License-Identifier: Apache-2.0
"""Measures what an engine can do, for the planner, and says what it advises.

With --admin or --max-kv-tokens: a server that runs already; nothing else should use it meanwhile. With neither: `tandem serve` is started
with --model, once per tensor-parallel size, and ended; options that are not listed here are handed to it.
Point by point; cut short, it goes on where it was when it is run again with the same --out.
"""

import argparse
import json
import signal
from pathlib import Path

from tandem_cli.profile.advising import advice_for, advice_json, advice_lines
from tandem_cli.profile.choices import measure_choices
from tandem_cli.profile.recommending import parallel_sizes, recommendation_for, recommendation_json, recommendation_lines, write_best
from tandem_cli.profile.server import grid_plan, kv_tokens_of, measure_server
from tandem_cli.serve.preflight import detect_hardware
from tandem_cli.turn import positive_float
from tandem_planner.profiler.journal import Subject
from tandem_protocol.errors import ConfigError, EngineError

EXIT_WHOLE, EXIT_CUT_SHORT = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    add("--url", default="localhost:8001", help="gRPC address of a running Triton (default: %(default)s)")
    add("--model", help="running: the model's name (default: vllm); started: folder or hub id (default: the embedded model)")
    add("--tp", type=_sizes, default=(), metavar="1,2,4", help="started: tensor-parallel sizes (default: powers of two up to the GPUs)")
    add("--start-timeout-s", type=int, default=900, help="started: seconds to wait for an engine (default: %(default)s)")
    add("--out", type=Path, default=Path("profiling_results"), help="folder of the results (default: %(default)s)")
    add("--gpus", type=int, default=1, help="running: of the engine (default: %(default)s)")
    capacity = parser.add_mutually_exclusive_group()
    capacity.add_argument("--max-kv-tokens", type=int, help="tokens that the engine's KV cache holds")
    capacity.add_argument("--admin", metavar="URL", help="the worker's admin port, whose /metrics tell it")
    _add_grid_arguments(parser)
    add("--only", choices=("prefill", "decode"), help="measure one of the two")
    add("--limit-s", type=positive_float, help="measure so long at most, and write what was measured (default: until it is whole)")
    add("--timeout-s", type=positive_float, default=120.0, help="deadline of a request (default: %(default)s)")
    add("--ttft", type=positive_float, default=500.0, help="ms; target for the advice (default: %(default)s)")
    add("--itl", type=positive_float, default=50.0, help="ms; target for the advice (default: %(default)s)")
    add("--isl", type=positive_float, help="prompt tokens for the advice (default: 3000, or what was measured)")
    add("--osl", type=positive_float, default=150.0, help="generated tokens for the advice (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object")


def _add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--max-context", type=int, default=8192, help="tokens of prompt and answer (default: %(default)s)")
    add("--min-isl", type=int, default=128, help="shortest prompt (default: %(default)s)")
    add("--prefill-points", type=int, default=8, help="prompt lengths (default: %(default)s)")
    add("--contexts", type=int, default=4, help="context lengths of decode (default: %(default)s)")
    add("--loads", type=int, default=5, help="numbers of requests per context (default: %(default)s)")
    add("--decode-tokens", type=int, default=64, help="answer of a decode point (default: %(default)s)")
    add("--max-requests", type=int, default=256, help="at once, as the engine's max_num_seqs (default: %(default)s)")
    add("--repeats", type=int, default=3, help="of each prefill point (default: %(default)s)")
    add("--vocabulary", type=int, default=32_000, help="prompt token ids are below this (default: %(default)s)")
    add("--seed", type=int, default=1, help="of the prompts (default: %(default)s)")


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split(","))
    if min(sizes) < 1:
        raise ValueError
    return sizes


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand: 1 if it was cut short."""
    if min(args.gpus, args.repeats) < 1 or args.vocabulary < 2 or args.seed < 0:
        raise ConfigError("--gpus and --repeats must be at least 1, --vocabulary at least 2, --seed not negative")
    if args.admin is None and args.max_kv_tokens is None:
        return _run_started(args)
    if args.passthrough or args.tp:
        what = " ".join(args.passthrough) or "--tp"
        raise ConfigError(f"{what} is for engines that are started here: drop it, or drop --admin and --max-kv-tokens")
    return _run_running(args)


def _run_running(args: argparse.Namespace) -> int:
    plan = grid_plan(args, args.max_kv_tokens or kv_tokens_of(args.admin))
    subject = Subject(args.url, args.model or "vllm", args.gpus, args.repeats, args.seed)
    measured = measure_server(args, args.out, plan, subject, args.url, args.limit_s)
    advice = advice_for(args, measured.profile, args.gpus)
    if args.json:
        print(json.dumps({"out": str(args.out), "whole": measured.whole, "advice": advice_json(advice)}))
    else:
        print("\n".join([f"profile written to {args.out}", *([] if advice is None else advice_lines(advice))]))
    return EXIT_WHOLE if measured.whole else EXIT_CUT_SHORT


def _run_started(args: argparse.Namespace) -> int:
    """SIGTERM ends it as Ctrl-C does, so that no engine is left."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    choices = measure_choices(args, parallel_sizes(args.tp, detect_hardware().gpus))
    if not choices.profiles:
        raise EngineError("no engine could be measured: " + "; ".join(f"TP {size}: {why}" for size, why in choices.failed.items()))
    found = recommendation_for(args, choices.profiles)
    write_best(args.out, choices.profiles, found)
    if args.json:
        failed = {str(size): why for size, why in choices.failed.items()}
        print(json.dumps({"out": str(args.out), "whole": choices.whole, "measured": sorted(choices.profiles), "failed": failed,
                          "recommendation": recommendation_json(found)}))
    else:
        print("\n".join([f"profiles written to {args.out}", *(f"TP {size} left out: {why}" for size, why in choices.failed.items()),
                         *recommendation_lines(args.out, found)]))
    return EXIT_WHOLE if choices.whole else EXIT_CUT_SHORT
