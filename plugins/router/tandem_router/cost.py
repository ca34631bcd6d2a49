# SPDX-License-Identifier: Apache-2.0
"""What a request would cost on each worker, in blocks; lower is better.

    credit    = overlap_credit / (1 + credit_decay x excess_prefill)
    saved     = credit x device_hits + min(credit, 1) x believed + host_weight x host_hits + disk_weight x disk_hits
    adjusted  = max(0, prefill_blocks - saved)
    cost      = prefill_load_scale x adjusted + decode_blocks + active_request_weight x active_requests

`prefill_blocks` are those waiting on the worker plus the request's own, before hits; `excess_prefill` is what waits there beyond
the candidate with the shortest backlog, in lengths of this prompt (1: waiting takes as long as computing the prompt afresh);
`decode_blocks` are the unique blocks in flight with the request added. `believed` are blocks that a worker was sent, but hasn't
reported: a credit above 1 keeps conversations where they are, and would keep a burst of one prompt together for want of anything else.
The terms are those of Dynamo's router-design page, but for `believed`, which count as other hits there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tandem_router.config import RouterSettings

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Weights:
    """The factors of the cost."""

    prefill_load_scale: float = 1.0
    overlap_credit: float = 1.0
    credit_decay: float = 0.0
    host: float = 0.75
    disk: float = 0.25
    active_request: float = 0.0
    track_active_blocks: bool = True

    @classmethod
    def of(cls, settings: RouterSettings) -> "Weights":
        """The weights that the settings name."""
        return cls(
            prefill_load_scale=settings.prefill_load_scale, overlap_credit=settings.router_kv_overlap_score_credit,
            credit_decay=settings.router_kv_overlap_score_credit_decay, host=settings.router_host_cache_hit_weight,
            disk=settings.router_disk_cache_hit_weight, active_request=settings.router_decode_active_request_weight,
            track_active_blocks=settings.router_track_active_blocks,
        )

    def with_prefill_scale(self, scale: float) -> "Weights":
        """The same with another factor before the prefill term."""
        return replace(self, prefill_load_scale=scale)


@dataclass(frozen=True)
class Loads:
    """What is in flight on each of n candidates; every array has shape (n,)."""

    prefill_tokens: Ints
    """Prompt tokens that wait to be computed."""
    blocks: Floats
    """Blocks of requests in flight, shared prefixes counted once; fractions come from decayed output blocks."""
    requests: Ints


@dataclass(frozen=True)
class Prompt:
    """What the cost needs to know of one request."""

    isl: int
    """Prompt length in tokens."""
    block_size: int
    hits: NDArray[np.int32]
    """Leading blocks per tier (device, host, storage) and candidate, shape (3, n)."""
    shared: NDArray[np.int32]
    """Leading blocks that requests in flight on the candidate hold already, shape (n,)."""
    believed: NDArray[np.int32] | int = 0
    """Hits on the device that no event has confirmed, shape (n,), contained in `hits`."""

    @property
    def blocks(self) -> int:
        """Blocks that the prompt fills, the last one maybe in part."""
        return -(-self.isl // self.block_size)


@dataclass(frozen=True)
class Costs:
    """The cost of each of n candidates with its terms; every array has shape (n,), unit blocks."""

    total: Floats
    prefill_blocks: Floats
    credit: Floats
    adjusted_prefill_blocks: Floats
    decode_blocks: Floats


@dataclass(frozen=True)
class Terms:
    """Why one candidate costs what it costs; units as in `Costs`."""

    worker_id: str
    dp_rank: int
    cost: float
    prefill_blocks: float
    hits: tuple[int, int, int]
    """Blocks found on the device, in host memory, in storage."""
    credit: float
    adjusted_prefill_blocks: float
    decode_blocks: float
    active_requests: int
    chosen: bool


def costs(weights: Weights, loads: Loads, prompt: Prompt) -> Costs:
    """The cost of one request on every candidate."""
    prefill_blocks = (loads.prefill_tokens + prompt.isl) / prompt.block_size
    credit = _credit(weights, loads, prompt)
    device, host, disk = prompt.hits
    saved = credit * (device - prompt.believed) + np.minimum(credit, 1.0) * prompt.believed + weights.host * host + weights.disk * disk
    adjusted = np.maximum(prefill_blocks - saved, 0.0)
    # Untracked, the prefill blocks stand for the decode load (parity with Dynamo's router).
    decode = loads.blocks + (prompt.blocks - prompt.shared) if weights.track_active_blocks else np.floor(adjusted)
    total = weights.prefill_load_scale * adjusted + decode + weights.active_request * loads.requests
    return Costs(total, prefill_blocks, credit, adjusted, decode)


def _credit(weights: Weights, loads: Loads, prompt: Prompt) -> Floats:
    waiting = loads.prefill_tokens
    if not weights.credit_decay:
        return np.full(waiting.shape, weights.overlap_credit)
    excess = (waiting - waiting.min()) / max(prompt.isl, 1)
    return np.asarray(weights.overlap_credit / (1 + weights.credit_decay * excess), np.float64)


def explain(names: Sequence[tuple[str, int]], found: Costs, loads: Loads, hits: NDArray[np.int32], chosen: int) -> tuple[Terms, ...]:
    """Term by term, for n candidates named by (worker id, dp rank); `hits` has shape (3, n)."""
    return tuple(
        Terms(
            worker_id=worker_id, dp_rank=dp_rank, cost=float(found.total[at]), prefill_blocks=float(found.prefill_blocks[at]),
            hits=(int(hits[0, at]), int(hits[1, at]), int(hits[2, at])), credit=float(found.credit[at]),
            adjusted_prefill_blocks=float(found.adjusted_prefill_blocks[at]), decode_blocks=float(found.decode_blocks[at]),
            active_requests=int(loads.requests[at]), chosen=at == chosen,
        )
        for at, (worker_id, dp_rank) in enumerate(names)
    )
