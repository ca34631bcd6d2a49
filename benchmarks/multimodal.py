# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.multimodal`: a batch of images answered by one engine, and with an encode worker in front of the same engine.

Both servers are started by `tandem serve` with the same arguments, one after the other, and get the same batch: as many requests as
there are images, each with one that no cache has seen, all sent at once. The second round sends the same images with other questions:
there the embeddings are kept, and only the split server has them outside the engine. On a GPU the model is an 8B one with a
27-layer encoder by shape, with dummy weights; on a CPU `--model` names a small one, and only the mechanism can be seen.
"""

import argparse
import asyncio
import base64
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc.aio as grpcclient

from benchmarks import hardware
from benchmarks.errors import BenchmarkError
from benchmarks.targets import tandem_command
from benchmarks.vision_shape import PLACEHOLDER, make_vision_shape

STOP_TIMEOUT_S = 120.0
_PORTS = {"http-port": 0, "grpc-port": 1, "metrics-port": 2, "admin-port": 10, "kv-event-port": 20}
_WORDS = 64
"""Of text around each image."""


@dataclass(frozen=True)
class Way:
    """One of the servers that are compared."""

    name: str
    model: str
    """The Triton model that is asked."""
    encoders: int


WAYS = (Way("aggregated", "vllm", 0), Way("encode_split", "encode_agg", 1))


@dataclass(frozen=True)
class Batch:
    """What one batch took."""

    images: int
    seconds: float
    images_per_s: float
    first_token_s_p50: float
    first_token_s_max: float


def main(argv: Sequence[str] | None = None) -> int:
    """Runs both ways; exit code 1 if one failed."""
    args = _parse(argv)
    machine = hardware.detect()
    args.log_dir.mkdir(parents=True, exist_ok=True)
    model, arguments = _model(args, bool(machine.gpus))
    command = "python -m benchmarks.multimodal " + " ".join(argv or sys.argv[1:])
    report: dict[str, Any] = {"hardware": machine.describe(), "command": command, "versions": hardware.versions(), "model": model,
                              "engine_arguments": arguments, "failures": {}}
    files = [_image(seed, args.pixels) for seed in range(args.images)]
    for way in WAYS:
        try:
            report[way.name] = _run(way, model, arguments, files, args)
        except (BenchmarkError, OSError, TimeoutError) as exc:
            report["failures"][way.name] = str(exc)
    report |= _ratios(report)
    print(json.dumps(report) if args.json else json.dumps(report, indent=1), flush=True)
    return 1 if report["failures"] else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.multimodal", description=__doc__.partition("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON; without, the object is indented")
    parser.add_argument("--model", default="", help="model folder that takes images; a shape with dummy weights on a GPU if not given")
    parser.add_argument("--prompt", default=PLACEHOLDER, help="what stands for an image in a prompt of the model")
    parser.add_argument("--images", type=int, default=32, help="images, and so requests, of a batch")
    parser.add_argument("--pixels", type=int, default=1008, help="width and height of an image")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--port", type=int, default=18600, help="first of the servers' ports")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that a server's start, or a batch, may take")
    parser.add_argument("--log-dir", type=Path, default=Path(tempfile.gettempdir()) / "tandem-bench-multimodal", help="logs and the model")
    return parser.parse_args(argv)


def _model(args: argparse.Namespace, on_gpu: bool) -> tuple[str, list[str]]:
    """The model and the engine arguments that it needs."""
    if args.model:
        return str(args.model), ["--max-model-len=2048", "--max-num-seqs=32"]
    if not on_gpu:
        raise SystemExit("without a GPU give --model, a small model that takes images: an 8B shape would take hours")
    shape = make_vision_shape(args.log_dir / "vision-8b-shape")
    return str(shape), ["--load-format=dummy", "--max-model-len=8192", "--max-num-batched-tokens=8192"]


def _run(way: Way, model: str, arguments: list[str], files: list[bytes], args: argparse.Namespace) -> dict[str, Any]:
    log = args.log_dir / f"{way.name}.log"
    ports = [f"--{name}={args.port + at}" for name, at in _PORTS.items()]
    flags = ["--detach", "--mode=agg", "--routers=0", f"--encode={way.encoders}", f"--model={model}", f"--start-timeout={args.timeout:.0f}",
             *ports, *arguments]
    try:
        tandem_command(["serve", *flags], log, args.timeout + STOP_TIMEOUT_S)
        rounds = asyncio.run(_rounds(f"127.0.0.1:{args.port + 1}", way.model, files, args))
    finally:
        tandem_command(["stop", f"--http-port={args.port}"], log, STOP_TIMEOUT_S, check=False)
    return {"new_images": asdict(rounds[0]), "same_images": asdict(rounds[1])}


async def _rounds(url: str, model: str, files: list[bytes], args: argparse.Namespace) -> list[Batch]:
    """A warm-up of one request, then the batch twice, each with its own questions."""
    async with asyncio.timeout(3 * args.timeout), grpcclient.InferenceServerClient(url) as client:
        await _ask(client, model, _prompt(args.prompt, 999), _image(10_000, args.pixels), args.tokens)
        return [await _batch(client, model, files, args, number) for number in range(2)]


async def _batch(client: Any, model: str, files: list[bytes], args: argparse.Namespace, number: int) -> Batch:
    started = time.perf_counter()
    async with asyncio.timeout(args.timeout), asyncio.TaskGroup() as group:
        asked = [group.create_task(_ask(client, model, _prompt(args.prompt, number), file, args.tokens)) for file in files]
    seconds = time.perf_counter() - started
    firsts = [task.result() for task in asked]
    return Batch(len(files), round(seconds, 4), round(len(files) / seconds, 4), round(statistics.median(firsts), 4), round(max(firsts), 4))


async def _ask(client: Any, model: str, prompt: str, file: bytes, tokens: int) -> float:
    """Seconds to the first token of one streamed request, which is read to its end."""
    sampling = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    inputs = [_strings("text_input", prompt.encode()), _strings("image", base64.b64encode(file)),
              _strings("sampling_parameters", json.dumps(sampling).encode()), _flag("stream")]

    async def requests() -> Any:
        yield {"model_name": model, "inputs": inputs, "enable_empty_final_response": True}

    started, first = time.perf_counter(), 0.0
    async for result, error in client.stream_infer(requests()):
        if error is not None:
            raise BenchmarkError(f"{model} answered: {error}")
        first = first or time.perf_counter() - started
        if result.get_response().parameters["triton_final_response"].bool_param:
            break
    return first


def _prompt(placeholder: str, number: int) -> str:
    """The image last but for the question, so that no two prompts with different images share more than words."""
    return f"{'look ' * _WORDS}{placeholder} question {number}: what is shown?"


def _image(seed: int, side: int) -> bytes:
    """JPEG of random blocks: as large as a photograph's file, and decoded like one."""
    from PIL import Image

    blocks = np.random.default_rng(seed).integers(0, 255, (max(1, side // 8), max(1, side // 8), 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((side, side)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _strings(name: str, value: bytes) -> Any:
    tensor = grpcclient.InferInput(name, [1], "BYTES")
    tensor.set_data_from_numpy(np.array([value], dtype=np.object_))
    return tensor


def _flag(name: str) -> Any:
    tensor = grpcclient.InferInput(name, [1], "BOOL")
    tensor.set_data_from_numpy(np.array([True]))
    return tensor


def _ratios(report: dict[str, Any]) -> dict[str, float | None]:
    """Split over aggregated; of images per second more is better, of seconds less is. None where a side is missing."""
    if report["failures"]:
        return {"split_vs_agg_images_per_s": None, "split_vs_agg_first_token": None, "split_vs_agg_images_per_s_again": None}
    split, plain = report["encode_split"], report["aggregated"]

    def ratio(part: str, figure: str) -> float:
        return float(f"{split[part][figure] / plain[part][figure]:.4g}")

    return {"split_vs_agg_images_per_s": ratio("new_images", "images_per_s"),
            "split_vs_agg_first_token": ratio("new_images", "first_token_s_p50"),
            "split_vs_agg_images_per_s_again": ratio("same_images", "images_per_s")}


if __name__ == "__main__":
    sys.exit(main())
