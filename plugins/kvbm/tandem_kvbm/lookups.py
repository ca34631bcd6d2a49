# SPDX-License-Identifier: Apache-2.0
"""Lookups that only the store itself can answer: one probe per step for all new keys, by a thread of vLLM's, within a deadline.

The scheduler asks again each step and hears RETRY until the answer is there; after the deadline it hears MISS, so that a store that
doesn't answer costs a request that much time and no more.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager, LookupPhase

from tandem_kvbm.counters import TierCounters
from tandem_kvbm.store import BlockStore, StoreUnavailableError

_CLOSE_S = 5.0


class Probes(AsyncLookupManager):  # type: ignore[misc]  # vLLM's classes are Any here
    """The scheduler's thread calls all but `batch_lookup`."""

    def __init__(self, store: BlockStore, counters: TierCounters, tier_type: str, deadline_s: float,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self._store, self._counters, self._deadline_s, self._clock = store, counters, deadline_s, clock
        self._asked: dict[str, dict[bytes, float]] = {}
        super().__init__(tier_type=tier_type)

    def ask(self, key: bytes, request: Any) -> bool | None:
        """Whether the store has the block; None while that isn't known and the deadline hasn't passed."""
        found: bool | None = self.lookup(key, request)
        if found is not None:
            return found
        asked_s = self._asked.setdefault(request.req_id, {}).setdefault(key, self._clock())
        if self._clock() - asked_s < self._deadline_s:
            return None
        self._counters.add("lookup_failures")
        self.mark_miss([key])
        return False

    def mark_miss(self, keys: Collection[bytes]) -> None:
        """From now on the blocks are missing, whatever an answer says that is still on its way.

        vLLM's own expects that nothing is on its way, and ends the engine by an assertion when the answer comes. A new generation
        makes it drop the late answer, as it does with one that comes after its request has gone.
        """
        for key in keys:
            state = self._lookup_state.get(key)
            if state is not None and state.phase is not LookupPhase.RESOLVED:
                self._lookup_state[key] = replace(state, generation=self._next_generation)
                self._next_generation += 1
        super().mark_miss(keys)

    def batch_lookup(self, keys: Sequence[bytes], req_context: Any) -> Collection[bool]:
        """Asks the store, on the thread of vLLM's class."""
        try:
            return self._store.probe(keys)
        except StoreUnavailableError:
            self._counters.add("lookup_failures", len(keys))
            return [False] * len(keys)

    def cleanup(self, req_id: str) -> None:
        """Forgets a request that has ended."""
        self._asked.pop(req_id, None)
        super().cleanup(req_id)

    def shutdown(self) -> None:
        """Ends the thread, or leaves it to a store that doesn't come back (it is a daemon)."""
        self._lookup_queue.put(None)
        self._thread.join(_CLOSE_S)
