# SPDX-License-Identifier: Apache-2.0
"""Calls to a real server through Triton's own clients, as a user's program makes them."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc.aio as grpcclient
from grpc.aio import AioRpcError

from tandem_protocol.stream_end import read_to_end

PARIS_PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
Response = dict[str, Any]
END_S = 5.0


@dataclass(frozen=True)
class Call:
    """One generation request, in the tensors of the contract."""

    model: str
    prompt: str | list[int] | None = PARIS_PROMPT
    sampling: Mapping[str, Any] | str | None = None
    stream: bool | None = True
    returns: tuple[str, ...] = ()
    handoff: bytes | None = None
    exclude_input_in_output: bool | None = None
    images: tuple[bytes, ...] = ()
    request_id: str = ""
    parameters: Mapping[str, Any] | None = None
    timeout_us: int | None = None
    modalities: tuple[str, ...] = ()
    negative_prompt: str | None = None

    def inputs(self) -> list[Any]:
        """The input tensors."""
        tensors: dict[str, Any] = {}
        if isinstance(self.prompt, str):
            tensors["text_input"] = np.array([self.prompt.encode()], dtype=np.object_)
        elif self.prompt is not None:
            tensors["input_ids"] = np.array(self.prompt, dtype=np.int32)
        if self.sampling is not None:
            text = self.sampling if isinstance(self.sampling, str) else json.dumps(dict(self.sampling))
            tensors["sampling_parameters"] = np.array([text.encode()], dtype=np.object_)
        if self.images:
            tensors["image"] = np.array(list(self.images), dtype=np.object_)
        if self.modalities:
            tensors["modalities"] = np.array([one.encode() for one in self.modalities], dtype=np.object_)
        if self.negative_prompt is not None:
            tensors["negative_prompt"] = np.array([self.negative_prompt.encode()], dtype=np.object_)
        if self.handoff is not None:
            tensors["kv_transfer_params"] = np.array([self.handoff], dtype=np.object_)
        flags = {"stream": self.stream, "exclude_input_in_output": self.exclude_input_in_output,
                 **{f"return_{n}": True for n in self.returns}}
        tensors.update({name: np.array([value]) for name, value in flags.items() if value is not None})
        return [_input(name, array) for name, array in tensors.items()]


def _input(name: str, array: Any) -> Any:
    kinds = {"O": "BYTES", "b": "BOOL", "i": "INT32"}
    tensor = grpcclient.InferInput(name, list(array.shape), kinds[array.dtype.kind])
    tensor.set_data_from_numpy(array)
    return tensor


@asynccontextmanager
async def connect(url: str) -> AsyncIterator[Any]:
    """A gRPC client, closed at the end."""
    client = grpcclient.InferenceServerClient(url)
    try:
        yield client
    finally:
        await client.close()


async def responses(client: Any, call: Call) -> AsyncIterator[Response]:
    """The responses of one streamed request, as name -> list; raises the server's error."""

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": call.model, "inputs": call.inputs(), "request_id": call.request_id, "enable_empty_final_response": True,
               "parameters": dict(call.parameters) if call.parameters else None, "timeout": call.timeout_us}

    stream = client.stream_infer(requests())
    try:
        async for result, error in stream:
            if error is not None:
                await read_to_end(stream, AioRpcError, END_S)
                raise error
            raw = result.get_response()
            if raw.outputs:
                yield {output.name: _values(result.as_numpy(output.name)) for output in raw.outputs}
            if raw.parameters["triton_final_response"].bool_param:
                await read_to_end(stream, AioRpcError, END_S)
                return
    finally:
        stream.cancel()


def _values(array: Any) -> list[Any]:
    return [_value(item) for item in array.reshape(-1).tolist()]


def _value(item: Any) -> Any:
    """Texts as texts; files as they are."""
    try:
        return item.decode() if isinstance(item, bytes) else item
    except UnicodeDecodeError:
        return item


async def collect(client: Any, call: Call) -> list[Response]:
    """All responses of one request."""
    return [response async for response in responses(client, call)]


async def text_of(client: Any, call: Call) -> str:
    """The whole text of one request with n = 1."""
    return "".join(response["text_output"][0] for response in await collect(client, call))


async def begin_streams(client: Any, calls: Sequence[Call]) -> list["asyncio.Task[str]"]:
    """The calls as running streams, each past its first response; their results are the texts."""
    begun = [asyncio.Event() for _ in calls]

    async def follow(call: Call, event: asyncio.Event) -> str:
        text = ""
        async for response in responses(client, call):
            text += response["text_output"][0]
            event.set()
        return text

    running = [asyncio.create_task(follow(call, event)) for call, event in zip(calls, begun, strict=True)]
    await asyncio.gather(*(event.wait() for event in begun))
    return running


async def ids_of(client: Any, call: Call) -> list[int]:
    """All output token ids of one request that asked for them."""
    return [token for response in await collect(client, call) for token in response["output_ids"]]


async def prefill(client: Any, call: Call, model: str = "prefill") -> bytes:
    """Runs the prefill leg by hand; returns the handoff."""
    result = await client.infer(model, call.inputs(), request_id=call.request_id)
    return bytes(result.as_numpy("kv_transfer_params")[0])


async def gather_bounded(limit: int, *calls: Any) -> list[Any]:
    """Awaits all, at most `limit` at a time."""
    gate = asyncio.Semaphore(limit)

    async def run(call: Any) -> Any:
        async with gate:
            return await call

    return list(await asyncio.gather(*(run(call) for call in calls)))
