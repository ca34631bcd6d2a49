# SPDX-License-Identifier: Apache-2.0
"""An async client of any Triton server whose models keep the tensor contract.

It speaks over tritonclient's protobuf stubs and not over `tritonclient.grpc.aio.InferenceServerClient`, because the
latter can't ask for empty final responses (it refuses parameters that begin with `triton_`), and so can't tell the end
of an answer from a server that went away.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tandem_cli.failures import from_message, from_status
from tandem_cli.messages import Delta, GenerationRequest, decode, encode, encode_abort
from tandem_protocol.errors import ConfigError, TandemError, UnavailableError
from tandem_protocol.stream_end import read_to_end

CONTROL_TIMEOUT_S = 5.0
"""Deadline of a question that needs no engine: a live server answers within milliseconds."""
ABORT_TIMEOUT_S = 2.0
"""Deadline of aborting an ensemble's workers, all together; after it the client leaves, whatever they say."""

_CHANNEL_OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
_WITH_STATUS = (("triton_grpc_error", "true"),)
"""Makes Triton end a failed stream with a gRPC status instead of a bare message."""
_MAYBE_RUNNING = frozenset({grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE})
"""Statuses of a call whose request may still run on the server."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexEntry:
    """One line of Triton's repository index."""

    name: str
    ready: bool
    reason: str


@dataclass(frozen=True)
class ModelInfo:
    """What a model's config says: its parameters, and an ensemble's composing models."""

    name: str
    parameters: Mapping[str, str]
    steps: tuple[str, ...]


class GenerationClient:
    """A connection to one server.

    Resource handling: an async context manager; the channel lives inside `async with` and every call has a deadline.
    Error handling: nothing is retried; every failure is a TandemError.
    """

    def __init__(self, url: str) -> None:
        if "://" in url or ":" not in url:
            raise ConfigError(f"--url {url!r} is not host:port: give Triton's gRPC address, e.g. localhost:8001")
        self.url = url

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self.url, options=_CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._channel.close()

    async def index(self) -> tuple[IndexEntry, ...]:
        """Every model of the repository, by name; a model with several versions is ready if one of them is."""
        answer = await self._ask(self._stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=CONTROL_TIMEOUT_S))
        entries: dict[str, IndexEntry] = {}
        for model in answer.models:
            if model.name not in entries or not entries[model.name].ready:
                entries[model.name] = IndexEntry(model.name, model.state == "READY", model.reason or model.state.lower() or "not loaded")
        return tuple(entries[name] for name in sorted(entries))

    async def info(self, model: str) -> ModelInfo:
        """What the config of a loaded model says."""
        request = service_pb2.ModelConfigRequest(name=model)
        config = (await self._ask(self._stub.ModelConfig(request, timeout=CONTROL_TIMEOUT_S))).config
        parameters = {name: value.string_value for name, value in config.parameters.items()}
        return ModelInfo(model, parameters, tuple(step.model_name for step in config.ensemble_scheduling.step))

    async def tree(self, model: str) -> tuple[ModelInfo, ...]:
        """A model and, for an ensemble, all that it is composed of, breadth first."""
        found = {model: await self.info(model)}
        queue = list(found.values())
        while queue:
            for step in queue.pop(0).steps:
                if step not in found:
                    found[step] = await self.info(step)
                    queue.append(found[step])
        return tuple(found.values())

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """The answer to one request, as it comes; the last delta is the only one that is `final`.

        Resource handling: close it (`contextlib.aclosing`) or run it to the end. Cut short in any way (closed, cancelled,
        deadline) it cancels the request on the server, and aborts it in an ensemble's workers, within ABORT_TIMEOUT_S.
        """
        call = self._stub.ModelStreamInfer(_once(encode(request)), timeout=request.timeout_s, metadata=_WITH_STATUS)
        may_run = True
        try:
            async for response in call:
                if response.error_message:
                    may_run = False
                    raise from_message(response.error_message)
                delta = decode(response.infer_response)
                may_run = not delta.final
                yield delta
                if delta.final:
                    await read_to_end(call, grpc.aio.AioRpcError)
                    return
            raise UnavailableError(f"the server at {self.url} ended the stream before the answer was complete: look at its log, try again")
        except grpc.aio.AioRpcError as exc:
            may_run = may_run and exc.code() in _MAYBE_RUNNING
            raise from_status(exc.code(), exc.details() or "", self.url) from exc
        finally:
            call.cancel()
            if may_run:
                await self.abort(request.model, request.request_id)

    async def abort(self, model: str, request_id: str) -> None:
        """Aborts a request in the workers behind an ensemble; does nothing for other models, which a gRPC cancel reaches.

        Triton never tells a running ensemble step that its client left (server issue 6739), hence a message of its own.
        A failure is logged, not raised: the caller is leaving already.
        """
        try:
            async with asyncio.timeout(ABORT_TIMEOUT_S):
                _, *workers = await self.tree(model)
                async with asyncio.TaskGroup() as group:
                    for worker in workers:
                        if not worker.steps:
                            group.create_task(self._abort_in(worker.name, request_id))
        except (TandemError, TimeoutError) as exc:
            log.info("abort of request %s was not confirmed: %s", request_id, exc or "no answer in time")

    async def _abort_in(self, worker: str, request_id: str) -> None:
        call = self._stub.ModelStreamInfer(_once(encode_abort(worker, request_id)), timeout=ABORT_TIMEOUT_S, metadata=_WITH_STATUS)
        try:
            async for response in call:
                if response.error_message:
                    log.warning("model %s did not abort request %s: %s", worker, request_id, response.error_message)
                await read_to_end(call, grpc.aio.AioRpcError)
                break
        except grpc.aio.AioRpcError as exc:
            log.warning("model %s did not abort request %s: %s", worker, request_id, exc.details())
        finally:
            call.cancel()

    async def _ask(self, call: Awaitable[Any]) -> Any:
        try:
            return await call
        except grpc.aio.AioRpcError as exc:
            raise from_status(exc.code(), exc.details() or "", self.url) from exc


async def _once(message: Any) -> AsyncIterator[Any]:
    yield message
