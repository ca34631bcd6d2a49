# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.multimodal`: a batch of images answered by one engine, and with an encode worker in front of the same engine.

All servers are started by `tandem serve` with the same arguments, one after the other, and get the same rounds (`multimodal_load`).
Where CUDA shows two GPUs the split takes both, so two engines side by side are measured as well: what the second GPU would be worth
otherwise. On a GPU the model is an 8B one with a 27-layer encoder by shape, with dummy weights; on a CPU `--model` names a small one,
and only the mechanism can be seen. A split whose embeddings were not used has failed.
"""

import argparse
import asyncio
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import hardware
from benchmarks.errors import BenchmarkError
from benchmarks.multimodal_load import Front, Rounds, Shape, measure
from benchmarks.targets import HOST, tandem_command
from benchmarks.vision_shape import PLACEHOLDER, make_vision_shape

STOP_TIMEOUT_S = 60.0
_PORTS = {"http-port": 0, "grpc-port": 1, "metrics-port": 2, "admin-port": 10, "kv-event-port": 20}
_COUNTERS = {"vllm": ("loaded", "missed"), "encode": ("offered", "lost")}
_COUNTED_WITHIN_S = 10.0
"""Engines tell of a step's embeddings with the statistics of the next."""
_POLL_S = 0.25


@dataclass(frozen=True)
class Way:
    """One of the servers that are compared."""

    name: str
    front: Front
    encoders: int = 0
    engines: int = 1


class CutShortError(Exception):
    """SIGTERM came: what is measured by then is reported."""


AGGREGATED = Way("aggregated", Front(("vllm",), ("vllm",)))
SPLIT = Way("encode_split", Front(("encode_agg",), ("vllm",)), encoders=1)
TWO = Way("two_engines", Front(("vllm", "vllm_1"), ("vllm", "vllm_1")), engines=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all ways; exit code 1 if one failed."""
    args = _parse(argv)
    machine = hardware.detect()
    args.log_dir.mkdir(parents=True, exist_ok=True)
    model, arguments = _model(args, bool(machine.gpus))
    command = "python -m benchmarks.multimodal " + " ".join(argv or sys.argv[1:])
    report: dict[str, Any] = {"hardware": machine.describe(), "command": command, "versions": hardware.versions(), "model": model,
                              "engine_arguments": arguments, "failures": {}}
    ways = (AGGREGATED, SPLIT, *((TWO,) if args.two_engines or len(machine.gpus) > 1 else ()))
    with suppress(CutShortError), _cut_short_by_sigterm():
        for way in ways:
            _take(way, report, len(machine.gpus), args)
    report |= ratios(report)
    print(json.dumps(report) if args.json else json.dumps(report, indent=1), flush=True)
    return 1 if report["failures"] else 0


@contextmanager
def _cut_short_by_sigterm() -> Iterator[None]:
    def cut(*_: object) -> None:
        raise CutShortError

    before = signal.signal(signal.SIGTERM, cut)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _take(way: Way, report: dict[str, Any], gpus: int, args: argparse.Namespace) -> None:
    """Runs one way into the report. Raises CutShortError, with the way among the failures."""
    _say(way, "begin")
    report["failures"][way.name] = "cut short by SIGTERM"
    try:
        report[way.name] = {"placement": placement(way, gpus), **_run(way, report["model"], report["engine_arguments"], args)}
        del report["failures"][way.name]
        _say(way, json.dumps(report[way.name]))
    except (BenchmarkError, OSError, TimeoutError) as exc:
        report["failures"][way.name] = str(exc) or type(exc).__name__
        _say(way, report["failures"][way.name])


def _say(way: Way, what: str) -> None:
    """Progress, and what is known if the run is cut short."""
    print(f"{way.name}: {what}", file=sys.stderr, flush=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.multimodal", description=__doc__.partition("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON; without, the object is indented")
    parser.add_argument("--model", default="", help="model folder that takes images; a shape with dummy weights on a GPU if not given")
    parser.add_argument("--prompt", default=PLACEHOLDER, help="what stands for an image in a prompt of the model")
    parser.add_argument("--images", type=int, default=32, help="images, and so requests, of a batch")
    parser.add_argument("--pixels", type=int, default=1008, help="width and height of an image")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3, help="batches of new images; their median is compared")
    parser.add_argument("--streams", type=int, default=8, help="text streams beside the last batch")
    parser.add_argument("--stream-tokens", type=int, default=1000, help="tokens of each text stream")
    parser.add_argument("--two-engines", action="store_true", help="two engines as a third way, also where fewer than two GPUs are seen")
    parser.add_argument("--port", type=int, default=18600, help="first of the servers' ports")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that a server's start, or all its rounds, may take")
    parser.add_argument("--log-dir", type=Path, default=Path(tempfile.gettempdir()) / "tandem-bench-multimodal", help="logs and the model")
    args = parser.parse_args(argv)
    if min(args.images, args.pixels, args.tokens, args.rounds, args.streams) < 1:
        parser.error("--images, --pixels, --tokens, --rounds and --streams must be at least 1")
    return args


def _model(args: argparse.Namespace, on_gpu: bool) -> tuple[str, list[str]]:
    """The model and the engine arguments that it needs."""
    if args.model:
        return str(args.model), ["--max-model-len=2048", "--max-num-seqs=32"]
    if not on_gpu:
        raise SystemExit("without a GPU give --model, a small model that takes images: an 8B shape would take hours")
    shape = make_vision_shape(args.log_dir / "vision-8b-shape")
    return str(shape), ["--load-format=dummy", "--max-model-len=8192", "--max-num-batched-tokens=8192"]


def _run(way: Way, model: str, arguments: list[str], args: argparse.Namespace) -> dict[str, Any]:
    log = args.log_dir / f"{way.name}-launcher.log"
    ports = [f"--{name}={args.port + at}" for name, at in _PORTS.items()]
    flags = ["--detach", "--mode=agg", "--routers=0", f"--workers={way.engines}", f"--encode={way.encoders}", f"--model={model}",
             f"--start-timeout={args.timeout:.0f}", *ports, *arguments]
    shape = Shape(args.images, args.pixels, args.tokens, args.rounds, args.streams, args.stream_tokens, args.prompt)
    try:
        tandem_command(["serve", *flags], log, args.timeout + STOP_TIMEOUT_S)
        rounds = asyncio.run(measure(f"{HOST}:{args.port + _PORTS['grpc-port']}", way.front, shape, args.timeout))
        return report_of(rounds) | ({"embeddings": _embeddings(args.port, shape)} if way.encoders else {})
    finally:
        _stop(way, args.port, args.log_dir, log)


def _stop(way: Way, port: int, folder: Path, log: Path) -> None:
    """Keeps the server's log, since the next one on this port overwrites it."""
    from tandem_cli.serve.layout import run_folder

    with suppress(FileNotFoundError):
        shutil.copyfile(run_folder(port).log, folder / f"{way.name}-server.log")
    tandem_command(["stop", f"--http-port={port}", "--drain-timeout-s=0"], log, STOP_TIMEOUT_S, check=False)


def _embeddings(port: int, shape: Shape) -> dict[str, int]:
    """What became of the embeddings. Raises BenchmarkError if an image was not encoded by the encode worker."""
    deadline, least = time.monotonic() + _COUNTED_WITHIN_S, (shape.rounds + 1) * shape.images
    while (counts := _counts(port))["loaded"] < least and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if counts["loaded"] < least or counts["missed"]:
        raise BenchmarkError(f"no split: of {least} images the engine took {counts['loaded']} and encoded {counts['missed']} itself")
    return counts


def _counts(port: int) -> dict[str, int]:
    from tandem_cli.serve.layout import run_folder
    from tandem_cli.serve.run_state import read_state

    state = read_state(run_folder(port))
    admin = state.admin_urls if state else {}
    counts = {}
    for worker, names in _COUNTERS.items():
        with urllib.request.urlopen(f"{admin[worker]}/metrics", timeout=10) as response:
            text = response.read().decode()
        counts |= {name: counted(text, f"tandem_embeddings_{name}_total") for name in names}
    return counts


def counted(exposition: str, name: str) -> int:
    """The sum of a counter's samples; 0 if it has none yet."""
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in exposition.splitlines() if line.startswith(f"{name}{{"))


