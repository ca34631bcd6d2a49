# SPDX-License-Identifier: Apache-2.0
"""Serves one request: decode worker first, then prefill, then the stream, and on to another worker when one is lost.

Runs on the router's event loop. What holds for every request, whatever happens to it:
- its stream ends exactly once, with a final response or one error, after the tokens before it;
- every ticket in the books is given back, and every worker that has something of it is told to stop.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from tandem_protocol import handoff, tensors
from tandem_protocol.errors import EngineError, TandemError, UnavailableError
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.roles import Role
from tandem_protocol.spans import Span, carried
from tandem_protocol.streams import Arrays, ResponseStream
from tandem_protocol.workers import WorkerRecord
from tandem_router import wire
from tandem_router.conditional import PrefillRoute, prefill_route
from tandem_router.config import RouterSettings
from tandem_router.connections import Connections, Patience, WorkerLostError
from tandem_router.doubts import Doubts
from tandem_router.encoding import Encoding
from tandem_router.meters import RequestMeter, cached_of, count_tokens
from tandem_router.metrics import RouterMetrics
from tandem_router.pairing import unpaired, why_alone
from tandem_router.placement import Decision, Placement, RouteRequest
from tandem_router.relay import Answer, Delta

log = logging.getLogger(__name__)

_BACKSTOP_US = 1_000_000
_RETRY_S = 0.05
"""Between two looks for a worker while none takes the request."""


class Pools(Protocol):
    """The workers that a request can go to."""

    @property
    def generating(self) -> Placement:
        """The pool that a request is generated on, for one leg of it."""

    @property
    def prefill(self) -> Placement | None:
        """Prefill workers, or None while there are none or no decode workers."""

    @property
    def encode(self) -> Placement | None:
        """Encode workers, or None while there are none."""


@dataclass(frozen=True)
class Routed:
    """A request with what placement needs to know of it."""

    request: GenerationRequest
    prompt_ids: list[int]
    route: RouteRequest
    meter: RequestMeter
    span: Span
    deadline: float | None = None
    """On the monotonic clock, from the request's own timeout."""
    prefill_worker_id: str = ""
    """The prefill worker that must be taken; empty for any."""
    learn: Callable[[int], None] | None = None
    """Takes the prompt's length in tokens, as the worker that generates reports it."""


@dataclass
class Leg:
    """One worker's part in an answer."""

    pool: Placement
    decision: Decision
    shunned: frozenset[str] = frozenset()
    """Prefill workers that must not be taken: an earlier leg of the request got nothing from them."""
    prefill_id: str = ""
    """The prefill worker that handed over."""
    started: bool = False
    cached_tokens: int = field(init=False)
    """As the index said of whoever computes the prompt."""

    def __post_init__(self) -> None:
        self.cached_tokens = self.decision.cached_tokens


