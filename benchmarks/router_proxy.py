# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.router_proxy`: what the router costs on the path of the tokens.

The same requests go straight to one mock worker (no engine, no Triton in front of it) and through the Triton model `router`, in turn,
round by round, so that noise hits both alike. What is added is therefore Triton, the router and one more gRPC hop. Two paces:

- `paced`: the worker steps as an 8B model on an H200 would (made up, see the mock's timing) and paces its responses as Tandem's worker
  does (1,500 a second). The headline is taken here, the worst of the levels with one router instance.
- `flood`: the worker steps a thousand times as fast and paces nothing, so every process runs at its limit. What counts here is the CPU
  time per response of each process, which holds elsewhere too, and who the bottleneck was; the load generator, the mock, Triton and the
  router share this machine's cores.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import hardware
from benchmarks.errors import BenchmarkError
from benchmarks.fleets import MockProcess, RouterModel, RouterServer, discovery_url, mock_workers, routers
from benchmarks.load import Job, LoadGenerator
from benchmarks.measures import Figures
from benchmarks.processes import bottleneck, cpu_seconds, spent
from benchmarks.prompts import make_prompts
from benchmarks.sources import TritonServer
from tandem_cli.serve.embedded_model import embedded_model

PACES: dict[str, tuple[str, ...]] = {"paced": ("--response-rate", "1500"), "flood": ("--speedup", "1000")}
"""Arguments of the mock worker."""
DIRECT, ROUTED = "direct", "routed"
_LEVEL_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Options:
    """One run."""

    paces: tuple[str, ...]
    instances: tuple[int, ...]
    concurrency: tuple[int, ...]
    rounds: int
    requests_per_slot: int
    input_words: int
    output_tokens: int
    clients: int
    seed: int
    ramp_s: float
    log_dir: Path
    as_json: bool


@dataclass(frozen=True)
class Side:
    """One measured level of one side."""

    figures: Figures
    cpu_s: Mapping[str, float]
    """By kind of process."""
    bottleneck: str


@dataclass(frozen=True)
class Comparison:
    """One pace, number of instances and concurrency: pairs of rounds, each measured one right after the other."""

    pace: str
    instances: int
    concurrency: int
    rounds: tuple[tuple[Side, Side], ...]
    """(direct, routed)"""

    @property
    def added_ttft_ms(self) -> float:
        """Median over the rounds of what the median TTFT grows by."""
        return statistics.median(routed.figures.ttft_ms_p50 - direct.figures.ttft_ms_p50 for direct, routed in self.rounds)

    @property
    def throughput_vs_direct(self) -> float:
        """Median over the rounds of the ratio of tokens per second."""
        return statistics.median(routed.figures.output_tok_per_s / direct.figures.output_tok_per_s for direct, routed in self.rounds)

    def to_json(self) -> dict[str, Any]:
        """The detail of the level; CPU in ms per response that reached the client."""
        sides = {name: _summary([pair[at] for pair in self.rounds]) for at, name in enumerate((DIRECT, ROUTED))}
        return {"pace": self.pace, "instances": self.instances, "concurrency": self.concurrency,
                "added_ttft_ms": _rounded(self.added_ttft_ms), "throughput_vs_direct": _rounded(self.throughput_vs_direct), **sides}


def _summary(sides: Sequence[Side]) -> dict[str, Any]:
    """Medians over the rounds."""
    def median(value: Callable[[Side], float]) -> float:
        return _rounded(statistics.median(value(side) for side in sides))

    names = ("output_tok_per_s", "tokens_per_chunk", "ttft_ms_p50", "ttft_ms_p95", "chunk_gap_ms_p95")
    return {
        **{name: median(lambda side, name=name: getattr(side.figures, name)) for name in names},  # type: ignore[misc]
        "responses_per_s": median(lambda side: side.figures.responses / side.figures.wall_s),
        "cpu_ms_per_response": {kind: median(lambda side, kind=kind: 1000 * side.cpu_s[kind] / side.figures.responses)  # type: ignore[misc]
                                for kind in sides[0].cpu_s},
        "bottleneck": statistics.mode(side.bottleneck for side in sides),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


@dataclass
class Report:
    """A run as it goes."""

    hardware: str
    command: str
    levels: list[Comparison] = field(default_factory=list)

    def headline(self) -> dict[str, float | None]:
        """The worst of the paced levels with one instance; None where there is none."""
        paced = [level for level in self.levels if level.pace == "paced" and level.instances == 1]
        return {
            "added_ttft_ms": _rounded(max(level.added_ttft_ms for level in paced)) if paced else None,
            "throughput_vs_direct": _rounded(min(level.throughput_vs_direct for level in paced)) if paced else None,
        }

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {"hardware": self.hardware, "command": self.command, "levels": [level.to_json() for level in self.levels], **self.headline()}

    def to_text(self) -> str:
        """A line per level and side, and the headline."""
        lines = [self.hardware, self.command, ""]
        for level in self.levels:
            found = level.to_json()
            lines.append(f"{level.pace}, {level.instances} instances, c={level.concurrency}: added TTFT {found['added_ttft_ms']} ms, "
                         f"throughput {found['throughput_vs_direct']} of direct")
            lines += [f"  {name}: {json.dumps(found[name])}" for name in (DIRECT, ROUTED)]
        return "\n".join([*lines, "", *(f"{name}: {value}" for name, value in self.headline().items())])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 if a part of it failed."""
    chosen = parse(argv)
    arguments = sys.argv[1:] if argv is None else argv
    report, failed = Report(hardware.detect().describe(), shlex.join(["python", "-m", "benchmarks.router_proxy", *arguments])), False
    try:
        for pace in chosen.paces:
            for instances in chosen.instances:
                _measure(pace, instances, chosen, report)
    except BenchmarkError as exc:
        _say(f"router-proxy: {exc}")
        failed = True
    print(json.dumps(report.to_json()) if chosen.as_json else report.to_text(), flush=True)
    return int(failed)


def _measure(pace: str, instances: int, chosen: Options, report: Report) -> None:
    """All levels of one pace and one number of instances, on servers started for it."""
    with tempfile.TemporaryDirectory(prefix="tandem-router-proxy-") as folder:
        store, name = discovery_url(Path(folder) / "discovery"), f"{pace}-{instances}"
        settings = {"router_tokenizer": str(embedded_model())}
        with mock_workers(store, PACES[pace], chosen.log_dir / f"{name}-mock.log") as mock, \
                routers(store, [RouterModel(instances=instances)], 1, chosen.log_dir / f"{name}-server", settings) as server, \
                _load(TritonServer(mock.grpc_url, mock.models[0]), chosen, f"{name}-direct") as direct, \
                _load(TritonServer(server.grpc_url, "router"), chosen, f"{name}-routed") as routed:
            for concurrency in chosen.concurrency:
                sides = _Sides(mock, server, {DIRECT: direct, ROUTED: routed}, chosen, concurrency)
                level = Comparison(pace, instances, concurrency, tuple(sides.round(number) for number in range(chosen.rounds)))
                report.levels.append(level)
                _say(f"{pace}, {instances} instances, c={concurrency}: added TTFT {level.added_ttft_ms:.2f} ms, "
                     f"throughput {level.throughput_vs_direct:.3f} of direct")


def _load(source: TritonServer, chosen: Options, name: str) -> LoadGenerator:
    return LoadGenerator(source, chosen.clients, chosen.log_dir / name)


@dataclass(frozen=True)
class _Sides:
    """Both ways to the same worker, and what of them is looked at."""

    mock: MockProcess
    server: RouterServer
    loads: Mapping[str, LoadGenerator]
    chosen: Options
    concurrency: int

    def round(self, number: int) -> tuple[Side, Side]:
        """Both sides, one after the other; who is first changes every round."""
        order = (DIRECT, ROUTED) if number % 2 == 0 else (ROUTED, DIRECT)
        found = {name: self._measure(name, number) for name in order}
        return found[DIRECT], found[ROUTED]

    def _measure(self, name: str, number: int) -> Side:
        load, words, tokens = self.loads[name], self.chosen.input_words, self.chosen.output_tokens
        seed, groups = f"{self.chosen.seed}/{self.concurrency}/{number}/{name}", self._groups(load)
        warmup = make_prompts(f"{seed}/warmup", self.concurrency, words)
        load.measure(Job((), warmup, self.concurrency, tokens, _LEVEL_TIMEOUT_S))
        prompts = make_prompts(seed, self.concurrency * self.chosen.requests_per_slot, words)
        before = cpu_seconds(groups)
        figures = load.measure(Job((), prompts, self.concurrency, tokens, _LEVEL_TIMEOUT_S, self.chosen.ramp_s))
        used = spent(before, cpu_seconds(groups))
        return Side(figures, used, bottleneck(used, {kind: len(tuple(pids)) for kind, pids in groups.items()}, figures.wall_s))

    def _groups(self, load: LoadGenerator) -> dict[str, Iterable[int]]:
        return {"client": load.pids, "mock": (self.mock.pid,), "triton": (self.server.pid,), "router": self.server.stubs}


def parse(argv: Sequence[str] | None = None) -> Options:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="./build.sh bench router-proxy", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--json", action="store_true", help="one JSON object on the last line")
    add("--paces", nargs="+", choices=list(PACES), default=list(PACES))
    add("--instances", type=int, nargs="+", default=[1, 2], help="processes that serve the model router")
    add("--concurrency", type=int, nargs="+", default=[32, 128])
    add("--rounds", type=int, default=4, help="pairs of measurements per level")
    add("--requests-per-slot", type=int, default=4, help="measured requests per round, times the concurrency")
    add("--input-words", type=int, default=20)
    add("--output-tokens", type=int, default=128)
    add("--clients", type=int, default=1, help="processes of the load generator, for each side")
    add("--seed", type=int, default=1, help="of the prompts")
    add("--ramp", type=float, default=1.0, help="seconds over which the slots start, so that they don't run in step")
    add("--log-dir", type=Path, default=Path(tempfile.gettempdir()) / "tandem-bench-router-proxy")
    given = parser.parse_args(argv)
    if min(*given.instances, *given.concurrency, given.rounds, given.requests_per_slot, given.clients, given.output_tokens) < 1:
        parser.error("every number must be at least 1")
    given.log_dir.mkdir(parents=True, exist_ok=True)
    return Options(tuple(given.paces), tuple(given.instances), tuple(given.concurrency), given.rounds, given.requests_per_slot,
                   given.input_words, given.output_tokens, given.clients, given.seed, given.ramp,
                   given.log_dir, given.json)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
