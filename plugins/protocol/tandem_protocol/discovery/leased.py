# SPDX-License-Identifier: Apache-2.0
"""The registration in a store that is reached over a network: one entry, its lease, and the task that keeps both.

What differs by store is three blocking steps, each run by the store's own `call` on its thread.
"""

import asyncio
import logging
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Generic

from typing_extensions import TypeVar

from tandem_protocol.discovery.interface import Counts, R, Registration, check_same_worker
from tandem_protocol.errors import UnavailableError

log = logging.getLogger(__name__)
_END_TIMEOUT_S = 8.0
"""For the keeping task to end: no longer than one step takes."""
C = TypeVar("C", default=Any)
"""The store's client."""
Call = Callable[[Callable[[C], None]], Awaitable[None]]


class LeasedRegistration(Registration[R], Generic[R, C]):
    """Kept alive by a task of the event loop from `start` on."""

    def __init__(self, record: R, counts: Counts, call: Call[C], pause_s: Callable[[int, UnavailableError | None], float]) -> None:
        """`call` runs a step and raises UnavailableError; `pause_s` is the time to the next beat, by failures in a row and the last one."""
        self._record = record
        self._counts = counts
        self._call = call
        self._pause_s = pause_s
        self._written: R | None = None
        self._failures = 0
        self._failure: UnavailableError | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def record(self) -> R:
        """As last asked for."""
        return self._record

    @property
    def held(self) -> bool:
        """Whether the last call to the store succeeded and stored the latest record."""
        return self._written is self._record

    def start(self) -> None:
        """Keeps the lease from now on."""
        self._task = asyncio.create_task(self._keep_for_ever())

    async def update(self, record: R) -> None:
        """Writes at once; a failure is repaired by a later beat."""
        check_same_worker(self._record, record)
        self._record = record
        if self._task is not None:
            await self._try(self.write)

    async def close(self) -> None:
        """Removes the entry, and its lease."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait([task], timeout=_END_TIMEOUT_S)
        with suppress(UnavailableError):
            await self._call(self.remove)
        self._written = None

    async def beat(self) -> None:
        """One turn: keeps the lease, or makes everything anew."""
        await self._try(self.keep)

    async def _keep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._pause_s(self._failures, self._failure))
            await self.beat()

    async def _try(self, step: Callable[[C], None]) -> None:
        held = self._written is not None
        try:
            await self._call(step)
            self._failures, self._failure = 0, None
        except UnavailableError as exc:
            self._written = None
            self._failures, self._failure = self._failures + 1, exc
            if held:
                self._counts.losses += 1
                log.warning("discovery.lost worker=%s error=%s: trying again", self._record.id, exc)

    # --- on the store's thread ---

    @abstractmethod
    def write(self, client: C) -> None:
        """Stores the latest record."""

    @abstractmethod
    def keep(self, client: C) -> None:
        """One sign of life; writes what is not stored."""

    @abstractmethod
    def remove(self, client: C) -> None:
        """Removes the entry."""
