# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.prefix_ratio`: KV-aware against round-robin routing over real engines, by how much of each prompt is shared.

Two aggregated workers, one set of requests per ratio: `--prefixes` different beginnings, each shared by the same number of prompts in
shuffled order, and a rest of its own for every prompt. The same server has a router in each mode in front of the same workers, and the
modes take turns ratio by ratio. No prompt shares anything with another ratio or mode, since its first word says both; the order of the
beginnings is the same in both modes. Closed loop.

What the caches gave is read off the workers' own counters.
"""

import argparse
import json
import random
import shlex
import signal
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import hardware
from benchmarks.engines import MAX_WORKERS, engine_workers
from benchmarks.errors import BenchmarkError
from benchmarks.fleets import RouterModel, RouterServer, discovery_url, routers
from benchmarks.load import Job, LoadGenerator
from benchmarks.measures import Figures
from benchmarks.options import CPU, GPU, default_arguments
from benchmarks.prompts import make_prompts
from benchmarks.sources import TritonServer
from benchmarks.targets import PROBE_TIMEOUT_S
from tandem_cli.serve.embedded_model import embedded_model

MODES = {"kv": "router_kv", "round-robin": "router_round_robin"}
"""Router mode -> name of its Triton model."""
_PHASE_TIMEOUT_S = 180.0
_QUERIES, _HITS = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
_COLUMNS = ("ttft_ms_p50", "ttft_ms_p99", "req_per_s", "cached_share")
_LIMITS = {"max_num_seqs": 16, "max_num_batched_tokens": 512}
"""Of the engines: steps that are short on a CPU."""


@dataclass(frozen=True)
class Options:
    """One run."""

    ratios: tuple[float, ...]
    workers: int
    requests: int
    prefixes: int
    concurrency: int
    input_words: int
    output_tokens: int
    model: str
    seed: int
    plots: Path | None
    log_dir: Path
    as_json: bool


@dataclass(frozen=True)
class Phase:
    """One ratio in one mode."""

    figures: Figures
    prompt_tokens: float
    """That the workers looked up in their caches."""
    cached_tokens: float
    """That they found."""

    def to_json(self) -> dict[str, Any]:
        """Figures and caches."""
        return {**self.figures.to_json(), "prompt_tokens": self.prompt_tokens, "cached_tokens": self.cached_tokens,
                "cached_share": round(self.cached_tokens / self.prompt_tokens, 4)}


@dataclass
class Report:
    """A run as it goes."""

    hardware: str
    command: str
    model: str
    phases: dict[float, dict[str, Phase]] = field(default_factory=dict)

    def headline(self) -> dict[str, float | None]:
        """kv over round-robin at the highest ratio: TTFT below 1 and the others above 1 are a gain; None where a side is missing."""
        both = [ratio for ratio, modes in self.phases.items() if len(modes) == len(MODES)]
        if not both:
            return {"ttft_p50_vs_round_robin": None, "throughput_vs_round_robin": None, "cached_tokens_vs_round_robin": None}
        kv, other = (self.phases[max(both)][mode] for mode in MODES)
        return {
            "ttft_p50_vs_round_robin": _rounded(kv.figures.ttft_ms_p50 / other.figures.ttft_ms_p50),
            "throughput_vs_round_robin": _rounded(kv.figures.req_per_s / other.figures.req_per_s),
            "cached_tokens_vs_round_robin": _rounded(kv.cached_tokens / other.cached_tokens) if other.cached_tokens else None,
        }

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        phases = {str(ratio): {mode: phase.to_json() for mode, phase in modes.items()} for ratio, modes in self.phases.items()}
        return {"hardware": self.hardware, "command": self.command, "model": self.model, "ratios": phases, **self.headline()}

    def to_text(self) -> str:
        """A table and the headline."""
        lines = [self.hardware, self.command, "", f"{'ratio':>6} {'mode':<12}" + "".join(f"{column:>14}" for column in _COLUMNS)]
        for ratio, modes in self.phases.items():
            for mode, phase in modes.items():
                found = phase.to_json()
                lines.append(f"{ratio:>6} {mode:<12}" + "".join(f"{found[column]:>14}" for column in _COLUMNS))
        return "\n".join([*lines, "", *(f"{name}: {value}" for name, value in self.headline().items())])


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def workload(seed: str, mode: str, ratio: float, requests: int, prefixes: int, words: int) -> tuple[str, ...]:
    """`requests` prompts of `words` words: the first `ratio` of each is one of `prefixes` beginnings, equally often, the rest its own.

    Which prompt has which beginning depends on the seed alone; the words depend on the mode, too, so that no cache serves both.
    """
    shared = max(1, round(words * ratio))
    beginnings = make_prompts(f"{seed}/{mode}/prefix", prefixes, shared)
    rests = make_prompts(f"{seed}/{mode}/rest", requests, max(1, words - shared))
    order = [number % prefixes for number in range(requests)]
    random.Random(seed).shuffle(order)
    return tuple(f"{beginnings[number]} {rest}" for number, rest in zip(order, rests, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 if a part of it failed."""
    chosen = parse(argv)
    arguments, failed = sys.argv[1:] if argv is None else argv, False
    report = Report(hardware.detect().describe(), shlex.join(["python", "-m", "benchmarks.prefix_ratio", *arguments]), chosen.model)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that servers are ended then, too
    try:
        _measure(chosen, report)
    except (BenchmarkError, KeyboardInterrupt) as exc:
        _say(f"prefix-ratio: {exc or 'interrupted'}")
        failed = True
    if chosen.plots is not None and report.phases:
        _say(f"plot: {plot(report, chosen.plots)}")
    print(json.dumps(report.to_json()) if chosen.as_json else report.to_text(), flush=True)
    return int(failed)


