# SPDX-License-Identifier: Apache-2.0
"""The answer to a query: which worker a request would go to, and why, without sending it there."""

import json
from dataclasses import asdict, replace
from typing import Any

from tandem_protocol import tensors
from tandem_protocol.roles import Role
from tandem_router import wire
from tandem_router.conditional import prefill_route
from tandem_router.config import RouterSettings
from tandem_router.dispatch import Routed
from tandem_router.fleet import Fleet
from tandem_router.pairing import unpaired, why_alone
from tandem_router.placement import Decision
from tandem_router.relay import Delta


def query_answer(routed: Routed, fleet: Fleet, settings: RouterSettings) -> Delta:
    """One final response with JSON in `text_output`. Errors as in placement."""
    decision = fleet.generating.peek(routed.route)
    prefill = _prefill(routed, fleet, settings, decision)
    answer = {"isl": routed.route.isl, "blocks": len(routed.route.keys), "worker": _place(decision), "prefill": prefill}
    return Delta({tensors.TEXT_OUTPUT: wire.strings(json.dumps(answer).encode())}, finished=True)


def _prefill(routed: Routed, fleet: Fleet, settings: RouterSettings, decision: Decision) -> dict[str, Any]:
    """Whether and where the prompt would be prefilled remotely."""
    if decision.worker.role is Role.AGGREGATED:
        return {"remote": False, "reason": "the worker is an aggregated one"}
    pool = fleet.prefill
    workers = pool.workers if pool is not None else ()
    route = prefill_route(decision.non_cached_tokens, routed.route.isl, settings, prefill_available=pool is not None,
                          alone=why_alone(workers, decision.worker))
    if not route.remote or pool is None:
        return {"remote": False, "reason": route.reason}
    chosen = pool.peek(replace(routed.route, worker_id=routed.prefill_worker_id, exclude=unpaired(workers, decision.worker)))
    return {"remote": True, "reason": route.reason, "worker": _place(chosen)}


def _place(decision: Decision) -> dict[str, Any]:
    worker = decision.worker
    return {
        "id": worker.id, "role": worker.role, "grpc_url": worker.grpc_url, "triton_model": worker.triton_model, "dp_rank": decision.dp_rank,
        "overlap_blocks": dict(zip(("gpu", "cpu", "storage"), decision.overlap, strict=True)),
        "cached_tokens": decision.cached_tokens, "non_cached_tokens": decision.non_cached_tokens,
        "candidates": [asdict(term) for term in decision.terms],
    }
