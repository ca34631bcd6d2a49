# SPDX-License-Identifier: Apache-2.0
"""Has the images of a request encoded before its prompt is computed. Runs on the router's event loop.

An encode worker only saves the others work: they find its embeddings by the images themselves, and encode an image that they don't find.
So whatever goes wrong with the worker costs time and no request; what is wrong with an image is the request's own error.
"""

import asyncio
import logging
from dataclasses import replace
from typing import Any

import numpy as np

from tandem_protocol.errors import EngineError, UnavailableError
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.spans import Span, carried
from tandem_router import wire
from tandem_router.config import RouterSettings
from tandem_router.connections import Connections, WorkerLostError
from tandem_router.metrics import RouterMetrics
from tandem_router.placement import Decision, Placement, RouteRequest

log = logging.getLogger(__name__)

_NO_KEYS = np.empty(0, dtype=np.uint64)


class Encoding:
    """Sends requests to encode workers, the least loaded first."""

    def __init__(self, connections: Connections, settings: RouterSettings, metrics: RouterMetrics) -> None:
        self._connections, self._settings, self._metrics = connections, settings, metrics

    async def encode(self, pool: Placement, route: RouteRequest, request: GenerationRequest, span: Span) -> None:
        """Returns when the embeddings are there, or nobody could make them. Raises RequestError for an image that is none."""
        worker_id = ""
        try:
            decision = pool.choose(_route_of(route))
            worker_id = decision.worker.id
            with span.child("router.encode", worker=worker_id) as child:
                await self._encode_on(pool, decision, carried(request, child))
        except (UnavailableError, EngineError) as exc:
            if isinstance(exc, WorkerLostError):
                pool.mark_down(worker_id, self._settings.down_s)
            log.warning("encode.fell_back worker=%s: %s", worker_id, exc)
            self._metrics.encode_fell_back()

    async def _encode_on(self, pool: Placement, decision: Decision, request: GenerationRequest) -> None:
        worker = decision.worker
        message: Any = wire.request_message(worker.triton_model,
                                            replace(request, stream=False, returns=frozenset(), prepend_input=False, handoff=None))
        try:
            await self._connections.infer(worker.grpc_url, message, self._settings.prefill_timeout_s)
        except asyncio.CancelledError:
            # A unary call's cancellation doesn't always reach a model that is not decoupled.
            await self._connections.abort(worker.grpc_url, worker.triton_model, request.request_id)
            raise
        finally:
            pool.free(decision.ticket)


def _route_of(route: RouteRequest) -> RouteRequest:
    """An encode worker has no blocks and no adapters, and what the client says of workers is not about it."""
    return replace(route, keys=_NO_KEYS, lora="", worker_id="", exclude=frozenset(), expected_output_tokens=0)