def _measure(chosen: Options, report: Report) -> None:
    machine = hardware.detect()
    arguments = {**default_arguments(GPU if machine.gpus else CPU, machine), **_LIMITS}
    models = [RouterModel(name, {"router_mode": mode}) for mode, name in MODES.items()]
    with tempfile.TemporaryDirectory(prefix="tandem-prefix-ratio-") as folder:
        store = discovery_url(Path(folder) / "discovery")
        with engine_workers(store, chosen.model, chosen.workers, arguments, chosen.log_dir / "workers") as admin, \
                routers(store, models, chosen.workers, chosen.log_dir / "routers", {"router_tokenizer": chosen.model}) as server:
            for number, ratio in enumerate(chosen.ratios):
                for mode in list(MODES)[:: 1 if number % 2 == 0 else -1]:
                    phase = _phase(mode, ratio, chosen, server, admin)
                    report.phases.setdefault(ratio, {})[mode] = phase
                    _say(f"ratio {ratio}, {mode}: TTFT p50 {phase.figures.ttft_ms_p50:.0f} ms, {phase.figures.req_per_s:.2f} req/s, "
                         f"{phase.cached_tokens:.0f} of {phase.prompt_tokens:.0f} tokens cached")


def _phase(mode: str, ratio: float, chosen: Options, server: RouterServer, admin: Sequence[str]) -> Phase:
    seed = f"{chosen.seed}/{ratio}"
    prompts = workload(seed, mode, ratio, chosen.requests, chosen.prefixes, chosen.input_words)
    warmup = make_prompts(f"{seed}/{mode}/warmup", chosen.workers, chosen.input_words)
    with LoadGenerator(TritonServer(server.grpc_url, MODES[mode]), 1, chosen.log_dir / f"load-{mode}") as load:
        load.measure(Job((), warmup, chosen.workers, chosen.output_tokens, _PHASE_TIMEOUT_S))
        before = _cache_counts(admin)
        figures = load.measure(Job((), prompts, chosen.concurrency, chosen.output_tokens, _PHASE_TIMEOUT_S))
    after = _cache_counts(admin)
    return Phase(figures, after[_QUERIES] - before[_QUERIES], after[_HITS] - before[_HITS])


def _cache_counts(admin: Sequence[str]) -> dict[str, float]:
    """The workers' prefix-cache counters, summed, in tokens."""
    lines: list[str] = []
    for url in admin:
        with urllib.request.urlopen(f"{url}/metrics", timeout=PROBE_TIMEOUT_S) as answer:
            lines += answer.read().decode().splitlines()
    return {name: sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))
            for name in (_QUERIES, _HITS)}


def plot(report: Report, folder: Path) -> Path:
    """Draws TTFT, throughput and cached share over the ratio, and returns the PNG's path."""
    from matplotlib.figure import Figure as Canvas

    ratios = sorted(report.phases)
    canvas = Canvas(figsize=(12, 3.6), layout="constrained")
    panels = canvas.subplots(1, 3)
    for mode, style in zip(MODES, ("C0o-", "C1s--"), strict=True):
        known = [ratio for ratio in ratios if mode in report.phases[ratio]]
        found = [report.phases[ratio][mode].to_json() for ratio in known]
        panels[0].plot(known, [one["ttft_ms_p50"] for one in found], style, label=f"{mode}, p50")
        panels[0].plot(known, [one["ttft_ms_p99"] for one in found], style, label=f"{mode}, p99", alpha=0.4)
        panels[1].plot(known, [one["req_per_s"] for one in found], style, label=mode)
        panels[2].plot(known, [one["cached_share"] for one in found], style, label=mode)
    for panel, title in zip(panels, ("time to first token, ms", "requests/s", "prompt tokens found in caches, share"), strict=True):
        panel.set(title=title, xlabel="shared part of each prompt", ylim=(0, None))
        panel.legend(fontsize="small")
    folder.mkdir(parents=True, exist_ok=True)
    canvas.savefig(folder / "prefix_ratio.png", dpi=80)
    return folder / "prefix_ratio.png"


def parse(argv: Sequence[str] | None = None) -> Options:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="./build.sh bench prefix-ratio", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--json", action="store_true", help="one JSON object on the last line")
    add("--ratios", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9], help="shared part of each prompt, from 0 to below 1")
    add("--workers", type=int, default=2, help="aggregated engines")
    add("--requests", type=int, default=24, help="per ratio and mode")
    add("--prefixes", type=int, default=6, help="different beginnings per ratio and mode")
    add("--concurrency", type=int, default=4)
    add("--input-words", type=int, default=240, help="about 1.05 tokens each")
    add("--output-tokens", type=int, default=8)
    add("--model", default="", help="model folder; the embedded SmolLM2-135M-Instruct if not given")
    add("--seed", type=int, default=1, help="of the prompts and their order")
    add("--plots", type=Path, help="folder for prefix_ratio.png; none is drawn if not given")
    add("--log-dir", type=Path, default=Path(tempfile.gettempdir()) / "tandem-bench-prefix-ratio")
    given = parser.parse_args(argv)
    if min(given.workers, given.requests, given.prefixes, given.concurrency, given.input_words, given.output_tokens) < 1:
        parser.error("every number must be at least 1")
    if given.workers > MAX_WORKERS:
        parser.error(f"--workers is at most {MAX_WORKERS}")
    if not all(0 <= ratio < 1 for ratio in given.ratios):
        parser.error("--ratios lie from 0 to below 1: the rest of each prompt is its own")
    given.log_dir.mkdir(parents=True, exist_ok=True)
    return Options(tuple(given.ratios), given.workers, given.requests, given.prefixes, given.concurrency, given.input_words,
                   given.output_tokens, given.model or str(embedded_model()), given.seed, given.plots, given.log_dir, given.json)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
