# SPDX-License-Identifier: Apache-2.0
"""Empties the prefix caches of a whole fleet: asks every worker on its admin port, all at once, and tells what each answered."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

import aiohttp

from tandem_protocol.workers import WorkerRecord

_TIMEOUT_S = 90.0
"""A worker bounds each of its two parts by 60 s; an idle one takes a few milliseconds."""
_DONE = 200


@dataclass(frozen=True)
class Clearing:
    """What one worker answered."""

    worker: str
    cleared: bool
    message: str


async def clear_fleet(records: Iterable[WorkerRecord], *, force: bool) -> tuple[Clearing, ...]:
    """One answer per worker, in their order; a worker that can't be asked is one that wasn't cleared. Never raises for a worker's sake."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)) as session:
        return tuple(await asyncio.gather(*(_clear(session, record, force) for record in records)))


async def _clear(session: aiohttp.ClientSession, record: WorkerRecord, force: bool) -> Clearing:
    if not record.admin_url:
        return Clearing(record.id, False, "it has no admin port (DYN_SYSTEM_PORT is -1): give it one")
    try:
        async with session.post(f"{record.admin_url}/clear_kv_blocks", json={"force": force}) as answer:
            message = str((await answer.json(content_type=None)).get("message", ""))
            return Clearing(record.id, answer.status == _DONE, message)
    except (aiohttp.ClientError, TimeoutError, ValueError, AttributeError) as exc:
        return Clearing(record.id, False, f"{record.admin_url} does not answer: {str(exc) or type(exc).__name__}")
