# SPDX-License-Identifier: Apache-2.0
"""One change at a time for each name."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tandem_protocol.errors import UnavailableError


class Turns:
    """Locks by name, each forgotten when nobody wants it. On one event loop."""

    def __init__(self) -> None:
        self._turns: dict[str, _Turn] = {}

    def __len__(self) -> int:
        """Names that somebody has or waits for."""
        return len(self._turns)

    @asynccontextmanager
    async def taking(self, name: str, timeout_s: float) -> AsyncIterator[None]:
        """Holds the name's turn for the block. Raises UnavailableError if it doesn't come in time."""
        turn = self._turns.setdefault(name, _Turn())
        turn.wanted += 1
        try:
            await _acquire(turn.lock, name, timeout_s)
            try:
                yield
            finally:
                turn.lock.release()
        finally:
            turn.wanted -= 1
            if not turn.wanted:
                del self._turns[name]


@dataclass
class _Turn:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    wanted: int = 0


async def _acquire(lock: asyncio.Lock, name: str, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await lock.acquire()
    except TimeoutError as exc:
        raise UnavailableError(f"another change of {name!r} has taken more than {timeout_s:g} s: retry later") from exc
