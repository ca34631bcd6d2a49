# SPDX-License-Identifier: Apache-2.0
"""KServe v2 over gRPC, as tritonserver answers it: one port, one model per mock worker.

Errors travel as Triton's do: in `error_message` on the stream, or as the stream's status where the client's metadata has
`triton_grpc_error: true`. A worker that dies ends the streams that use it with UNAVAILABLE, as a server that is gone.
"""

import asyncio
import contextlib
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tandem_protocol import tensors
from tandem_protocol.errors import ErrorCode, TandemError, UnavailableError
from tandem_protocol.streams import Arrays
from tandem_protocol.workers import WorkerState
from tandem_worker.mock import wire
from tandem_worker.mock.answers import MockOutput, joined
from tandem_worker.mock.fleet import Fleet
from tandem_worker.mock.handover import handoff_of, prefill
from tandem_worker.mock.worker import MockWorker, WorkerDiedError
from tandem_worker.responses import GenerationEncoder

_CODES = {
    ErrorCode.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.CANCELLED: grpc.StatusCode.CANCELLED,
    ErrorCode.INTERNAL: grpc.StatusCode.INTERNAL,
}
_DECOUPLED = "ModelInfer RPC doesn't support models with decoupled transaction policy"
_MAX_IN_FLIGHT = 4096
"""Requests of one stream that are answered at a time; reading pauses beyond."""


class InferenceService(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # generated code has no types
    """The calls that routers, clients and health checks use."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def ServerLive(self, request: Any, context: Any) -> Any:
        """Always, while the process runs."""
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        """All workers live."""
        return service_pb2.ServerReadyResponse(ready=not any(worker.dead.is_set() for worker in self._fleet))

    async def ModelReady(self, request: Any, context: Any) -> Any:
        """The worker lives."""
        worker = self._fleet.find(request.name)
        return service_pb2.ModelReadyResponse(ready=worker is not None and worker.state is WorkerState.READY)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        """The tensors of the worker's role."""
        worker = self._fleet.find(request.name)
        if worker is None:
            return await context.abort(grpc.StatusCode.NOT_FOUND, _unknown(request.name))
        role = worker.engine.settings.role
        answer = service_pb2.ModelMetadataResponse(name=request.name, versions=["1"], platform="tandem_mock")
        for listed, specs in ((answer.inputs, tensors.inputs_of(role)), (answer.outputs, tensors.outputs_of(role))):
            for spec in specs:
                listed.add(name=spec.name, datatype=spec.data_type.removeprefix("TYPE_").replace("STRING", "BYTES"), shape=spec.dims)
        return answer

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        """One answer: of prefill workers only, the others are decoupled."""
        try:
            worker = self._worker(request)
            if wire.parameters(request).get(tensors.ABORT_PARAMETER):
                return wire.response(request, _abort(worker, request))
            if worker.is_decoupled:
                return await context.abort(grpc.StatusCode.UNIMPLEMENTED, _DECOUPLED)
            return wire.response(request, await prefill(self._fleet, worker, wire.read_request(request, worker.engine.settings.role)))
        except TandemError as exc:
            return await context.abort(_CODES[exc.code], str(exc))

    async def ModelStreamInfer(self, request_iterator: Any, context: Any) -> None:
        """Requests of one client, answered together as they come."""
        stream = _Stream(context)
        ended: list[TandemError] = []
        try:
            async with asyncio.TaskGroup() as tasks:
                async for message in request_iterator:
                    await stream.slots.acquire()
                    tasks.create_task(self._answer(message, stream))
        except* TandemError as group:
            ended += [exc for exc in group.exceptions if isinstance(exc, TandemError)]
        if ended:
            await context.abort(_CODES[ended[0].code], str(ended[0]))

    async def _answer(self, message: Any, stream: "_Stream") -> None:
        try:
            worker = self._worker(message)
            if wire.parameters(message).get(tensors.ABORT_PARAMETER):
                await stream.write(wire.response(message, _abort(worker, message), final=True))
            elif worker.is_decoupled:
                await self._generate(worker, message, stream)
            else:
                request = wire.read_request(message, worker.engine.settings.role)
                await stream.write(wire.response(message, await prefill(self._fleet, worker, request), final=True))
        except TandemError as exc:
            if stream.true_status or isinstance(exc, WorkerDiedError):
                raise
            await stream.write_error(message, exc)
        finally:
            stream.slots.release()

    async def _generate(self, worker: MockWorker, message: Any, stream: "_Stream") -> None:
        request = wire.read_request(message, worker.engine.settings.role)
        encoder, empty_final = GenerationEncoder(request, n=1), wire.wants_empty_final(message)
        whole: list[MockOutput] = []
        async with handoff_of(self._fleet, request) as release, contextlib.aclosing(worker.generate(request)) as outputs:
            interval = 0  # the first token never waits
            async for output in outputs:
                await release()  # the first token means that the blocks have arrived
                whole.append(output)
                if output.finished or (request.stream and sum(len(part.outputs[0].token_ids) for part in whole) >= interval):
                    interval = worker.stream_interval
                    arrays = encoder.encode(joined(whole))
                    await stream.write(wire.response(message, arrays, final=output.finished and not empty_final))
                    whole.clear()
        if empty_final:
            await stream.write(wire.response(message, {}, final=True))

    def _worker(self, message: Any) -> MockWorker:
        worker = self._fleet.find(message.model_name)
        if worker is None:
            raise UnavailableError(_unknown(message.model_name))
        if worker.dead.is_set():
            raise WorkerDiedError("failed to connect to all addresses")
        return worker


class _Stream:
    """One client's stream: its responses go out one at a time."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._lock = asyncio.Lock()
        self.slots = asyncio.Semaphore(_MAX_IN_FLIGHT)
        self.true_status = dict(context.invocation_metadata() or ()).get("triton_grpc_error") == "true"

    async def write(self, response: Any) -> None:
        """Sends a response; waits while the client is slow."""
        await self._write(service_pb2.ModelStreamInferResponse(infer_response=response))

    async def write_error(self, message: Any, error: TandemError) -> None:
        """Sends a request's error, with its id, as its last response."""
        await self._write(service_pb2.ModelStreamInferResponse(
            error_message=str(error), infer_response=wire.response(message, {}, final=True)))

    async def _write(self, answer: Any) -> None:
        async with self._lock:
            await self._context.write(answer)


def _abort(worker: MockWorker, message: Any) -> Arrays:
    worker.abort(str(wire.parameters(message)[tensors.ABORT_PARAMETER]))
    return {}


def _unknown(model: str) -> str:
    return f"Request for unknown model: '{model}' is not found"
