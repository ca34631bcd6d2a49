# SPDX-License-Identifier: Apache-2.0
"""The check of a worker that joins: a prompt on each of its ranks, whose block keys must come back in that rank's own KV events.

A wrong block size, another way to hash or a silent event stream would make every prediction wrong without any error to see.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tandem_protocol.blocks import hash_blocks
from tandem_protocol.errors import TandemError
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.roles import Role
from tandem_protocol.workers import WorkerRecord
from tandem_router import wire
from tandem_router.connections import Connections, Patience
from tandem_router.index import KvIndex
from tandem_router.pool import dp_ranks

_BLOCKS = 2
_FIRST_ID, _IDS = 100, 1000
"""Token ids that every vocabulary has."""
_TIMEOUT_S = 60.0
_EVENTS_S = 10.0
_LOOK_S = 0.02


@dataclass(frozen=True)
class EventProbe:
    """Probes workers; `name` keeps the prompts of several routers apart, since a cached block makes no event."""

    connections: Connections
    index: KvIndex
    block_size: Callable[[], int]
    name: str

    async def __call__(self, record: WorkerRecord) -> str:
        """The reason to refuse the worker, or an empty string."""
        expected = self.block_size() or record.block_size
        if record.block_size != expected:
            return (f"the router expects blocks of {expected} tokens, the worker sends {record.block_size}: "
                    f"start it with --block-size {expected}")
        reasons = await asyncio.gather(*(self._probe(record, rank) for rank in dp_ranks(record)))
        return next(filter(None, reasons), "")

    async def _probe(self, record: WorkerRecord, rank: int) -> str:
        prompt = self._prompt(record, rank)
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await self._send(record, prompt, rank)
        except (TandemError, TimeoutError) as exc:
            return f"its probe request failed: {exc or 'no answer'}"
        return await self._seen(record, rank, hash_blocks(prompt, record.block_size))

    def _prompt(self, record: WorkerRecord, rank: int) -> NDArray[np.uint32]:
        seed = hashlib.blake2b(f"{self.name} {record.id} {rank} {time.time_ns()}".encode(), digest_size=8).digest()
        length = _BLOCKS * record.block_size + 1
        return np.random.default_rng(int.from_bytes(seed)).integers(_FIRST_ID, _FIRST_ID + _IDS, length, dtype=np.uint32)

    async def _send(self, record: WorkerRecord, prompt: NDArray[np.uint32], rank: int) -> None:
        sampling = {"max_tokens": 1, "temperature": 0, "ignore_eos": True}
        request = GenerationRequest(request_id=f"probe-{record.id}-{rank}", prompt=prompt.tolist(), images=(), stream=False,
                                    prepend_input=False, sampling=sampling, returns=frozenset(), handoff=None, priority=0, timeout_s=None)
        named = rank if len(record.event_sources) > 1 else None
        message = wire.request_message(record.triton_model, request, rank=named)
        if record.role is Role.PREFILL:
            await self.connections.infer(record.grpc_url, message, _TIMEOUT_S)
            return
        async for _ in self.connections.stream(record.grpc_url, message, Patience(_TIMEOUT_S, _TIMEOUT_S)):
            pass

    async def _seen(self, record: WorkerRecord, rank: int, keys: NDArray[np.uint64]) -> str:
        slot, deadline = self.index.add_worker(record.id, rank), time.monotonic() + _EVENTS_S
        while time.monotonic() < deadline:
            found = self.index.match(keys).blocks.sum(axis=0)
            if slot < len(found) and found[slot] >= _BLOCKS:
                return ""
            await asyncio.sleep(_LOOK_S)
        endpoint = next((source.endpoint for source in record.event_sources if source.dp_rank == rank), "")
        return (f"its KV events did not show the blocks of a probe prompt within {_EVENTS_S:g} s: check that its event port "
                f"{endpoint} is reachable and that block size and hashing agree")
