# SPDX-License-Identifier: Apache-2.0
"""The profiler's edge to a server: one streamed request with token ids in, and when each token came."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import tritonclient.grpc.aio as grpcclient
from grpc.aio import AioRpcError
from tritonclient.utils import InferenceServerException

from tandem_protocol import tensors
from tandem_protocol.errors import ConfigError, EngineError, UnavailableError
from tandem_protocol.stream_end import read_to_end


class StreamClient:
    """A connection to one model. Resource handling: an async context manager. Error handling: nothing is retried."""

    def __init__(self, url: str, model: str, timeout_s: float) -> None:
        """`timeout_s` is the deadline of each request. Raises ConfigError for an address that is none."""
        if "://" in url or ":" not in url:
            raise ConfigError(f"--url {url!r} is not host:port: give Triton's gRPC address, e.g. localhost:8001")
        self._url, self._model, self._timeout_s = url, model, timeout_s

    async def __aenter__(self) -> Self:
        self._client = grpcclient.InferenceServerClient(self._url)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._client.close()

    async def check(self) -> None:
        """Raises UnavailableError unless the model is ready."""
        try:
            async with asyncio.timeout(self._timeout_s):
                ready = await self._client.is_model_ready(self._model)
        except (InferenceServerException, TimeoutError) as exc:
            raise UnavailableError(f"no answer from {self._url}: {exc or 'in time'}") from exc
        if not ready:
            raise UnavailableError(f"model {self._model} at {self._url} is not ready: name another with --model")

    async def token_times(self, prompt: npt.NDArray[np.int32], tokens: int) -> list[tuple[float, int]]:
        """(seconds from sending, tokens so far) per response with tokens.

        Raises UnavailableError past the deadline and when the server is lost, EngineError for a refused request or one that ends early.
        """
        began, total, times = time.perf_counter(), 0, list[tuple[float, int]]()
        try:
            async with asyncio.timeout(self._timeout_s):
                async for count in self._counts(prompt, tokens):
                    total += count
                    times.append((time.perf_counter() - began, total))
        except TimeoutError as exc:
            raise UnavailableError(f"{self._model} took more than {self._timeout_s:g} s for a request: raise --timeout-s") from exc
        except InferenceServerException as exc:
            raise EngineError(f"{self._model} refused a prompt of {len(prompt)} tokens: {exc}") from exc
        except AioRpcError as exc:
            raise UnavailableError(f"{self._model} was lost in mid-answer ({exc.details()}): look at its server's log") from exc
        if total < tokens:
            raise EngineError(f"{self._model} ended after {total} of {tokens} tokens: does it know ignore_eos?")
        return times

    async def _counts(self, prompt: npt.NDArray[np.int32], tokens: int) -> AsyncIterator[int]:
        stream = self._client.stream_infer(_once(self._model, _inputs(prompt, tokens)))
        try:
            async for result, error in stream:
                if error is not None:
                    await read_to_end(stream, AioRpcError)
                    raise error
                counts = result.as_numpy(tensors.NUM_OUTPUT_TOKENS)
                if counts is not None and (count := int(counts.sum())):
                    yield count
                if result.get_response().parameters["triton_final_response"].bool_param:
                    await read_to_end(stream, AioRpcError)
                    return
        finally:
            stream.cancel()


async def _once(model: str, inputs: Sequence[Any]) -> AsyncIterator[dict[str, Any]]:
    yield {"model_name": model, "inputs": list(inputs), "enable_empty_final_response": True}


def _inputs(prompt: npt.NDArray[np.int32], tokens: int) -> list[Any]:
    sampling = json.dumps({"max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True, "temperature": 0.0}).encode()
    arrays: dict[str, npt.NDArray[Any]] = {
        tensors.INPUT_IDS: prompt, tensors.SAMPLING_PARAMETERS: np.array([sampling], dtype=np.object_),
        tensors.STREAM: np.array([True]), f"return_{tensors.NUM_OUTPUT_TOKENS}": np.array([True]),
    }
    return [_tensor(name, array) for name, array in arrays.items()]


def _tensor(name: str, array: npt.NDArray[Any]) -> Any:
    kinds = {"O": "BYTES", "b": "BOOL", "i": "INT32"}
    tensor = grpcclient.InferInput(name, list(array.shape), kinds[array.dtype.kind])
    tensor.set_data_from_numpy(array)
    return tensor
