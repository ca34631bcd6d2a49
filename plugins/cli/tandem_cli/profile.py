# SPDX-License-Identifier: Apache-2.0
"""`tandem profile`: measures what a running server can do, for the planner, and says what it advises. Nothing else should use the server.

Point by point; cut short, it goes on where it was when it is run again with the same --out.
"""

import argparse
import asyncio
import json
import re
import sys
import urllib.request
from pathlib import Path

import numpy as np

from tandem_cli.turn import positive_float
from tandem_planner.profile_data import Profile, write_profile
from tandem_planner.profiler.advice import Advice, advise
from tandem_planner.profiler.client import StreamClient
from tandem_planner.profiler.grid import GridPlan
from tandem_planner.profiler.journal import Journal, Subject
from tandem_planner.profiler.measuring import Prompts
from tandem_planner.profiler.plots import write_plots
from tandem_planner.profiler.run import Measuring, measure, profile_of
from tandem_planner.sla_plan import Targets
from tandem_protocol.errors import ConfigError

_ADMIN_TIMEOUT_S = 10.0
_CACHE_METRIC = "vllm:cache_config_info"


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
    """Runs the subcommand."""
    if min(args.gpus, args.repeats) < 1 or args.vocabulary < 2 or args.seed < 0:
        raise ConfigError("--gpus and --repeats must be at least 1, --vocabulary at least 2, --seed not negative")
    plan = grid_plan(args, args.max_kv_tokens or kv_tokens_of(args.admin))
    journal = Journal(args.out, Subject(args.url, args.model, args.gpus, args.repeats, args.seed))
    prompts = Prompts(args.vocabulary, np.random.default_rng((args.seed, len(journal.prefill) + len(journal.decode))))
    how = Measuring(prompts, args.repeats, prefill=args.only != "decode", decode=args.only != "prefill")
    asyncio.run(_measure(args, plan, journal, how))
    profile = profile_of(plan, journal, args.gpus)
    write_profile(profile, args.out)
    write_plots(profile, args.out / "plots")
    _tell(args, profile)
    return 0


def grid_plan(args: argparse.Namespace, max_kv_tokens: int) -> GridPlan:
    """The grid of the options."""
    return GridPlan(args.max_context, max_kv_tokens, args.min_isl, args.prefill_points, args.contexts, args.loads, args.decode_tokens,
                    args.max_requests)


async def _measure(args: argparse.Namespace, plan: GridPlan, journal: Journal, how: Measuring) -> None:
    async with StreamClient(args.url, args.model, args.timeout_s) as client:
        await client.check()
        await measure(plan, journal, client, how, lambda text: print(text, file=sys.stderr, flush=True))


def kv_tokens_of(admin: str) -> int:
    """Tokens of the KV cache by a worker's metrics. Raises ConfigError if they don't tell."""
    try:
        with urllib.request.urlopen(f"{admin.rstrip('/')}/metrics", timeout=_ADMIN_TIMEOUT_S) as answer:  # noqa: S310 - the user's own URL
            text = answer.read().decode()
        labels = next(line for line in text.splitlines() if line.startswith(f"{_CACHE_METRIC}{{"))
        return label(labels, "num_gpu_blocks") * label(labels, "block_size")
    except (OSError, ValueError, StopIteration) as exc:
        raise ConfigError(f"{admin} does not tell its KV cache ({exc or _CACHE_METRIC + ' is missing'}): give --max-kv-tokens") from exc


def label(line: str, name: str) -> int:
    """A label's value in a line of metrics. Raises ValueError without it."""
    found = re.search(rf'[{{,]{name}="(\d+)"', line)
    if found is None:
        raise ValueError(f"no label {name}")
    return int(found[1])


def _tell(args: argparse.Namespace, profile: Profile) -> None:
    advice = None
    if profile.prefill is not None and profile.decode is not None:
        isl = args.isl or min(3000.0, float(profile.prefill.isl[-1]))
        advice = advise(profile, Targets(args.ttft / 1e3, args.itl / 1e3), isl, args.osl, args.gpus)
    if args.json:
        print(json.dumps({"out": str(args.out), "advice": None if advice is None else advice_json(advice)}))
    else:
        print(f"profile written to {args.out}")
        if advice is not None:
            print("\n".join([advice.reason, f"prefill:decode = {advice.ratio}",
                             *(f"  {term.name} = {term.value:.4g}: {term.how}" for term in advice.terms)]))


def advice_json(advice: Advice) -> dict[str, object]:
    """As `--json` prints it."""
    return {"disaggregate": advice.disaggregate, "ratio": advice.ratio, "reason": advice.reason,
            "terms": [{"name": term.name, "value": term.value, "how": term.how, "role": term.role} for term in advice.terms]}
