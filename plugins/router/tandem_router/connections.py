# SPDX-License-Identifier: Apache-2.0
"""gRPC to the workers: one channel per server, shared by all requests. Edge module; runs on the router's event loop.

Triton's own client library carries the stubs. The stream is opened per request, so that cancelling the call reaches the worker as
the cancellation of exactly this request.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Any

import grpc
from tritonclient.grpc import service_pb2_grpc

from tandem_protocol.errors import EngineError, RequestCancelledError, RequestError, TandemError, UnavailableError
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
_ABORT_TIMEOUT_S = 2.0
_ERRORS: dict[grpc.StatusCode, type[TandemError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: RequestError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
    grpc.StatusCode.INTERNAL: EngineError,
}


class WorkerLostError(UnavailableError):
    """The worker can't serve this request, though another one may: it broke off, or it says that it is not available."""


class Connections:
    """Channels by server address. Resource handling: `close` ends them all."""

    def __init__(self) -> None:
        self._stubs: dict[str, Any] = {}
        self._channels: dict[str, Any] = {}

    async def stream(self, url: str, message: Any) -> AsyncGenerator[Any, None]:
        """The responses of one decoupled request, up to the final one. Leaving the iteration early cancels the request.

        Raises WorkerLostError when another worker may do better, else the error that the worker answered with.
        """
        call = self._stub(url).ModelStreamInfer(_once(message), metadata=_TRUE_STATUS)
        try:
            async for answer in call:
                if answer.error_message:
                    raise EngineError(answer.error_message)
                yield answer.infer_response
                if wire.is_final(answer.infer_response):
                    return
        except grpc.aio.AioRpcError as exc:
            raise translate(exc) from exc
        finally:
            call.cancel()
        raise WorkerLostError(f"the worker at {url} ended the stream without a final response")

    async def infer(self, url: str, message: Any, timeout_s: float) -> Any:
        """One response of a model that is not decoupled. Raises as `stream` does."""
        try:
            return await self._stub(url).ModelInfer(message, timeout=timeout_s)
        except grpc.aio.AioRpcError as exc:
            raise translate(exc) from exc

    async def abort(self, url: str, model: str, request_id: str) -> None:
        """Asks a worker to abort a request, as far as it is reachable: the engine's own lease is the last resort."""
        message = wire.abort_message(model, request_id)
        with suppress(TandemError, asyncio.CancelledError, TimeoutError):
            async with asyncio.timeout(_ABORT_TIMEOUT_S):
                async for _ in self.stream(url, message):
                    pass

    async def close(self) -> None:
        """Closes every channel; calls in flight are cancelled."""
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))
        self._channels.clear()
        self._stubs.clear()

    def _stub(self, url: str) -> Any:
        if url not in self._stubs:
            channel = self._channels[url] = grpc.aio.insecure_channel(url, options=_CHANNEL_OPTIONS)
            self._stubs[url] = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return self._stubs[url]


async def _once(message: Any) -> AsyncIterator[Any]:
    yield message


def translate(error: Any) -> TandemError:
    """Our error for a gRPC status: what isn't the request's own fault is a lost worker."""
    code, details = error.code(), error.details() or str(error.code())
    if code is grpc.StatusCode.CANCELLED and "aborted" not in details and "went away" not in details:
        return WorkerLostError(f"the worker cancelled the request: {details}")
    return _ERRORS.get(code, WorkerLostError)(details)
