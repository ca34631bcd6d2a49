# SPDX-License-Identifier: Apache-2.0
"""A gRPC server that speaks KServe v2 as Triton does, for the faults that a real one can't be made to show."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import grpc  # type: ignore[import-untyped]  # grpcio ships no types
from tritonclient.grpc import service_pb2, service_pb2_grpc

Script = Callable[[Any, Any], AsyncIterator[Any]]
"""(ModelInferRequest, gRPC context) -> the responses to stream."""


def delta(text: str | None = None, *, final: bool = False, finish_reason: str = "None", tokens: int = 1) -> Any:
    """One streamed response; without text it has no outputs."""
    response = service_pb2.ModelInferResponse()
    response.parameters["triton_final_response"].bool_param = final
    if text is not None:
        for name, value in (("text_output", text), ("finish_reason", finish_reason)):
            response.outputs.add(name=name, datatype="BYTES", shape=[1])
            response.raw_output_contents.append(len(value.encode()).to_bytes(4, "little") + value.encode())
        for name, count in (("num_input_tokens", 5), ("num_output_tokens", tokens)):
            response.outputs.add(name=name, datatype="UINT32", shape=[1])
            response.raw_output_contents.append(count.to_bytes(4, "little"))
    return service_pb2.ModelStreamInferResponse(infer_response=response)


def files(**outputs: bytes) -> Any:
    """The only response of a pipeline: one file in each of these outputs, and no text."""
    response = delta("", final=True)
    for name, content in outputs.items():
        response.infer_response.outputs.add(name=name, datatype="BYTES", shape=[1])
        response.infer_response.raw_output_contents.append(len(content).to_bytes(4, "little") + content)
    return response


def failure(message: str) -> Any:
    """A streamed error without a status, as older servers send it."""
    return service_pb2.ModelStreamInferResponse(error_message=message)


def answer(*responses: Any) -> Script:
    """A model that answers with these responses and ends the stream."""

    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        for response in responses:
            yield response

    return script


def silence_after(*responses: Any) -> Script:
    """A model that answers with these responses and then says nothing for ever."""

    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        for response in responses:
            yield response
        await asyncio.Event().wait()

    return script


def abort_with(code: Any, details: str) -> Script:
    """A model whose stream ends with a gRPC status."""

    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        await context.abort(code, details)
        yield

    return script


@dataclass
class FakeModel:
    """One model of the server and what it was asked."""

    script: Script = field(default_factory=lambda: answer(delta("hello", final=True)))
    parameters: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[str, ...] = ()
    state: str = "READY"
    reason: str = ""
    requests: list[Any] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a stream to this model was cut by the client."""


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # the base is untyped
    """Serves `models` on a free port of loopback inside `async with`."""

    def __init__(self, models: Mapping[str, FakeModel]) -> None:
        self.models = models
        self.url = ""

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.url = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(None)

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:  # the name is the protocol's
        entries = service_pb2.RepositoryIndexResponse.ModelIndex
        return service_pb2.RepositoryIndexResponse(
            models=[entries(name=name, version="1", state=model.state, reason=model.reason) for name, model in self.models.items()]
        )

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # the name is the protocol's
        if request.name not in self.models:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        model = self.models[request.name]
        response = service_pb2.ModelConfigResponse()
        for name, value in model.parameters.items():
            response.config.parameters[name].string_value = value
        for step in model.steps:
            response.config.ensemble_scheduling.step.add(model_name=step)
        return response

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # the name is the protocol's
        request = await anext(requests)
        model = self.models[request.model_name]
        model.requests.append(request)
        try:
            async for response in model.script(request, context):
                yield response
        except asyncio.CancelledError:
            model.cancelled.set()
            raise
