# SPDX-License-Identifier: Apache-2.0
"""One running server measured into one folder: the journal, the planner's files, and plots.

Cut short, what was measured is still written.
"""

import argparse
import asyncio
import re
import signal
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tandem_planner.profile_data import Profile, write_profile
from tandem_planner.profiler.client import StreamClient
from tandem_planner.profiler.grid import GridPlan
from tandem_planner.profiler.journal import Journal, Subject
from tandem_planner.profiler.measuring import Prompts
from tandem_planner.profiler.plots import write_plots
from tandem_planner.profiler.run import Measuring, Say, measure, profile_of
from tandem_protocol.errors import ConfigError

_ADMIN_TIMEOUT_S = 10.0
_CACHE_METRIC = "vllm:cache_config_info"


@dataclass(frozen=True)
class Measured:
    """What became of a server."""

    profile: Profile
    whole: bool
    """Whether every point was visited; otherwise the same command goes on."""


def grid_plan(args: argparse.Namespace, max_kv_tokens: int) -> GridPlan:
    """The grid of the options."""
    return GridPlan(args.max_context, max_kv_tokens, args.min_isl, args.prefill_points, args.contexts, args.loads, args.decode_tokens,
                    args.max_requests)


def measure_server(args: argparse.Namespace, out: Path, plan: GridPlan, subject: Subject, url: str, limit_s: float | None) -> Measured:
    """Measures the model of `subject` at `url` into `out`, for so many seconds at most, or until SIGINT or SIGTERM.

    Whatever breaks off, the points so far are written. Raises UnavailableError, and ConfigError for a journal of something else.
    """
    journal = Journal(out, subject)
    prompts = Prompts(args.vocabulary, np.random.default_rng((args.seed, len(journal.prefill) + len(journal.decode))))
    how = Measuring(prompts, args.repeats, prefill=args.only != "decode", decode=args.only != "prefill")

    def told(text: str) -> None:
        """After every point, since whoever ends this process may not ask."""
        say(text)
        write_profile(profile_of(plan, journal, subject.gpus), out)

    whole = asyncio.run(_until(limit_s, plan, journal, how, StreamClient(url, subject.model, args.timeout_s), told))
    profile = profile_of(plan, journal, subject.gpus)
    if profile != Profile():
        write_plots(profile, out / "plots", say)
    return Measured(profile, whole)


async def _until(limit_s: float | None, plan: GridPlan, journal: Journal, how: Measuring, connection: StreamClient, told: Say) -> bool:
    """False if it was cut short."""
    loop = asyncio.get_running_loop()
    async with connection as client:
        await client.check()
        task = asyncio.ensure_future(measure(plan, journal, client, how, told))
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            loop.add_signal_handler(number, task.cancel)
        try:
            async with asyncio.timeout(limit_s):
                await task
        except (TimeoutError, asyncio.CancelledError):
            say("cut short: what was measured so far is written; the same command goes on from there")
            return False
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)
    return True


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


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
