# SPDX-License-Identifier: Apache-2.0
"""Empties one worker before it is ended, through its admin port: it leaves placement, ends its requests, and hands over its KV.

Edge module: knows aiohttp. A worker's `POST /engine/drain` answers when nothing is in flight, and aborts what is left after its timeout.
Then the blocks of finished prefills may still be pulled by decode workers: the KV that is in use says so.
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

import aiohttp

from tandem_protocol.errors import UnavailableError
from tandem_protocol.roles import Role
from tandem_protocol.workers import WorkerRecord

log = logging.getLogger(__name__)

HANDOFF_LEASE_S = 35.0
"""A prefill worker frees blocks that nobody pulled after 30 s (vLLM's NIXL connector), so waiting longer helps nobody."""
_BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting", "tandem_mock_held_handoffs")
_KV_USE = "vllm:kv_cache_usage_perc"
_CHECK_S = 0.25


@dataclass(frozen=True)
class Emptied:
    """How a drain ended."""

    aborted: int = 0
    """Requests that did not end in time."""


class Drainer:
    """Drains workers. Used on one event loop. Resource handling: `close` ends its connections."""

    def __init__(self, drain_s: float, call_s: float, check_s: float = _CHECK_S, lease_s: float = HANDOFF_LEASE_S) -> None:
        """`drain_s` bounds a drain; `call_s` each further call; `lease_s` the wait for KV to be pulled."""
        self._drain_s = drain_s
        self._call_s = call_s
        self._check_s = check_s
        self._lease_s = lease_s
        self._opened: aiohttp.ClientSession | None = None

    async def drain(self, record: WorkerRecord, number: int = 0) -> Emptied:
        """Returns when the worker holds nothing any more, or when its bound ended. `number`: which one behind a shared admin port.

        Raises UnavailableError if the worker can't be told, which is no reason to end it unasked.
        """
        if not record.admin_url:
            raise UnavailableError(f"worker {record.id} has no admin port to drain it by: set DYN_SYSTEM_PORT")
        emptied = await self._tell(record, number)
        if emptied.aborted:
            log.warning("planner.drain_aborted worker=%s requests=%d after_s=%g", record.id, emptied.aborted, self._drain_s)
        await self._until_empty(record)
        return emptied

    async def _tell(self, record: WorkerRecord, number: int) -> Emptied:
        timeout = aiohttp.ClientTimeout(total=self._drain_s + self._call_s)
        url = f"{record.admin_url}/engine/drain?worker={number}"
        try:
            async with self._session.post(url, json={"timeout_s": self._drain_s}, timeout=timeout) as answer:
                answer.raise_for_status()
                said: Any = await answer.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
            raise UnavailableError(f"worker {record.id} could not be drained at {record.admin_url}: {exc or type(exc).__name__}") from exc
        return Emptied(int(said.get("aborted", 0)) if isinstance(said, dict) else 0)

    async def _until_empty(self, record: WorkerRecord) -> None:
        """Bounded: requests by the drain's time, KV of a prefill worker by the lease of its handoffs."""
        bound = max(self._drain_s, self._lease_s) if record.role is Role.PREFILL else self._drain_s
        try:
            async with asyncio.timeout(bound):
                while not await self._is_empty(record):  # noqa: ASYNC110 - the state is another process's
                    await asyncio.sleep(self._check_s)
        except TimeoutError:
            log.warning("planner.drain_bound worker=%s after_s=%g: it still holds requests or KV and is ended now", record.id, bound)

    async def _is_empty(self, record: WorkerRecord) -> bool:
        """A worker that can't be asked is not known to be empty; the bound ends the wait."""
        try:
            async with self._session.get(f"{record.admin_url}/metrics", timeout=aiohttp.ClientTimeout(total=self._call_s)) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, TimeoutError):
            return False
        names = (*_BUSY, _KV_USE) if record.role is Role.PREFILL else _BUSY
        return sum_of(text, names, record.triton_model) == 0

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None:
            self._opened = aiohttp.ClientSession()
        return self._opened

    async def close(self) -> None:
        """Ends its connections; repeating it does nothing."""
        session, self._opened = self._opened, None
        if session is not None:
            await session.close()


def sum_of(exposition: str, names: tuple[str, ...], model: str) -> float:
    """The sum of these metrics; of the samples of this `model_name` only, where there are any (several workers share a port)."""
    lines = [line for line in exposition.splitlines() if line.startswith(tuple(f"{name}{{" for name in names))]
    mine = [line for line in lines if f'model_name="{model}"' in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in mine or lines)
