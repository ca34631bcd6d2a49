# SPDX-License-Identifier: Apache-2.0
"""The check of a worker that joins: a short prompt whose block keys must come back in the worker's own KV events.

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
from tandem_router.fleet import slots_of
from tandem_router.index import KvIndex

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
        prompt = self._prompt(record)
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await self._send(record, prompt)
        except (TandemError, TimeoutError) as exc:
            return f"its probe request failed: {exc or 'no answer'}"
        return await self._seen(record, hash_blocks(prompt, expected))

    def _prompt(self, record: WorkerRecord) -> NDArray[np.uint32]:
        seed = hashlib.blake2b(f"{self.name} {record.id} {time.time_ns()}".encode(), digest_size=8).digest()
        length = _BLOCKS * record.block_size + 1
        return np.random.default_rng(int.from_bytes(seed)).integers(_FIRST_ID, _FIRST_ID + _IDS, length, dtype=np.uint32)

    async def _send(self, record: WorkerRecord, prompt: NDArray[np.uint32]) -> None:
        request = GenerationRequest(request_id=f"probe-{record.id}", prompt=prompt.tolist(), images=(), stream=False, prepend_input=False,
                                    sampling={"max_tokens": 1, "temperature": 0, "ignore_eos": True}, returns=frozenset(), handoff=None,
                                    priority=0, timeout_s=None)
        message = wire.request_message(record.triton_model, request)
        if record.role is Role.PREFILL:
            await self.connections.infer(record.grpc_url, message, _TIMEOUT_S)
            return
        async for _ in self.connections.stream(record.grpc_url, message, Patience(_TIMEOUT_S, _TIMEOUT_S)):
            pass

    async def _seen(self, record: WorkerRecord, keys: NDArray[np.uint64]) -> str:
        slots, deadline = slots_of(self.index, record), time.monotonic() + _EVENTS_S
        while time.monotonic() < deadline:
            found = self.index.match(keys).blocks.sum(axis=0)
            if any(slot < len(found) and found[slot] >= _BLOCKS for slot in slots):
                return ""
            await asyncio.sleep(_LOOK_S)
        return (f"its KV events did not show the blocks of a probe prompt within {_EVENTS_S:g} s: check that its event port "
                f"{', '.join(source.endpoint for source in record.event_sources)} is reachable and that block size and hashing agree")
