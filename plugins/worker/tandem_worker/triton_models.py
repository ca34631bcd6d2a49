# SPDX-License-Identifier: Apache-2.0
"""Which models Triton itself holds ready: a worker may be well while Triton has not taken its model into service, or no longer.

Edge module: asks this worker's own tritonserver over gRPC. Runs on the worker's event loop.
"""

from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

_TIMEOUT_S = 1.0
_READY = "READY"


class TritonModels:
    """Asks one server. Resource handling: `close` ends its channel."""

    def __init__(self, grpc_url: str) -> None:
        self._url = grpc_url
        self._channel: Any = None

    async def states(self) -> dict[str, str]:
        """Model name -> `ready`, or Triton's state and reason. Empty where Triton does not answer within a second."""
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._url)
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        try:
            index = await stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return {}
        return {model.name: _state(model) for model in index.models}

    async def close(self) -> None:
        """Closes the channel, if there is one."""
        if self._channel is not None:
            await self._channel.close()


def _state(model: Any) -> str:
    if model.state == _READY:
        return "ready"
    return f"{model.state or 'UNAVAILABLE'}: {model.reason}".lower().rstrip(": ")
