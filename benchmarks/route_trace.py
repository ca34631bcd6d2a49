# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.route_trace`: what each router mode makes of a trace, over fleets of mock engines in virtual time.

The trace is generated (`traces.py`) or a real Mooncake file. Its rate is set so that the fleet would have `--load` of its time in
work if every prefix were reused (60 % by default: the fixed time of every step comes on top, so engines are nearly always busy,
but no mode that reuses prefixes falls behind). A generated trace has more conversations for more load; a file is played faster.

Reported per fleet and mode: the share of prompt tokens found in caches, against that of one infinite cache (ideal), and against that
of a fleet of infinite caches in which every conversation stays where it began (sticky: each worker computes shared prefixes once);
time to first token; load spread (busiest worker / mean, of step time less each step's fixed part); and the real time of a decision.
Top-level keys are the worst over the fleets: `reuse_of_ideal`, `reuse_of_sticky`, `ttft_p50_vs_round_robin` and `load_spread` (kv's
spread over least-loaded's); `decision_p99_ms` is kv's of the largest fleet.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import hardware
from benchmarks.errors import BenchmarkError
from benchmarks.routing import MODES, Outcome, Replay, at_rate, load_of
from benchmarks.traces import SHAPES, Statistics, TraceRequest, generate, read, statistics, sticky_hits
from tandem_protocol import blocks, kv_events
from tandem_worker.mock.settings import EngineSettings
from tandem_worker.mock.timing import StepTiming, load_profile

_CACHE_TOKENS = 800_000
_REQUESTS = {8: 2000, 64: 5000}
"""By default: part of a published trace's length for 8 workers, so that a run takes at most three minutes on one core."""
_COLUMNS = ("reuse_of_ideal", "reuse_of_sticky", "hit", "ttft_p50_s", "ttft_p99_s", "load_spread", "busy", "drain_s",
            "decision_p50_ms", "decision_p99_ms", "decision_cpu_p99_ms", "hashing_p99_ms")
_WARM_REQUESTS = 20
_ROUTER = MODES["kv"]


@dataclass(frozen=True)
class Options:
    """One run."""

    trace: Path | None
    shape: str
    workers: tuple[int, ...]
    modes: tuple[str, ...]
    requests: int
    load: float
    block_size: int
    prefill_load_scale: float
    overlap_credit: float
    profile: Path | None
    seed: int
    as_json: bool

    def requests_for(self, workers: int) -> int:
        """Length of the trace for a fleet."""
        return self.requests or _REQUESTS.get(workers, 2000 + 50 * workers)


@dataclass
class Report:
    """A run as it goes."""

    hardware: str
    command: str
    traces: dict[int, Statistics] = field(default_factory=dict)
    loads: dict[int, float] = field(default_factory=dict)
    sticky: dict[int, float] = field(default_factory=dict)
    results: dict[int, dict[str, Outcome]] = field(default_factory=dict)

    def reuse(self, workers: int, mode: str) -> float:
        """Hit rate over the ideal one."""
        return self.results[workers][mode].hit / self.traces[workers].ideal_hit

    def reuse_of_sticky(self, workers: int, mode: str) -> float:
        """Hit rate over that of conversations that stay where they began."""
        return self.results[workers][mode].hit / self.sticky[workers]

    def headline(self) -> dict[str, float | None]:
        """The five figures; None where a mode they need was left out."""
        def ttft(_: int, of: dict[str, Outcome]) -> float:
            return of["kv"].ttft_p50_s / of["round-robin"].ttft_p50_s

        def spread(_: int, of: dict[str, Outcome]) -> float:
            return of["kv"].load_spread / of["least-loaded"].load_spread

        def decision(workers: int, of: dict[str, Outcome]) -> float:
            return of["kv"].decision_p99_ms if workers == max(self.results) else 0.0

        return {
            "reuse_of_ideal": self._worst(min, lambda workers, _: self.reuse(workers, "kv"), "kv"),
            "reuse_of_sticky": self._worst(min, lambda workers, _: self.reuse_of_sticky(workers, "kv"), "kv"),
            "ttft_p50_vs_round_robin": self._worst(max, ttft, "kv", "round-robin"),
            "load_spread": self._worst(max, spread, "kv", "least-loaded"),
            "decision_p99_ms": self._worst(max, decision, "kv"),
        }

    def _worst(self, worst: Any, figure: Any, *needed: str) -> float | None:
        values = [figure(workers, of) for workers, of in self.results.items() if of.keys() >= set(needed)]
        return float(f"{worst(values):.4g}") if values else None

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "hardware": self.hardware, "command": self.command,
            "fleets": {
                str(workers): {
                    "trace": asdict(self.traces[workers]), "load": self.loads[workers],
                    "sticky_hit": self.sticky[workers],
                    "modes": {mode: self._figures(workers, mode) for mode in outcomes},
                } for workers, outcomes in self.results.items()
            },
            **self.headline(),
        }

    def _figures(self, workers: int, mode: str) -> dict[str, Any]:
        return {"reuse_of_ideal": self.reuse(workers, mode), "reuse_of_sticky": self.reuse_of_sticky(workers, mode),
                **asdict(self.results[workers][mode])}

    def to_text(self) -> str:
        """Tables and the headline."""
        lines = [self.hardware, self.command]
        for workers, outcomes in self.results.items():
            lines += ["", _describe(workers, self.loads[workers], self.traces[workers])]
            lines.append(f"{'mode':<13}" + "".join(f"{column:>20}" for column in _COLUMNS))
            for mode in outcomes:
                figures = self._figures(workers, mode)
                lines.append(f"{mode:<13}" + "".join(f"{figures[column]:>20.3f}" for column in _COLUMNS))
        lines += ["", *(f"{name}: {value}" for name, value in self.headline().items())]
        return "\n".join(lines)


def _describe(workers: int, load: float, has: Statistics) -> str:
    return (f"{workers} workers, offered load {load:.2f}; {has.requests} requests in {has.duration_s:.0f} s, "
            f"input {has.mean_input:.0f} (max {has.max_input}), output {has.mean_output:.0f}, "
            f"repeated blocks {has.repeated_blocks:.1%}, ideal hit {has.ideal_hit:.1%}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 2 for a trace or setting that can't be."""
    chosen = parse(argv)
    arguments = sys.argv[1:] if argv is None else argv
    report = Report(hardware.detect().describe(), shlex.join(["python", "-m", "benchmarks.route_trace", *arguments]))
    try:
        for workers in chosen.workers:
            _measure(workers, chosen, report)
    except BenchmarkError as exc:
        _say(f"route-trace: {exc}")
        return 2
    print(json.dumps(report.to_json()) if chosen.as_json else report.to_text(), flush=True)
    return 0


def _measure(workers: int, chosen: Options, report: Report) -> None:
    timing = load_profile(chosen.profile) if chosen.profile else StepTiming()
    engine = EngineSettings(block_size=chosen.block_size, total_blocks=_CACHE_TOKENS // chosen.block_size)
    trace = make_trace(workers, chosen, timing)
    report.traces[workers], report.loads[workers] = statistics(trace), load_of(trace, workers, timing)
    report.sticky[workers] = sum(sticky_hits(trace, workers)) / sum(item.input_length for item in trace)
    _warm_up(trace, engine, timing)
    for mode in chosen.modes:
        settings = MODES[mode]
        if mode in ("kv", "approximate"):
            settings = replace(settings, router_prefill_load_scale=chosen.prefill_load_scale,
                               router_kv_overlap_score_credit=chosen.overlap_credit)
        outcome = Replay(settings, workers, engine, timing, chosen.seed).run(trace)
        report.results.setdefault(workers, {})[mode] = outcome
        _say(f"{workers} workers, {mode}: reuse {report.reuse(workers, mode):.2f} of ideal, TTFT p50 {outcome.ttft_p50_s:.3f} s, "
             f"spread {outcome.load_spread:.2f}, {outcome.wall_s:.0f} s")


def make_trace(workers: int, chosen: Options, timing: StepTiming) -> list[TraceRequest]:
    """The trace that loads this fleet as wanted."""
    count = chosen.requests_for(workers)
    if chosen.trace is not None:
        trace = read(chosen.trace, count)
        return at_rate(trace, chosen.load / load_of(trace, workers, timing))
    rate = float(workers)
    for _ in range(3):  # the rate changes what is reused within the trace, and so the load, a little
        rate *= chosen.load / load_of(generate(SHAPES[chosen.shape], count, rate, chosen.seed), workers, timing)
    return generate(SHAPES[chosen.shape], count, rate, chosen.seed)


def _warm_up(trace: Sequence[TraceRequest], engine: EngineSettings, timing: StepTiming) -> None:
    """Everything compiled is compiled before it is timed."""
    blocks.warm_up()
    kv_events.warm_up()
    Replay(MODES["kv"], 2, engine, timing).run(trace[:_WARM_REQUESTS])


def parse(argv: Sequence[str] | None = None) -> Options:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="./build.sh bench route-trace", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--trace", type=Path, help="a Mooncake trace file in place of a generated one")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="synthetic", help="of the generated trace")
    parser.add_argument("--workers", type=_positive, nargs="+", default=[8, 64], help="sizes of the fleets")
    parser.add_argument("--modes", choices=list(MODES), nargs="+", default=list(MODES))
    parser.add_argument("--requests", type=int, default=0, help=f"of the trace; 0 for {_REQUESTS} by workers")
    parser.add_argument("--load", type=float, default=0.6, help="share of the workers' time in work, if every prefix were reused")
    parser.add_argument("--block-size", type=_positive, default=64, help="tokens per KV block")
    parser.add_argument("--prefill-load-scale", type=float, default=_ROUTER.router_prefill_load_scale,
                        help="of kv and approximate: DYN_ROUTER_PREFILL_LOAD_SCALE")
    parser.add_argument("--overlap-credit", type=float, default=_ROUTER.router_kv_overlap_score_credit,
                        help="of kv and approximate: DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT")
    parser.add_argument("--profile", type=Path, help="measured steps (JSON) in place of the made-up 8B on an H200")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(argv)
    return Options(given.trace, given.shape, tuple(given.workers), tuple(given.modes), given.requests, given.load, given.block_size,
                   given.prefill_load_scale, given.overlap_credit, given.profile, given.seed, given.json)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