class Dispatcher:
    """Serves requests over the fleet."""

    def __init__(self, pools: Pools, connections: Connections, settings: RouterSettings, metrics: RouterMetrics) -> None:
        self._pools = pools
        self._connections = connections
        self._settings = settings
        self._metrics = metrics
        self._encoding = Encoding(connections, settings, metrics)
        self._patience = Patience(settings.first_token_timeout_s, settings.next_token_timeout_s)
        handed_over_s = min(settings.first_token_timeout_s, settings.transfer_timeout_s)
        self._patience_after_prefill = Patience(handed_over_s, settings.next_token_timeout_s)
        self._doubts = Doubts(settings.transfer_timeout_s)

    async def serve(self, routed: Routed, stream: ResponseStream) -> None:
        """Runs one request to its end and ends its stream, also on errors; only cancellation is passed on."""
        try:
            answer = Answer(routed.request, routed.prompt_ids)
            async with asyncio.timeout_at(routed.deadline and asyncio.get_running_loop().time() + routed.deadline - time.monotonic()):
                await self._legs(routed, answer, stream)
        except TimeoutError:
            stream.fail(UnavailableError(f"request timed out after its own timeout of {routed.request.timeout_s} s"))
        except TandemError as exc:
            stream.fail(exc)
        except Exception as exc:  # the root of the task: an uncaught error would leave the client waiting for ever
            log.exception("request.failed")
            stream.fail(EngineError(f"the router failed on this request: {exc}"))

    async def _legs(self, routed: Routed, answer: Answer, stream: ResponseStream) -> None:
        """One leg after another until the answer is whole or the migration limit is reached."""
        excluded, shunned = frozenset[str](), frozenset[str]()
        while True:
            request, pool = answer.next_leg(), self._pools.generating
            decision = await self._place(pool, _route_of(routed, request, excluded))
            log.debug("request.placed worker=%s leg=%d", decision.worker.id, answer.legs)
            leg = Leg(pool, decision, shunned)
            try:
                await self._leg(routed, request, leg, answer, stream)
            except WorkerLostError as exc:
                doubted = self._doubt(leg)
                shunned |= doubted
                if not doubted or _others_left(pool, _route_of(routed, request, excluded | {decision.worker.id})):
                    excluded |= {decision.worker.id}
                    pool.mark_down(decision.worker.id, self._settings.down_s)
                self._lost(decision.worker, answer, exc)
                if answer.complete:
                    stream.push(Delta({tensors.TEXT_OUTPUT: wire.NO_TEXT, **_length_reached(answer)}, finished=True))
                    return
                if answer.legs > self._settings.migration_limit:
                    raise UnavailableError(f"{exc} (after {answer.legs} workers, DYN_MIGRATION_LIMIT)") from exc
            else:
                return

    def _doubt(self, leg: Leg) -> frozenset[str]:
        """The prefill worker of a leg that ended before its first token: it may be the way between the two that is broken."""
        if leg.started or not leg.prefill_id:
            return frozenset()
        self._doubts.silent(leg.prefill_id, leg.decision.worker.id)
        return frozenset({leg.prefill_id})

    def _lost(self, worker: WorkerRecord, answer: Answer, error: WorkerLostError) -> None:
        log.warning("request.migrates worker=%s tokens=%d leg=%d: %s", worker.id, len(answer.tokens), answer.legs, error)
        self._metrics.migrated("ongoing_request" if answer.started else "new_request")

    async def _leg(self, routed: Routed, request: GenerationRequest, leg: Leg, answer: Answer, stream: ResponseStream) -> None:
        """Runs the request on its generating worker, after a remote prefill where that is worth it."""
        try:
            if request.images and not answer.started and (encoders := self._pools.encode) is not None:
                await self._encoding.encode(encoders, routed.route, request, routed.span)
            if self._prefill_route(leg, routed).remote:
                leg.pool.prefill_done(leg.decision.ticket)  # its tokens are computed elsewhere
                request = replace(request, handoff=await self._remote_prefill(routed, request, leg))
            await self._relay(request, leg, routed, answer, stream)
        finally:
            leg.pool.free(leg.decision.ticket)

    def _prefill_route(self, leg: Leg, routed: Routed) -> PrefillRoute:
        if leg.decision.worker.role is Role.AGGREGATED:
            return PrefillRoute(False, "the worker is an aggregated one")
        prefill = self._pools.prefill
        workers = prefill.workers if prefill is not None else ()
        alone = why_alone(workers, leg.decision.worker)
        if alone:
            self._metrics.found_unpaired()
        return prefill_route(leg.decision.non_cached_tokens, routed.route.isl, self._settings, prefill_available=bool(workers), alone=alone)

    async def _remote_prefill(self, routed: Routed, request: GenerationRequest, leg: Leg) -> dict[str, Any] | None:
        """The handoff, or None where the decode worker has to prefill by itself. Raises if disaggregation is enforced."""
        pool = self._pools.prefill
        assert pool is not None
        lost: set[str] = set()
        until = time.monotonic() + self._settings.prefill_timeout_s
        while True:
            try:
                return await self._prefill_once(pool, routed, request, leg, lost)
            except (UnavailableError, EngineError) as exc:
                anyone = not routed.prefill_worker_id and self._left(pool, leg, lost)
                if isinstance(exc, WorkerLostError) and anyone and time.monotonic() < until:
                    log.warning("prefill.moved: %s", exc)
                    continue
                if self._settings.enforce_disagg:
                    raise UnavailableError(f"remote prefill failed and disaggregation is enforced: {exc}") from exc
                log.warning("prefill.fell_back: %s", exc)
                self._metrics.prefill_fell_back()
                return None

    async def _prefill_once(self, pool: Placement, routed: Routed, request: GenerationRequest, leg: Leg, lost: set[str]) -> dict[str, Any]:
        """The handoff of the cheapest prefill worker but those that were `lost`, among which one goes that is lost now."""
        decision = pool.choose(replace(routed.route, worker_id=routed.prefill_worker_id, expected_output_tokens=0,
                                       exclude=unpaired(pool.workers, leg.decision.worker) | self._unreached(leg) | lost))
        worker_id = decision.worker.id
        self._doubts.tried(worker_id, leg.decision.worker.id)
        try:
            with routed.span.child("router.prefill", worker=worker_id) as span:
                handed = await self._prefill_on(pool, decision, carried(request, span))
        except WorkerLostError as exc:
            pool.mark_down(worker_id, self._settings.down_s)
            lost.add(worker_id)
            raise WorkerLostError(f"prefill worker {worker_id}: {exc}") from exc
        leg.cached_tokens, leg.prefill_id = decision.cached_tokens, worker_id
        return handed

    def _left(self, pool: Placement, leg: Leg, lost: set[str]) -> bool:
        """Whether there is another prefill worker to try, which is done within the time of one prefill: who took that long is the last."""
        shut = unpaired(pool.workers, leg.decision.worker) | self._unreached(leg) | lost
        return any(worker.id not in shut for worker in pool.workers)

    def _unreached(self, leg: Leg) -> frozenset[str]:
        """Prefill workers whose blocks would not come."""
        return leg.shunned | self._doubts.about(leg.decision.worker.id)

    async def _prefill_on(self, pool: Placement, decision: Decision, request: GenerationRequest) -> dict[str, Any]:
        worker = decision.worker
        message = wire.request_message(worker.triton_model, replace(request, stream=False, returns=frozenset(), prepend_input=False),
                                       rank=decision.named_rank)
        try:
            answer = await self._connections.infer(worker.grpc_url, message, self._settings.prefill_timeout_s)
        except asyncio.CancelledError:
            # A unary call's cancellation doesn't always reach a model that is not decoupled.
            await self._connections.abort(worker.grpc_url, worker.triton_model, request.request_id)
            raise
        finally:
            pool.free(decision.ticket)
        return handoff.decode(wire.response_arrays(answer)[tensors.KV_TRANSFER_PARAMS][0])

    async def _relay(self, request: GenerationRequest, leg: Leg, routed: Routed, answer: Answer, stream: ResponseStream) -> None:
        """Passes the worker's responses on as they come."""
        worker = leg.decision.worker
        with routed.span.child("router.generate", worker=worker.id, leg=answer.legs) as span:
            message = wire.request_message(worker.triton_model, carried(request, span), _left_us(routed), leg.decision.named_rank)
            await self._pass_on(message, leg, routed, answer, stream)

    async def _pass_on(self, message: Any, leg: Leg, routed: Routed, answer: Answer, stream: ResponseStream) -> None:
        async with aclosing(self._connections.stream(leg.decision.worker.grpc_url, message, self._patience_of(leg))) as responses:
            async for response in responses:
                arrays = wire.response_arrays(response)
                self._note(leg, arrays)
                if routed.meter.waiting and arrays:
                    routed.span.event("first_token")
                    if routed.learn is not None and tensors.NUM_INPUT_TOKENS in arrays:
                        routed.learn(int(arrays[tensors.NUM_INPUT_TOKENS][0]))
                routed.meter.received(count_tokens(arrays), cached_of(arrays, leg.cached_tokens), time.perf_counter())
                stream.push(Delta(answer.receive(arrays), finished=wire.is_final(response)))

    def _patience_of(self, leg: Leg) -> Patience:
        return self._patience_after_prefill if leg.prefill_id else self._patience

    def _note(self, leg: Leg, arrays: Arrays) -> None:
        """Keeps the books of this leg up to date."""
        if arrays and not leg.started:
            leg.started = True
            if leg.prefill_id:
                self._doubts.delivered(leg.prefill_id, leg.decision.worker.id)
            leg.pool.prefill_done(leg.decision.ticket)
            self._metrics.first_token(leg.decision, arrays)
        if tensors.OUTPUT_IDS in arrays:
            leg.pool.output_tokens(leg.decision.ticket, len(arrays[tensors.OUTPUT_IDS]))

    async def _place(self, pool: Placement, route: RouteRequest) -> Decision:
        """Chooses a worker, waiting for one within the placement deadline."""
        deadline = time.monotonic() + self._settings.placement_timeout_s
        while True:
            started = time.perf_counter()
            try:
                decision = pool.choose(route)
            except UnavailableError:
                if time.monotonic() >= deadline or pool.workers:
                    raise
                await asyncio.sleep(_RETRY_S)
            else:
                self._metrics.decided(time.perf_counter() - started, decision)
                return decision


def _route_of(routed: Routed, request: GenerationRequest, excluded: frozenset[str]) -> RouteRequest:
    isl = len(request.prompt) if isinstance(request.prompt, list) else routed.route.isl
    return replace(routed.route, exclude=routed.route.exclude | excluded, isl=isl)


def _others_left(pool: Placement, route: RouteRequest) -> bool:
    """Whether the request could go to another worker."""
    try:
        pool.peek(route)
    except UnavailableError:
        return False
    return True


def _left_us(routed: Routed) -> int:
    """For the worker, as a backstop: later than our own deadline, so that a request that is out of time doesn't look like a lost worker."""
    return 0 if routed.deadline is None else max(0, int((routed.deadline - time.monotonic()) * 1e6)) + _BACKSTOP_US


def _length_reached(answer: Answer) -> dict[str, Any]:
    """The closing outputs of an answer whose every token came but whose end was lost."""
    return {tensors.FINISH_REASON: wire.LENGTH_REASON} if tensors.FINISH_REASON in answer.request.returns else {}
