# SPDX-License-Identifier: Apache-2.0
"""The two halves of a handoff between mock workers: what prefill answers, and that its blocks are freed once decode has them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from tandem_protocol.requests import GenerationRequest
from tandem_protocol.streams import Arrays
from tandem_worker.mock.answers import MockOutput, prompt_tokens
from tandem_worker.mock.fleet import Fleet
from tandem_worker.mock.worker import MockWorker
from tandem_worker.responses import encode_handoff


async def prefill(fleet: Fleet, worker: MockWorker, request: GenerationRequest) -> Arrays:
    """Computes a prompt and answers with where its blocks are. Raises as `MockWorker.prefill`."""
    key, cached = await worker.prefill(request)
    host, _, port = fleet.admin_address.rpartition(":")
    params = {
        "do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [[]], "remote_engine_id": worker.id,
        "remote_request_id": key, "remote_host": host, "remote_port": int(port), "tp_size": 1,
        "remote_num_tokens": len(prompt_tokens(request)), "remote_prefill_cached_tokens": cached, "transfer_mode": "mock",
    }
    return encode_handoff(MockOutput(None, [], [], finished=True, num_cached_tokens=cached, kv_transfer_params=params))


@contextlib.asynccontextmanager
async def handoff_of(fleet: Fleet, request: GenerationRequest) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Yields what frees the prefill worker's blocks, and calls it at the end: also of a request that never ran."""
    left = [request.handoff] if request.handoff is not None else []

    async def release() -> None:
        if left:
            await asyncio.shield(fleet.release(left.pop()))

    try:
        yield release
    finally:
        await release()
