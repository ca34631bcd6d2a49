# SPDX-License-Identifier: Apache-2.0
"""Measures what a running server can do, for the planner, and says what it advises. Nothing else should use the server.

Point by point; cut short, it goes on where it was when it is run again with the same --out.
"""

import argparse
import json
from pathlib import Path

from tandem_cli.profile.advising import advice_for, advice_json, advice_lines
from tandem_cli.profile.server import grid_plan, kv_tokens_of, measure_server
from tandem_cli.turn import positive_float
from tandem_planner.profiler.journal import Subject
from tandem_protocol.errors import ConfigError

EXIT_WHOLE, EXIT_CUT_SHORT = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    add("--url", default="localhost:8001", help="Triton's gRPC address (default: %(default)s)")
    add("--model", default="vllm", help="the model (default: %(default)s)")
    add("--out", type=Path, default=Path("profiling_results"), help="folder of the results (default: %(default)s)")
    add("--gpus", type=int, default=1, help="of the engine (default: %(default)s)")
    capacity = parser.add_mutually_exclusive_group(required=True)
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


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand: 1 if it was cut short."""
    if min(args.gpus, args.repeats) < 1 or args.vocabulary < 2 or args.seed < 0:
        raise ConfigError("--gpus and --repeats must be at least 1, --vocabulary at least 2, --seed not negative")
    plan = grid_plan(args, args.max_kv_tokens or kv_tokens_of(args.admin))
    subject = Subject(args.url, args.model, args.gpus, args.repeats, args.seed)
    measured = measure_server(args, args.out, plan, subject, args.url, args.limit_s)
    advice = advice_for(args, measured.profile, args.gpus)
    if args.json:
        print(json.dumps({"out": str(args.out), "whole": measured.whole, "advice": advice_json(advice)}))
    else:
        print("\n".join([f"profile written to {args.out}", *([] if advice is None else advice_lines(advice))]))
    return EXIT_WHOLE if measured.whole else EXIT_CUT_SHORT
