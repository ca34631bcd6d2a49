# SPDX-License-Identifier: Apache-2.0
"""What workers are believed to hold because a prompt was sent to them: an index without events.

It serves two ends. Without KV events it is the index (120 s); with them it bridges the time from a decision to its events
(2 s), so that a burst of equal prompts stays with one worker as far as the load term allows. One prompt is one belief, kept by
its last key: renewing it costs one look-up, and since a prefix is believed in at least as long as what follows it, beliefs
end from their tails. Not thread-safe.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tandem_router.chains import ChainSet, depths

_AT_ONCE = 4096
"""Blocks dropped in one call: dropping 200,000 at once would stall the decisions behind it for tens of milliseconds."""
_NOTHING = ChainSet()


@dataclass
class Ended:
    """Blocks no longer believed in, for metrics."""

    expired: int = 0
    pruned: int = 0
    """Dropped before their time for lack of room."""


class Beliefs:
    """Prompts believed to be in workers' caches; slots are small integers that the caller gives out."""

    def __init__(self, *, ttl_s: float, max_blocks: int, prune_ratio: float, clock: Callable[[], float]) -> None:
        self.ended = Ended()
        self._ttl_s, self._max_blocks, self._keep_blocks = ttl_s, max_blocks, int(max_blocks * prune_ratio)
        self._clock = clock
        self._chains: dict[int, ChainSet] = {}
        self._expiries: OrderedDict[tuple[int, int], float] = OrderedDict()
        """(slot, last key) -> when the belief ends; the time to live is one for all, so the order of renewal is that of expiry."""
        self._blocks = 0
        self._shedding = False

    def __len__(self) -> int:
        """Blocks believed in, over all slots."""
        return self._blocks

    def believe(self, slot: int, keys: Sequence[int]) -> None:
        """From now on, for the time to live, `slot` is believed to hold the prompt."""
        self.expire()
        if not keys:
            return
        belief = (slot, keys[-1])
        if belief not in self._expiries:
            self._blocks += self._chains.setdefault(slot, ChainSet()).add(keys)
        self._expiries[belief] = self._clock() + self._ttl_s
        self._expiries.move_to_end(belief)
        self._make_room(len(keys))

    def match(self, keys: Sequence[int], slots: NDArray[np.int64]) -> NDArray[np.int32]:
        """Leading blocks of a prompt that each slot is believed to hold, shape (len(slots),)."""
        self.expire()
        if not keys or not self._expiries:
            return np.zeros(len(slots), np.int32)
        chain_of = self._chains.get
        return depths([chain_of(slot, _NOTHING) for slot in slots.tolist()], keys)

    def remove(self, slot: int) -> None:
        """The slot's worker is gone, with all that it held."""
        self._blocks -= len(self._chains.pop(slot, ()))
        for belief in [belief for belief in self._expiries if belief[0] == slot]:
            del self._expiries[belief]

    def expire(self) -> None:
        """Drops what is over; every other method that needs it calls it. After a pause the rest waits for the next call."""
        now, gone = self._clock(), 0
        while gone < _AT_ONCE and self._expiries and next(iter(self._expiries.values())) <= now:
            gone += self._end_earliest()
        self.ended.expired += gone

    def check_integrity(self) -> None:
        """AssertionError if a count is off or beliefs are out of order."""
        for slot, chain in self._chains.items():
            chain.check_integrity(last for owner, last in self._expiries if owner == slot)
        expiries = list(self._expiries.values())
        if expiries != sorted(expiries) or self._blocks != sum(map(len, self._chains.values())):
            raise AssertionError(f"beliefs are out of order or miscounted: {self._blocks} blocks in {len(expiries)} beliefs")

    def _make_room(self, added: int) -> None:
        """Sheds down to the target over several calls, at least twice what is added in each; the bound itself always holds."""
        self._shedding |= self._blocks > self._max_blocks
        if not self._shedding:
            return
        step = max(self._keep_blocks, self._blocks - max(_AT_ONCE, 2 * added))
        target = min(step, self._max_blocks)
        while self._blocks > target:
            self.ended.pruned += self._end_earliest()
        self._shedding = self._blocks > self._keep_blocks

    def _end_earliest(self) -> int:
        (slot, last_key), _ = self._expiries.popitem(last=False)
        gone = self._chains[slot].release(last_key)
        self._blocks -= gone
        return gone
