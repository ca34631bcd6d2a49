# SPDX-License-Identifier: Apache-2.0
"""The command line of the serving benchmark. The defaults depend on whether there is a GPU: a CPU run must end within minutes."""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.hardware import Hardware

TARGETS = ("inproc", "openai", "triton", "disagg")


@dataclass(frozen=True)
class Level:
    """One concurrency and how many requests are measured at it."""

    concurrency: int
    requests: int

    @property
    def warmup(self) -> int:
        """Requests before the measured ones: one per slot, so that every slot's connection and batch shape is warm."""
        return max(2, self.concurrency)


@dataclass(frozen=True)
class Scale:
    """Defaults for one kind of machine."""

    levels: tuple[int, ...]
    input_words: int
    output_tokens: int
    least_requests: int
    requests_per_slot: int
    block_size: int


CPU = Scale(levels=(1, 8, 32), input_words=60, output_tokens=32, least_requests=8, requests_per_slot=2, block_size=32)
GPU = Scale(levels=(1, 8, 32, 128), input_words=500, output_tokens=64, least_requests=32, requests_per_slot=8, block_size=16)


@dataclass(frozen=True)
class Options:
    """A run, fully determined."""

    targets: tuple[str, ...]
    levels: tuple[Level, ...]
    input_words: int
    output_tokens: int
    model: str
    engine_arguments: Mapping[str, Any]
    """The same for every engine; without `model`."""
    seed: int
    clients: int
    port: int
    log_dir: Path
    start_timeout_s: float
    level_timeout_s: float
    as_json: bool


def parse(argv: Sequence[str] | None, hardware: Hardware) -> Options:
    """Parses the command line; without --model, converts and takes the embedded model."""
    scale = GPU if hardware.gpus else CPU
    parser = _parser(scale, hardware)
    args = parser.parse_args(argv)
    unknown = sorted(set(args.targets) - set(TARGETS))
    if unknown:
        parser.error(f"unknown target {unknown[0]!r}: choose from {', '.join(TARGETS)}")
    try:
        levels = make_levels(args.concurrency, args.requests_per_level, scale)
    except ValueError as exc:
        parser.error(str(exc))
    args.log_dir.mkdir(parents=True, exist_ok=True)
    return Options(
        targets=args.targets, levels=levels, input_words=args.input_words, output_tokens=args.output_tokens,
        model=args.model or _embedded_model(), engine_arguments={**default_arguments(scale, hardware), **dict(args.engine_arg)},
        seed=args.seed, clients=args.clients, port=args.port, log_dir=args.log_dir, start_timeout_s=args.start_timeout,
        level_timeout_s=args.level_timeout, as_json=args.json,
    )


def default_arguments(scale: Scale, hardware: Hardware) -> dict[str, Any]:
    """Engine arguments in which Tandem's defaults differ from vLLM's, given to every engine, so that none has an advantage."""
    shared = {"max_model_len": 2048, "block_size": scale.block_size, "scheduling_policy": "priority"}
    if hardware.gpus:
        return shared
    # What `tandem serve` sets for CPU engines (tandem_cli.serve.fleet).
    return shared | {"enforce_eager": True} | ({} if hardware.fast_bf16 else {"dtype": "float32"})


def make_levels(concurrencies: Sequence[int], requests: Sequence[int], scale: Scale) -> tuple[Level, ...]:
    """`requests` is empty (the default: a multiple of the concurrency), one number for all levels, or one per level."""
    if any(number < 1 for number in (*concurrencies, *requests)) or not concurrencies:
        raise ValueError("--concurrency and --requests-per-level must be at least 1")
    counts = list(requests) or [max(scale.least_requests, scale.requests_per_slot * concurrency) for concurrency in concurrencies]
    counts = counts * len(concurrencies) if len(counts) == 1 else counts
    if len(counts) != len(concurrencies):
        raise ValueError(f"--requests-per-level has {len(counts)} numbers for {len(concurrencies)} levels: give one, or one per level")
    return tuple(Level(*pair) for pair in zip(concurrencies, counts, strict=True))


def engine_argument(text: str) -> tuple[str, Any]:
    """`name=value`, the value as JSON where it is JSON, else as text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not name=value")
    try:
        return name.replace("-", "_"), json.loads(value)
    except ValueError:
        return name.replace("-", "_"), value


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _parser(scale: Scale, hardware: Hardware) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description="Compares vLLM in process, vLLM's OpenAI server, Triton, and Triton disaggregated.")
    add = parser.add_argument
    add("--json", action="store_true", help="end with one line of JSON instead of a table")
    add("--targets", type=lambda text: tuple(text.split(",")), default=TARGETS, help="comma-separated, in the order of running")
    add("--concurrency", type=_numbers, default=scale.levels, help="levels: requests in flight")
    add("--requests-per-level", type=_numbers, default=(), help="measured requests, one number or one per level")
    add("--input-words", type=int, default=scale.input_words, help="about 1.05 tokens each")
    add("--output-tokens", type=int, default=scale.output_tokens, help="exact")
    add("--model", default="", help="model folder; the embedded SmolLM2-135M-Instruct if not given")
    add("--engine-arg", type=engine_argument, action="append", default=[], metavar="K=V", help="an argument for all engines, repeatable")
    add("--seed", type=int, default=1, help="of the prompts")
    add("--clients", type=int, default=max(1, min(8, len(hardware.cores) // 2)), help="processes of the load generator")
    add("--port", type=int, default=18000, help="first port; up to 40 above it are used, and a few 1000 above")
    add("--log-dir", type=Path, default=Path(tempfile.gettempdir()) / "tandem-bench", help="logs and workers' metrics")
    add("--start-timeout", type=float, default=600, help="seconds a target may take to start")
    add("--level-timeout", type=float, default=300, help="seconds one level may take, and its warm-up again")
    return parser


def _embedded_model() -> str:
    from tandem_cli.serve.embedded_model import embedded_model

    return str(embedded_model())
