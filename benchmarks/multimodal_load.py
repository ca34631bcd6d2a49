# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks.multimodal` asks of a server: batches of images, alone and beside answers that are being written.

Three kinds of rounds. *New*: images that no cache has seen. *Again*: the images of the last such round in other prompts, so that no KV
block serves, but embeddings that were kept do. *Beside*: new images while text streams run; the pauses of those are what somebody who
sent no image notices. Edge module: gRPC.
"""

import asyncio
import base64
import io
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc.aio as grpcclient
from grpc.aio import AioRpcError

from benchmarks.errors import BenchmarkError
from tandem_protocol.stream_end import read_to_end

_WORDS = 64
"""Of text around each image."""
_UNDER_WAY = 16
"""Responses of each text stream before the images are sent."""


@dataclass(frozen=True)
class Shape:
    """How large everything is."""

    images: int
    """Of a batch; each is one request."""
    pixels: int
    """Width and height of an image."""
    tokens: int
    """Of the answer about an image."""
    rounds: int
    """Batches of new images."""
    streams: int
    """Text streams beside the last batch."""
    stream_tokens: int
    placeholder: str
    """What stands for an image in a prompt of the model."""


@dataclass(frozen=True)
class Front:
    """Which Triton models are asked, in turn."""

    images: tuple[str, ...]
    text: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """What one batch took: from the first request's sending to the last one's end, and the seconds to each one's first token."""

    seconds: float
    first_tokens_s: tuple[float, ...]

    def report(self) -> dict[str, float | int]:
        """For the JSON object."""
        middle, worst = np.percentile(self.first_tokens_s, (50, 100))
        count = len(self.first_tokens_s)
        return {"images": count, "seconds": round(self.seconds, 4), "images_per_s": round(count / self.seconds, 4),
                "first_token_s_p50": round(float(middle), 4), "first_token_s_max": round(float(worst), 4)}


@dataclass(frozen=True)
class Beside:
    """A batch beside text streams, and the pauses between their responses before and while it ran."""

    batch: Batch
    before_s: tuple[float, ...]
    while_s: tuple[float, ...]

    def report(self) -> dict[str, Any]:
        """For the JSON object."""
        return {**self.batch.report(), "pauses_before": _pauses(self.before_s), "pauses_while": _pauses(self.while_s)}


@dataclass(frozen=True)
class Rounds:
    """All rounds of one server."""

    new: tuple[Batch, ...]
    again: Batch
    beside: Beside


@dataclass
class _Stream:
    """When the responses of one text stream came."""

    at: list[float] = field(default_factory=list)
    under_way: asyncio.Event = field(default_factory=asyncio.Event)

    def came(self, now: float) -> None:
        self.at.append(now)
        if len(self.at) >= _UNDER_WAY:
            self.under_way.set()


