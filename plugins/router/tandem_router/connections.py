# SPDX-License-Identifier: Apache-2.0
"""gRPC to the workers: one channel per server, shared by all requests. Edge module; runs on the router's event loop.

The stream is opened per request, so that cancelling the call reaches the worker as the cancellation of exactly this request.
It carries one request, so it is called as what it is on the wire, one message and an answer of many: that takes one batch of gRPC's
core to begin, where a stream of requests takes three and a task.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from tandem_protocol.errors import EngineError, RequestCancelledError, RequestError, TandemError, UnavailableError
from tandem_protocol.stream_end import read_to_end
from tandem_router import wire

log = logging.getLogger(__name__)

_TRUE_STATUS = (("triton_grpc_error", "true"),)
"""Makes Triton end a stream with the gRPC status of an error; by default the code is lost."""
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
_SERVICE = "/inference.GRPCInferenceService"
_ERRORS: dict[grpc.StatusCode, type[TandemError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: RequestError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
    grpc.StatusCode.INTERNAL: EngineError,
}
_LOST = ("Stub process", "Request for unknown model")
"""How Triton itself begins what it says of a worker that is not there, as INTERNAL or without any status: `... is not healthy` of a stub
that is dead or stuck, until its server ends; `... has no available versions` of a model that was unloaded a moment ago."""


class WorkerLostError(UnavailableError):
    """The worker can't serve this request, though another one may: it broke off, or it says that it is not available."""


@dataclass(frozen=True)
class Patience:
    """How long a worker may stay silent, in seconds."""

    first_s: float
    """Until the first response."""
    next_s: float
    """Until any later one."""


class Silence:
    """Rings when nothing was heard for too long; one timer at a time, since making one per response costs more than reading it."""

    def __init__(self, ring: Callable[[], object], patience: Patience, loop: asyncio.AbstractEventLoop) -> None:
        self.exceeded_s: float | None = None
        """The limit at which it rang."""
        self._ring, self._patience, self._loop = ring, patience, loop
        self._limit_s = patience.first_s
        self._heard_at = 0.0
        self._timer = loop.call_later(patience.first_s, self._give_up)

    def heard(self) -> None:
        """A response came."""
        if not self._heard_at:
            self._limit_s = self._patience.next_s
            self._timer.cancel()
            self._timer = self._loop.call_later(self._limit_s, self._look)
        self._heard_at = self._loop.time()

    def close(self) -> None:
        """The stream is over."""
        self._timer.cancel()

    def _look(self) -> None:
        left_s = self._heard_at + self._limit_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
        else:
            self._give_up()

    def _give_up(self) -> None:
        self.exceeded_s = self._limit_s
        self._ring()


_ABORT_PATIENCE = Patience(2.0, 2.0)


@dataclass(frozen=True)
class _Calls:
    """What is called on one server."""

    channel: Any
    stream: Any
    infer: Any


class Connections:
    """Channels by server address. Resource handling: `close` ends them all."""

    def __init__(self) -> None:
        self._servers: dict[str, _Calls] = {}

    async def stream(self, url: str, message: Any, patience: Patience) -> AsyncGenerator[Any, None]:
        """The responses of one decoupled request, up to the final one. Leaving the iteration early cancels the request; run it to its end.

        Raises WorkerLostError when another worker may do better, else the error that the worker answered with.
        """
        call = self._server(url).stream(message, metadata=_TRUE_STATUS)
        silence = Silence(call.cancel, patience, asyncio.get_running_loop())
        try:
            async for answer in call:
                silence.heard()
                if answer.error_message:
                    raise _failure(EngineError, answer.error_message)
                yield answer.infer_response
                if wire.is_final(answer.infer_response):
                    await read_to_end(call, grpc.aio.AioRpcError)
                    return
        except grpc.aio.AioRpcError as exc:
            raise translate(exc) from exc
        except asyncio.CancelledError as exc:
            if silence.exceeded_s is None or _is_cancelled():
                raise
            raise WorkerLostError(f"the worker at {url} sent nothing for {silence.exceeded_s:g} s") from exc
        finally:
            silence.close()
            call.cancel()
        raise WorkerLostError(f"the worker at {url} ended the stream without a final response")

    async def infer(self, url: str, message: Any, timeout_s: float) -> Any:
        """One response of a model that is not decoupled. Raises as `stream` does."""
        try:
            return await self._server(url).infer(message, timeout=timeout_s)
        except grpc.aio.AioRpcError as exc:
            raise translate(exc) from exc

    async def abort(self, url: str, model: str, request_id: str) -> None:
        """Asks a worker to abort a request, as far as it is reachable: the engine's own lease is the last resort."""
        message = wire.abort_message(model, request_id)
        with suppress(TandemError, asyncio.CancelledError):
            async for _ in self.stream(url, message, _ABORT_PATIENCE):
                pass

    async def close(self) -> None:
        """Closes every channel; calls in flight are cancelled."""
        await asyncio.gather(*(server.channel.close() for server in self._servers.values()))
        self._servers.clear()

    def _server(self, url: str) -> _Calls:
        calls = self._servers.get(url)
        if calls is None:
            calls = self._servers[url] = _open(url)
        return calls


def _open(url: str) -> _Calls:
    channel = grpc.aio.insecure_channel(url, options=_CHANNEL_OPTIONS)
    send = service_pb2.ModelInferRequest.SerializeToString
    return _Calls(
        channel,
        channel.unary_stream(f"{_SERVICE}/ModelStreamInfer", send, service_pb2.ModelStreamInferResponse.FromString),
        channel.unary_unary(f"{_SERVICE}/ModelInfer", send, service_pb2.ModelInferResponse.FromString),
    )


def _is_cancelled() -> bool:
    """Whether the running task itself was cancelled, rather than the call that it reads."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def translate(error: Any) -> TandemError:
    """Our error for a gRPC status: what isn't the request's own fault is a lost worker."""
    code, details = error.code(), error.details() or str(error.code())
    if code is grpc.StatusCode.CANCELLED and "aborted" not in details and "went away" not in details:
        return WorkerLostError(f"the worker cancelled the request: {details}")
    return _failure(_ERRORS.get(code, WorkerLostError), details)


def _failure(kind: type[TandemError], details: str) -> TandemError:
    return WorkerLostError(details) if kind is EngineError and details.startswith(_LOST) else kind(details)