def placement(way: Way, gpus: int) -> str:
    """Where the engines of a way run, in words: not the same resources for all."""
    engines = way.engines + way.encoders
    if gpus == 0:
        return f"{engines} engine(s) on this machine's cores, shared with the load"
    if engines == 1:
        return "1 GPU"
    return f"{engines} engines share 1 GPU" if gpus == 1 else f"{engines} engines, a GPU each"


def report_of(rounds: Rounds) -> dict[str, Any]:
    """One way's part of the report."""
    return {"new_images": [batch.report() for batch in rounds.new], "images_again": rounds.again.report(),
            "images_beside_text": rounds.beside.report()}


def ratios(report: dict[str, Any]) -> dict[str, float | None]:
    """The split over each of the others; of images per second more is better, of seconds less is. None where a side is missing."""
    split, found = report.get(SPLIT.name), {}
    for way, short in ((AGGREGATED, "agg"), (TWO, "two")):
        if way is AGGREGATED or way.name in report or way.name in report["failures"]:
            found |= {f"split_vs_{short}_{name}": value for name, value in _against(split, report.get(way.name)).items()}
    return found


def _against(split: dict[str, Any] | None, other: dict[str, Any] | None) -> dict[str, float | None]:
    mine, others = (_figures(way) if way else {} for way in (split, other))
    return {name: float(f"{mine[name] / others[name]:.4g}") if mine.get(name) and others.get(name) else None
            for name in ("images_per_s", "first_token", "images_per_s_again", "text_pause_p99", "text_pause_max")}


def _figures(way: dict[str, Any]) -> dict[str, float]:
    pauses = way["images_beside_text"]["pauses_while"]
    return {"images_per_s": statistics.median(batch["images_per_s"] for batch in way["new_images"]),
            "first_token": statistics.median(batch["first_token_s_p50"] for batch in way["new_images"]),
            "images_per_s_again": way["images_again"]["images_per_s"],
            "text_pause_p99": pauses.get("p99_s", 0.0), "text_pause_max": pauses.get("max_s", 0.0)}


if __name__ == "__main__":
    sys.exit(main())