class Load:
    """One server's client. Every round's prompts and images are others, so that rounds share only what they are to share."""

    def __init__(self, client: Any, front: Front, shape: Shape) -> None:
        self._client, self._front, self._shape = client, front, shape
        self._numbers = itertools.count()

    async def rounds(self) -> Rounds:
        """After a warm-up of one request per model. Raises BenchmarkError with the server's sentence."""
        for model in self._front.images:
            await self._ask(model, "warm up", make_image(10**6, self._shape.pixels))
        batches = [self._files(number) for number in range(self._shape.rounds + 1)]
        new = [await self._batch(files) for files in batches[:-1]]
        again = await self._batch(batches[-2])
        return Rounds(tuple(new), again, await self._beside(batches[-1]))

    def _files(self, number: int) -> list[bytes]:
        first = number * self._shape.images
        return [make_image(first + at, self._shape.pixels) for at in range(self._shape.images)]

    async def _batch(self, files: Sequence[bytes]) -> Batch:
        about, models = f"in round {next(self._numbers)}", itertools.cycle(self._front.images)
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(self._ask(model, about, file)) for model, file in zip(models, files, strict=False)]
        return Batch(time.perf_counter() - started, tuple(task.result() for task in asked))

    async def _beside(self, files: Sequence[bytes]) -> Beside:
        """Streams end by themselves; what they sent after the batch is not looked at."""
        streams = [_Stream() for _ in range(self._shape.streams)]
        async with asyncio.TaskGroup() as group:
            for number, (stream, model) in enumerate(zip(streams, itertools.cycle(self._front.text), strict=False)):
                group.create_task(self._write(model, number, stream))
            for stream in streams:
                await stream.under_way.wait()
            started = time.perf_counter()
            batch = await self._batch(files)
        ended = started + batch.seconds
        return Beside(batch, _between(streams, 0.0, started), _between(streams, started, ended))

    async def _write(self, model: str, number: int, stream: _Stream) -> None:
        """One text stream to its end. Raises BenchmarkError if it is too short to be beside anything."""
        inputs = _inputs(f"Story {number}: {'once ' * _WORDS}", self._shape.stream_tokens)
        async for _ in self._responses(model, inputs):
            stream.came(time.perf_counter())
        if not stream.under_way.is_set():
            raise BenchmarkError(f"a text stream of {self._shape.stream_tokens} tokens came in {len(stream.at)} responses: too few to be "
                                 f"under way, give it more tokens")

    async def _ask(self, model: str, about: str, file: bytes) -> float:
        """Seconds to the first token of one streamed request, which is read to its end."""
        prompt = f"Look closely, {about}: {'look ' * _WORDS}{self._shape.placeholder} What is shown?"
        inputs = [*_inputs(prompt, self._shape.tokens), _strings("image", base64.b64encode(file))]
        started = time.perf_counter()
        came = [time.perf_counter() async for _ in self._responses(model, inputs)]
        return came[0] - started

    async def _responses(self, model: str, inputs: list[Any]) -> Any:
        """Responses until the final one. Raises BenchmarkError."""
        async def requests() -> Any:
            yield {"model_name": model, "inputs": inputs, "enable_empty_final_response": True}

        stream = self._client.stream_infer(requests())
        try:
            async for result, error in stream:
                if error is not None:
                    await read_to_end(stream, AioRpcError)
                    raise BenchmarkError(f"{model} answered: {error}")
                yield result
                if result.get_response().parameters["triton_final_response"].bool_param:
                    await read_to_end(stream, AioRpcError)
                    return
        except AioRpcError as exc:
            raise BenchmarkError(f"{model} was lost: {exc.details()}") from exc


async def measure(url: str, front: Front, shape: Shape, timeout_s: float) -> Rounds:
    """All rounds on the server at `url` (host:port of gRPC). Raises BenchmarkError, TimeoutError."""
    try:
        async with asyncio.timeout(timeout_s), grpcclient.InferenceServerClient(url) as client:
            return await Load(client, front, shape).rounds()
    except ExceptionGroup as exc:
        raise BenchmarkError("; ".join(sorted({str(cause) or type(cause).__name__ for cause in _causes(exc)}))) from exc


def make_image(seed: int, side: int) -> bytes:
    """JPEG of random blocks: as large as a photograph's file, and decoded like one."""
    from PIL import Image

    blocks = np.random.default_rng(seed).integers(0, 255, (max(1, side // 8), max(1, side // 8), 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((side, side)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _causes(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    return [cause for exc in group.exceptions for cause in (_causes(exc) if isinstance(exc, BaseExceptionGroup) else [exc])]


def _between(streams: Sequence[_Stream], begin: float, end: float) -> tuple[float, ...]:
    """Pauses of all streams that touch this time."""
    pauses = (pause for stream in streams for pause in itertools.pairwise(stream.at))
    return tuple(later - earlier for earlier, later in pauses if later > begin and earlier < end)


def _pauses(seconds: Sequence[float]) -> dict[str, float | int]:
    """Of at least one; a stream that ended before the images came has none."""
    if not seconds:
        return {"count": 0}
    middle, high, most = np.percentile(seconds, (50, 99, 100))
    return {"count": len(seconds), "p50_s": round(float(middle), 5), "p99_s": round(float(high), 5), "max_s": round(float(most), 5)}


def _inputs(prompt: str, tokens: int) -> list[Any]:
    sampling = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    return [_strings("text_input", prompt.encode()), _strings("sampling_parameters", json.dumps(sampling).encode()), _flag("stream")]


def _strings(name: str, value: bytes) -> Any:
    tensor = grpcclient.InferInput(name, [1], "BYTES")
    tensor.set_data_from_numpy(np.array([value], dtype=np.object_))
    return tensor


def _flag(name: str) -> Any:
    tensor = grpcclient.InferInput(name, [1], "BOOL")
    tensor.set_data_from_numpy(np.array([True]))
    return tensor
