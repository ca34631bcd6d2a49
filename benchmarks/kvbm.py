# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.kvbm`: what the tiers bring and cost, against recomputing and against vLLM's own OffloadingConnector, in one run.

Each variant is an engine in a process of its own (benchmarks.kvbm_engine), one after the other, with the same arguments. On a GPU the
model is an 8B one by shape with dummy weights; on the CPU SmolLM2 at a small scale, where only the mechanism can be seen.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import hardware
from benchmarks.errors import BenchmarkError
from benchmarks.kvbm_engine import Load, Outcome, Plan, Scenario, Variant
from benchmarks.shapes import make_8b_shape

GB = 10**9
COPY_BYTES = 1 << 30
COPY_REPEATS = 10


@dataclass(frozen=True)
class Scale:
    """Sizes for one kind of machine."""

    arguments: dict[str, Any]
    bounded_blocks: int
    """GPU blocks of the scenario whose KV exceeds the GPU."""
    host_gb: float
    disk_gb: float
    long_tokens: int
    long_prompts: int
    fits: Load
    exceeds: Load


GPU = Scale(
    arguments={"load_format": "dummy", "max_model_len": 32768, "block_size": 16, "gpu_memory_utilization": 0.8},
    bounded_blocks=4096, host_gb=24, disk_gb=24, long_tokens=20_000, long_prompts=4,
    fits=Load(conversations=96, tokens=2_000, output_tokens=128, concurrency=16, rounds=1),
    exceeds=Load(conversations=16, tokens=8_000, output_tokens=64, concurrency=4, rounds=4),
)
CPU = Scale(
    arguments={"max_model_len": 2048, "block_size": 32, "enforce_eager": True, "dtype": "float32"},
    bounded_blocks=72, host_gb=0.5, disk_gb=0.5, long_tokens=1_200, long_prompts=2,
    fits=Load(conversations=4, tokens=256, output_tokens=8, concurrency=2, rounds=1),
    exceeds=Load(conversations=4, tokens=1_000, output_tokens=4, concurrency=1, rounds=2),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; exit code 1 if a variant failed."""
    machine = hardware.detect()
    args = _parse(argv)
    scale = GPU if machine.gpus else CPU
    args.log_dir.mkdir(parents=True, exist_ok=True)
    runs = _Runs(scale, args, _model(args, machine.gpus))
    report: dict[str, Any] = {
        "hardware": machine.describe(), "command": "python -m benchmarks.kvbm " + " ".join(argv or sys.argv[1:]),
        "versions": hardware.versions(), "scale": msgspec.to_builtins(scale),
        "pinned_copy_gb_per_s": _pinned_copies() if machine.gpus else None,
    }
    outcomes = runs.all()
    report["outcomes"] = {name: msgspec.to_builtins(outcome) for name, outcome in outcomes.items()}
    report |= {"failures": runs.failures, **headline(outcomes, report["pinned_copy_gb_per_s"])}
    print(json.dumps(report) if args.json else json.dumps(report, indent=1), flush=True)
    return 1 if runs.failures else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kvbm", description=__doc__.partition("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON; without, the object is indented")
    parser.add_argument("--model", default="", help="model folder; an 8B shape on a GPU, SmolLM2 on the CPU if not given")
    parser.add_argument("--variants", type=lambda text: tuple(text.split(",")), default=("none", "native", "kvbm"), help="in this order")
    parser.add_argument("--only", type=lambda text: tuple(text.split(",")), default=(),
                        help="of the engines that the variants start, only these, by name, e.g. native,kvbm,kvbm-bounded")
    parser.add_argument("--log-dir", type=Path, default=Path(tempfile.gettempdir()) / "tandem-bench-kvbm", help="logs and the disk tier")
    parser.add_argument("--engine-timeout", type=float, default=300, help="seconds one engine may take, start included")
    return parser.parse_args(argv)


def _model(args: argparse.Namespace, gpus: Sequence[str]) -> str:
    if args.model:
        return str(args.model)
    from tandem_cli.serve.embedded_model import embedded_model

    small = embedded_model()
    return str(make_8b_shape(small, args.log_dir / "llama-8b-shape")) if gpus else str(small)


class _Runs:
    """The engines, one after the other; a failure is noted and the others go on."""

    def __init__(self, scale: Scale, args: argparse.Namespace, model: str) -> None:
        self.failures: dict[str, str] = {}
        self._scale, self._args, self._model = scale, args, model
        self._disk = args.log_dir / "disk"

    def all(self) -> dict[str, Outcome]:
        """By name: `kvbm`, `kvbm-restarted`, `kvbm-bounded` and so on."""
        shutil.rmtree(self._disk, ignore_errors=True)
        outcomes: dict[str, Outcome | None] = {}
        for variant in self._args.variants:
            outcomes[variant] = self._run(variant, variant, ("long", "fits"))
            if variant == "kvbm":
                outcomes["kvbm-disk"] = self._run("kvbm-disk", variant, ("long",), admit_all=True)
                outcomes["kvbm-restarted"] = self._run("kvbm-restarted", variant, ("reload",), admit_all=True)
                shutil.rmtree(self._disk, ignore_errors=True)
            outcomes[f"{variant}-bounded"] = self._run(f"{variant}-bounded", variant, ("exceeds",), bounded=True)
        shutil.rmtree(self._disk, ignore_errors=True)
        return {name: outcome for name, outcome in outcomes.items() if outcome is not None}

    def _run(self, name: str, variant: Variant, scenarios: tuple[Scenario, ...], *, bounded: bool = False,
             admit_all: bool = False) -> Outcome | None:
        if self._args.only and name not in self._args.only:
            return None
        scale = self._scale
        arguments = {**scale.arguments, **({"num_gpu_blocks_override": scale.bounded_blocks} if bounded else {})}
        plan = Plan(variant=variant, scenarios=scenarios, model=self._model, arguments=arguments, host_bytes=int(scale.host_gb * GB),
                    long_tokens=scale.long_tokens, long_prompts=scale.long_prompts, fits=scale.fits, exceeds=scale.exceeds)
        print(f"{name}: {', '.join(scenarios)}", file=sys.stderr, flush=True)
        try:
            outcome = run_engine(plan, self._environment(admit_all), self._args.log_dir / f"{name}.log", self._args.engine_timeout)
        except BenchmarkError as exc:
            self.failures[name] = str(exc)
            print(f"{name}: {exc}", file=sys.stderr, flush=True)
            return None
        print(f"{name}: {msgspec.json.encode(outcome).decode()}", file=sys.stderr, flush=True)
        return outcome

    def _environment(self, admit_all: bool) -> dict[str, str]:
        """The default filter keeps from the disk what was seen once; the restart needs all of it there."""
        self._disk.mkdir(parents=True, exist_ok=True)
        return {"DYN_KVBM_CPU_CACHE_GB": str(self._scale.host_gb), "DYN_KVBM_DISK_CACHE_GB": str(self._scale.disk_gb),
                "DYN_KVBM_DISK_CACHE_DIR": str(self._disk), "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": str(admit_all).lower()}


def run_engine(plan: Plan, environment: Mapping[str, str], log: Path, timeout_s: float) -> Outcome:
    """One engine in a process group of its own; its last line is the outcome. Raises BenchmarkError with the end of its log."""
    with log.open("wb") as output:
        child = subprocess.Popen([sys.executable, "-m", "benchmarks.kvbm_engine"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 stderr=output, env={**os.environ, **environment}, start_new_session=True)
        try:
            printed, _ = child.communicate(msgspec.json.encode(plan), timeout_s)
        except subprocess.TimeoutExpired as exc:
            raise BenchmarkError(f"did not end within {timeout_s:g} s, see {log}") from exc
        finally:
            _end_group(child)
    if child.returncode != 0:
        raise BenchmarkError(f"ended with {child.returncode}: {_last_error(log)} (log: {log})")
    return msgspec.json.decode(printed.strip().splitlines()[-1], type=Outcome)


def _end_group(child: "subprocess.Popen[bytes]") -> None:
    """Its engine processes share its group."""
    try:
        os.killpg(child.pid, 9)
    except ProcessLookupError:
        return
    finally:
        child.wait(30)


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if "Error" in line or "Exception" in line]
    return lines[-1] if lines else "no error in its log"


def _pinned_copies() -> dict[str, float]:
    """GB/s of one large copy from and to pinned host memory: the limit. In a process of its own, whose CUDA context goes with it."""
    code = (
        "import json,torch\n"
        f"n,r={COPY_BYTES},{COPY_REPEATS}\n"
        "host=torch.empty(n,dtype=torch.uint8,pin_memory=True); gpu=torch.empty(n,dtype=torch.uint8,device='cuda')\n"
        "def rate(dst,src):\n"
        "    dst.copy_(src,non_blocking=True); torch.cuda.synchronize()\n"
        "    a,b=torch.cuda.Event(True),torch.cuda.Event(True); a.record()\n"
        "    for _ in range(r): dst.copy_(src,non_blocking=True)\n"
        "    b.record(); torch.cuda.synchronize(); return n*r/a.elapsed_time(b)/1e6\n"
        "print(json.dumps({'d2h':rate(host,gpu),'h2d':rate(gpu,host)}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return {name: float(rate) for name, rate in json.loads(done.stdout).items()}


def headline(outcomes: Mapping[str, Outcome], limit: Mapping[str, float] | None) -> dict[str, Any]:
    """The keys that the README explains; None where a side was not measured."""
    none, kvbm, native = (outcomes.get(name) for name in ("none", "kvbm", "native"))
    restarted = outcomes.get("kvbm-restarted")
    rates = {direction: _bandwidth(kvbm, direction) for direction in ("store", "load")}
    return {
        "g1_g2_gb_per_s": rates,
        "g1_g2_of_limit": {"store": _over(rates["store"], limit and limit["d2h"]), "load": _over(rates["load"], limit and limit["h2d"])},
        "native_g1_g2_gb_per_s": {direction: _bandwidth(native, direction) for direction in ("store", "load")},
        "ttft_recomputed_ms": _median(none and none.recomputed_ttft_ms),
        "ttft_g2_ms": _median(kvbm and kvbm.loaded_ttft_ms), "ttft_g3_ms": _median(restarted and restarted.loaded_ttft_ms),
        "ttft_native_ms": _median(native and native.loaded_ttft_ms),
        "ttft_g2_speedup": _over(_median(none and none.recomputed_ttft_ms), _median(kvbm and kvbm.loaded_ttft_ms)),
        "ttft_g3_speedup": _over(_median(none and none.recomputed_ttft_ms), _median(restarted and restarted.loaded_ttft_ms)),
        "ttft_native_speedup": _over(_median(none and none.recomputed_ttft_ms), _median(native and native.loaded_ttft_ms)),
        "fits_loss": _loss(none, kvbm), "fits_loss_native": _loss(none, native),
        "exceeds_vs_none": _over(_exceeds(outcomes, "kvbm"), _exceeds(outcomes, "none")),
        "exceeds_native_vs_none": _over(_exceeds(outcomes, "native"), _exceeds(outcomes, "none")),
        "vs_native": {"ttft": _over(_median(native and native.loaded_ttft_ms), _median(kvbm and kvbm.loaded_ttft_ms)),
                      "exceeds": _over(_exceeds(outcomes, "kvbm"), _exceeds(outcomes, "native"))},
    }


def _bandwidth(outcome: Outcome | None, direction: str) -> float | None:
    """GB/s between GPU and host tier, by vLLM's own counters of bytes and time."""
    if outcome is None:
        return None
    totals = {what: sum(value for name, value in outcome.counters.items() if name.startswith(f"vllm:kv_offload_{direction}_{what}"))
              for what in ("bytes", "time")}
    return totals["bytes"] / totals["time"] / GB if totals["time"] else None


def _exceeds(outcomes: Mapping[str, Outcome], variant: str) -> float | None:
    outcome = outcomes.get(f"{variant}-bounded")
    return outcome.exceeds_req_per_s[0] if outcome and outcome.exceeds_req_per_s else None


def _loss(baseline: Outcome | None, other: Outcome | None) -> float | None:
    """Share of the baseline's throughput that is lost where everything fits; the better of the rounds on both sides."""
    if not (baseline and other and baseline.fits_req_per_s and other.fits_req_per_s):
        return None
    return 1 - max(other.fits_req_per_s) / max(baseline.fits_req_per_s)


def _median(values: Sequence[float] | None) -> float | None:
    return statistics.median(values) if values else None


def _over(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


if __name__ == "__main__":
    sys.exit(main())
