# SPDX-License-Identifier: Apache-2.0
"""What workers are believed to hold because a prompt was sent to them: an index without events.

It serves two ends. Without KV events it is the index (120 s); with them it bridges the time from a decision to its events
(2 s), so that a burst of equal prompts stays with one worker as far as the load term allows. One prompt is one belief, kept by
its last key: renewing it costs one look-up, and since a prefix is believed in at least as long as what follows it, beliefs
end from their tails. Not thread-safe.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tandem_router.chains import ChainForest, Keys, Run

_AT_ONCE = 64
"""Beliefs ended in one call: ending tens of thousands at once would stall the decisions behind it."""


class _Belief(NamedTuple):
    ends: float
    run: Run


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
        self._chains = ChainForest()
        self._beliefs: OrderedDict[tuple[int, int], _Belief] = OrderedDict()
        """By (slot, last key); the time to live is one for all, so the order of renewal is that of ending."""
        self._blocks = 0
        self._pruning = False

    def __len__(self) -> int:
        """Blocks believed in, over all slots."""
        return self._blocks

    def believe(self, slot: int, keys: Keys) -> None:
        """From now on, for the time to live, `slot` is believed to hold the prompt."""
        self.expire()
        if not len(keys):
            return
        name = (slot, keys.item(-1))
        known = self._beliefs.pop(name, None)
        self._beliefs[name] = _Belief(self._clock() + self._ttl_s, known.run if known else self._add(slot, keys))
        self._prune()

    def match(self, keys: Keys, slots: NDArray[np.int64]) -> NDArray[np.int32]:
        """Leading blocks of a prompt that each slot is believed to hold, shape (len(slots),)."""
        self.expire()
        if not self._beliefs:
            return np.zeros(len(slots), np.int32)
        return self._chains.depths(keys, slots)

    def remove(self, slot: int) -> None:
        """The slot's worker is gone, with all that it held."""
        for name in [name for name in self._beliefs if name[0] == slot]:
            self._end(slot, self._beliefs.pop(name).run)

    def expire(self) -> None:
        """Drops what is over; every other method that needs it calls it. After a pause the rest waits for the next calls."""
        now = self._clock()
        for _ in range(_AT_ONCE):
            if not self._beliefs or next(iter(self._beliefs.values())).ends > now:
                return
            self.ended.expired += self._end_earliest()

    def check_integrity(self) -> None:
        """AssertionError if a count is off or beliefs are out of order."""
        self._chains.check_integrity((slot, belief.run) for (slot, _), belief in self._beliefs.items())
        ends = [belief.ends for belief in self._beliefs.values()]
        if ends != sorted(ends) or self._blocks != sum(map(self._chains.blocks, {slot for slot, _ in self._beliefs})):
            raise AssertionError(f"beliefs are out of order or miscounted: {self._blocks} blocks in {len(ends)} beliefs")

    def _add(self, slot: int, keys: Keys) -> Run:
        before = self._chains.blocks(slot)
        run = self._chains.add(slot, keys)
        self._blocks += self._chains.blocks(slot) - before
        return run

    def _prune(self) -> None:
        """From beyond the bound down to the target, over several calls; the bound itself holds after each."""
        self._pruning |= self._blocks > self._max_blocks
        ended = 0
        while self._pruning and (self._blocks > self._max_blocks or ended < _AT_ONCE):
            self.ended.pruned += self._end_earliest()
            ended += 1
            self._pruning = self._blocks > self._keep_blocks

    def _end_earliest(self) -> int:
        (slot, _), belief = self._beliefs.popitem(last=False)
        return self._end(slot, belief.run)

    def _end(self, slot: int, run: Run) -> int:
        before = self._chains.blocks(slot)
        self._chains.release(slot, run)
        gone = before - self._chains.blocks(slot)
        self._blocks -= gone
        return gone
