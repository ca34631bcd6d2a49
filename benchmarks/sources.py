# SPDX-License-Identifier: Apache-2.0
"""The three ways to the tokens: an engine in the same process, OpenAI over HTTP, Triton over gRPC.

All send the prompt as text and sample alike: greedy, end-of-sequence ignored, a fixed number of tokens. The heavy
libraries are imported where a source is opened, so that a client process doesn't load vLLM.
"""

import itertools
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.load import TokenStream
from tandem_protocol import tensors


def sampling(output_tokens: int) -> dict[str, Any]:
    """Sampling parameters, under the names that vLLM and its OpenAI server share."""
    return {"temperature": 0.0, "max_tokens": output_tokens, "ignore_eos": True}


@dataclass(frozen=True)
class InProcessEngine:
    """vLLM's AsyncLLM as it ships; the consumer lives on the engine client's own event loop. The baseline."""

    arguments: Mapping[str, Any]

    @asynccontextmanager
    async def open(self) -> AsyncIterator[TokenStream]:
        """Starts the engine, and shuts it down."""
        from vllm import SamplingParams
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.async_llm import AsyncLLM

        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**self.arguments))
        numbers = itertools.count()

        async def stream(prompt: str, output_tokens: int) -> AsyncIterator[int]:
            parameters = SamplingParams(**sampling(output_tokens), output_kind=RequestOutputKind.DELTA)
            async for output in engine.generate(prompt, parameters, f"bench-{next(numbers)}"):
                yield len(output.outputs[0].token_ids)

        try:
            yield stream
        finally:
            engine.shutdown()


@dataclass(frozen=True)
class OpenAIServer:
    """`/v1/completions` as server-sent events; the running usage that each event carries tells its tokens."""

    url: str
    model: str

    @asynccontextmanager
    async def open(self) -> AsyncIterator[TokenStream]:
        """Opens a session without a limit of connections."""
        import aiohttp

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)) as session:

            async def stream(prompt: str, output_tokens: int) -> AsyncIterator[int]:
                async with session.post(f"{self.url}/v1/completions", json=self._body(prompt, output_tokens)) as response:
                    if response.status != 200:
                        raise BenchmarkError(f"HTTP {response.status}: {(await response.text())[:300]}")
                    seen = 0
                    async for line in response.content:
                        total = completion_tokens(line, seen)
                        yield total - seen
                        seen = total

            yield stream

    def _body(self, prompt: str, output_tokens: int) -> dict[str, Any]:
        options = {"include_usage": True, "continuous_usage_stats": True}
        return {"model": self.model, "prompt": prompt, "stream": True, "stream_options": options, **sampling(output_tokens)}


def completion_tokens(line: bytes, seen: int) -> int:
    """The tokens generated so far as of one line of the event stream; `seen` where the line doesn't say."""
    if not line.startswith(b"data: {"):
        return seen
    event = json.loads(line[len(b"data: "):])
    if "error" in event:
        raise BenchmarkError(f"the server reported {event['error']}")
    return int((event.get("usage") or {}).get("completion_tokens", seen))


@dataclass(frozen=True)
class TritonServer:
    """A generating model behind Triton's gRPC endpoint; one bidirectional stream per request, one channel per process."""

    address: str
    model: str

    @asynccontextmanager
    async def open(self) -> AsyncIterator[TokenStream]:
        """Opens the channel."""
        from tritonclient.grpc.aio import InferenceServerClient

        async with InferenceServerClient(self.address) as client:

            async def stream(prompt: str, output_tokens: int) -> AsyncIterator[int]:
                async for result, error in client.stream_infer(_once(self._request(prompt, output_tokens))):
                    if error is not None:
                        raise BenchmarkError(f"the server reported {error}")
                    counts = result.as_numpy(tensors.NUM_OUTPUT_TOKENS)
                    yield 0 if counts is None else int(counts[0])

            yield stream

    def _request(self, prompt: str, output_tokens: int) -> dict[str, Any]:
        inputs = [
            _tensor(tensors.TEXT_INPUT, prompt),
            _tensor(tensors.SAMPLING_PARAMETERS, json.dumps(sampling(output_tokens))),
            _tensor(tensors.STREAM, True),
            _tensor(tensors.EXCLUDE_INPUT_IN_OUTPUT, True),
            _tensor(f"return_{tensors.NUM_OUTPUT_TOKENS}", True),
        ]
        return {"model_name": self.model, "inputs": inputs}


def _tensor(name: str, value: str | bool) -> Any:
    import numpy as np
    from tritonclient.grpc import InferInput

    is_flag = isinstance(value, bool)
    tensor = InferInput(name, [1], "BOOL" if is_flag else "BYTES")
    tensor.set_data_from_numpy(np.array([value if is_flag else str(value).encode()], dtype=np.bool_ if is_flag else np.object_))
    return tensor


async def _once(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield request
