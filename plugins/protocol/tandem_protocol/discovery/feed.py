# SPDX-License-Identifier: Apache-2.0
"""Hands the latest snapshot to any number of watchers: the part of `watch` that all stores share."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Generic

from tandem_protocol.discovery.interface import DEBOUNCE_S, R, Snapshot


class Feed(Generic[R]):
    """Keeps one snapshot, the latest; a watcher that is slow skips versions. Used on one event loop."""

    def __init__(self, debounce_s: float = DEBOUNCE_S) -> None:
        self._debounce_s = debounce_s
        self._latest: Snapshot[R] | None = None
        self._closed = False
        self._wakes: set[asyncio.Event] = set()

    @property
    def latest(self) -> Snapshot[R] | None:
        """The last one published."""
        return self._latest

    def publish(self, snapshot: Snapshot[R]) -> None:
        """Makes it the latest; one equal to that changes nothing."""
        if snapshot != self._latest:
            self._latest = snapshot
            self._wake()

    def close(self) -> None:
        """Ends all watches, after the snapshots they have not seen."""
        self._closed = True
        self._wake()

    async def follow(self) -> AsyncGenerator[Snapshot[R], None]:
        """The latest, and again whenever it changed. The first one waits until there is any."""
        wake = asyncio.Event()
        self._wakes.add(wake)
        seen: Snapshot[R] | None = None
        try:
            while True:
                if self._latest is not None and self._latest != seen:
                    seen = self._latest
                    yield seen
                elif self._closed:
                    return
                else:
                    await self._change(wake, debounced=seen is not None)
        finally:
            self._wakes.discard(wake)

    async def _change(self, wake: asyncio.Event, *, debounced: bool) -> None:
        wake.clear()
        await wake.wait()
        if debounced and not self._closed:
            await asyncio.sleep(self._debounce_s)

    def _wake(self) -> None:
        for wake in self._wakes:
            wake.set()
