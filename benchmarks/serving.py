# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.serving`: the same load on vLLM in process, vLLM's server, Triton, and Triton disaggregated.

Exit code 1 if a target failed; the others are measured all the same.
"""

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from benchmarks import hardware, options
from benchmarks.errors import BenchmarkError
from benchmarks.hardware import Hardware
from benchmarks.load import Job
from benchmarks.options import Level, Options
from benchmarks.prompts import make_prompts
from benchmarks.report import Report
from benchmarks.targets import STARTERS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark. A run that is interrupted reports what it has."""
    signal.signal(signal.SIGTERM, _interrupt)  # `timeout` sends it; servers must be stopped then as well
    machine = hardware.detect()
    chosen = options.parse(argv, machine)
    _set_environment(machine, chosen)
    report = _empty_report(chosen, machine, argv)
    try:
        for target in chosen.targets:
            _measure_target(target, chosen, report)
    except KeyboardInterrupt:
        report.failures["run"] = "interrupted"
    print(json.dumps(report.to_json()) if chosen.as_json else report.to_text(), flush=True)
    return 1 if report.failures else 0


def _interrupt(number: int, frame: object) -> NoReturn:
    # `timeout` sends it twice, to the process and to its group: the second would cut the clean-up short.
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _set_environment(machine: Hardware, chosen: Options) -> None:
    """What every engine inherits. On the CPU: all cores for an engine alone, as the launcher sets for its workers, and a small cache."""
    # A folder of its own, so that a `tandem stop` of the user's, which stops all runs, doesn't end this one.
    os.environ.setdefault("TANDEM_RUN_DIR", str((chosen.log_dir / "run").absolute()))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not machine.gpus:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, machine.cores)))


def _empty_report(chosen: Options, machine: Hardware, argv: Sequence[str] | None) -> Report:
    arguments = sys.argv[1:] if argv is None else argv
    return Report(
        hardware=machine.describe(), command=shlex.join(["python", "-m", "benchmarks.serving", *arguments]), model=chosen.model,
        engine_arguments=chosen.engine_arguments, versions=hardware.versions(),
        placement={target: machine.placement(target) for target in chosen.targets},
    )


def _measure_target(target: str, chosen: Options, report: Report) -> None:
    begin = time.monotonic()
    _say(f"{target}: starting ({report.placement[target]})")
    try:
        with STARTERS[target](chosen) as load:
            _say(f"{target}: up after {time.monotonic() - begin:.0f} s")
            for level in chosen.levels:
                figures = load.measure(make_job(level, chosen))
                report.add(target, level.concurrency, figures)
                _save(report, chosen)
                _say(f"{target} c={level.concurrency}: {figures.req_per_s:.2f} req/s, TTFT p50 {figures.ttft_ms_p50:.1f} ms, "
                     f"ITL p50 {figures.itl_ms_p50:.2f} ms")
    except (BenchmarkError, OSError) as exc:
        report.failures[target] = str(exc)
        _save(report, chosen)
        _say(f"{target}: FAILED: {exc}")
    _say(f"{target}: done after {time.monotonic() - begin:.0f} s")


def make_job(level: Level, chosen: Options) -> Job:
    """The job of one level: the same prompts for every target, other ones for every level and for the warm-up."""
    seed = f"{chosen.seed}/{level.concurrency}"
    return Job(
        warmup=make_prompts(f"{seed}/warmup", level.warmup, chosen.input_words),
        prompts=make_prompts(f"{seed}/measured", level.requests, chosen.input_words),
        concurrency=level.concurrency, output_tokens=chosen.output_tokens, timeout_s=chosen.level_timeout_s,
    )


def _save(report: Report, chosen: Options) -> None:
    (chosen.log_dir / "results.json").write_text(json.dumps(report.to_json(), indent=1))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
