# SPDX-License-Identifier: Apache-2.0
"""Which prefill workers a decode worker seems not to reach: after a handoff it stayed silent.

A KV transfer has no deadline of its own: over a network that drops packets it waits until the network is back (measured: 126 s
after a cut of 90 s), and the request with it. So a silent pair hands nothing over for a while; then one request tries again.
Runs on the router's event loop.
"""

import time
from collections.abc import Callable

_MAX_PAIRS = 4096
"""Beyond, the oldest are forgotten: such a pair would only be tried again."""


class Doubts:
    """Pairs of a prefill and a decode worker, by their ids."""

    def __init__(self, doubt_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._doubt_s = doubt_s
        self._clock = clock
        self._until: dict[tuple[str, str], float] = {}

    def about(self, decode_id: str) -> frozenset[str]:
        """Prefill workers that should hand nothing over to this decode worker now."""
        now = self._clock()
        return frozenset(prefill for (prefill, decode), until in self._until.items() if decode == decode_id and until > now)

    def tried(self, prefill_id: str, decode_id: str) -> None:
        """A handoff begins. Between a doubted pair it is a trial, and others wait for how it ends, though not for ever."""
        if (prefill_id, decode_id) in self._until:
            self._until[prefill_id, decode_id] = self._clock() + self._doubt_s

    def silent(self, prefill_id: str, decode_id: str) -> None:
        """Nothing came of a handoff."""
        self._until.pop((prefill_id, decode_id), None)
        while len(self._until) >= _MAX_PAIRS:
            del self._until[next(iter(self._until))]
        self._until[prefill_id, decode_id] = self._clock() + self._doubt_s

    def delivered(self, prefill_id: str, decode_id: str) -> None:
        """A first token came after a handoff."""
        self._until.pop((prefill_id, decode_id), None)
