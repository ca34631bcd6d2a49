# SPDX-License-Identifier: Apache-2.0
"""Stored events whose parent block isn't known yet: offload tiers may announce a child before its parent."""

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tandem_protocol.kv_events import BlockStored, Tier


@dataclass(eq=False)
class Orphan:
    """One event in waiting."""

    slot: int
    event: BlockStored
    removed: NDArray[np.bool_] = field(init=False)
    """[n]: blocks that were removed while they waited."""

    def __post_init__(self) -> None:
        self.removed = np.zeros(len(self.event.hashes), np.bool_)


class Orphans:
    """Bounded by blocks over all slots: the oldest event goes first. Not thread-safe: its index's writer holds a lock."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._waiting: OrderedDict[int, Orphan] = OrderedDict()
        self._by_parent: dict[tuple[int, int], list[int]] = {}
        self._per_slot: dict[int, int] = {}
        self._next = 0
        self.blocks = 0
        """Blocks that wait now."""

    def waits_for(self, slot: int) -> bool:
        """Whether any event of the slot waits."""
        return slot in self._per_slot

    def add(self, slot: int, event: BlockStored) -> int:
        """Sets an event aside; answers how many blocks were dropped to stay within the bound."""
        assert event.parent is not None
        self._waiting[self._next] = Orphan(slot, event)
        self._by_parent.setdefault((slot, event.parent), []).append(self._next)
        self._per_slot[slot] = self._per_slot.get(slot, 0) + 1
        self._next += 1
        self.blocks += len(event.hashes)
        dropped = 0
        while self.blocks > self._max_blocks:
            dropped += self._drop(next(iter(self._waiting)))
        return dropped

    def take(self, slot: int, parent: int) -> list[Orphan]:
        """The slot's events that wait for this parent, in order of arrival; they wait no longer."""
        numbers = list(self._by_parent.get((slot, parent), ()))
        taken = [self._waiting[number] for number in numbers]
        for number in numbers:
            self._drop(number)
        return taken

    def remove(self, slot: int, tier: Tier, group: int | None, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Marks waiting blocks as removed; answers which of `hashes` [n] waited."""
        waited = np.zeros(len(hashes), np.bool_)
        for number, orphan in list(self._waiting.items()):
            event = orphan.event
            if orphan.slot == slot and event.tier is tier and group in (None, event.group):
                waited |= np.isin(hashes, event.hashes[~orphan.removed])
                orphan.removed |= np.isin(event.hashes, hashes)
                if orphan.removed.all():
                    self._drop(number)
        return waited

    def clear(self, slot: int, tier: Tier | None = None) -> None:
        """Drops the slot's events, of one tier or all."""
        for number, orphan in list(self._waiting.items()):
            if orphan.slot == slot and tier in (None, orphan.event.tier):
                self._drop(number)

    def _drop(self, number: int) -> int:
        orphan = self._waiting.pop(number)
        assert orphan.event.parent is not None
        family = (orphan.slot, orphan.event.parent)
        self._by_parent[family].remove(number)
        if not self._by_parent[family]:
            del self._by_parent[family]
        self._per_slot[orphan.slot] -= 1
        if not self._per_slot[orphan.slot]:
            del self._per_slot[orphan.slot]
        self.blocks -= len(orphan.event.hashes)
        return len(orphan.event.hashes)
