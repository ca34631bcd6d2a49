# SPDX-License-Identifier: Apache-2.0
"""The words in which `lane` speaks: its counters, a holder's claim, blocks in waiting."""

from collections import OrderedDict
from dataclasses import dataclass, field

import msgspec

from tandem_kvbm.consolidator.content import Unit
from tandem_kvbm.consolidator.operations import Owner


@dataclass
class Counts:
    """Blocks, by what happened to them; only ever grow."""

    stored: int = 0
    removed: int = 0
    announced: int = 0
    """Published as stored, per unit."""
    withdrawn: int = 0
    """Published as removed, per unit."""
    repeated: int = 0
    """Stored where some holder had them already."""
    unknown_removed: int = 0
    """Removed by somebody who didn't have them: after a loss, or a repetition."""
    bare: int = 0
    """Stored without tokens before anybody told theirs."""
    orphans: int = 0
    adopted: int = 0
    """Orphans whose parent came."""
    expired: int = 0
    """Orphans whose parent didn't come in time, or that gave way to newer ones."""
    mismatched: int = 0
    """With another block size than the lane's, or tokens that don't fill the blocks; not followed."""
    refused: int = 0
    """Beyond `max_blocks`, or the bounds on owners and adapters; not followed."""


class Place(msgspec.Struct, frozen=True):
    """One holder's claim in one unit."""

    source: str
    owner: Owner
    unit: Unit


@dataclass
class Waiting:
    """Blocks that wait for their parents. Entries of blocks that are gone are left until they are met."""

    by_parent: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    due: OrderedDict[tuple[int, int], tuple[float, int]] = field(default_factory=OrderedDict)
    """(slot, stamp) -> (deadline, parent), oldest first."""

    def add(self, slot: int, stamp: int, parent: int, deadline: float) -> None:
        """One block more."""
        self.by_parent.setdefault(parent, []).append((slot, stamp))
        self.due[slot, stamp] = deadline, parent

    def take(self, parent: int) -> list[tuple[int, int]]:
        """Slot and stamp of all that wait for a block; they wait no longer."""
        entries = self.by_parent.pop(parent, [])
        for entry in entries:
            self.due.pop(entry, None)
        return entries

    def oldest(self) -> tuple[tuple[int, int], float] | None:
        """Slot and stamp of whoever waits longest, and the deadline."""
        entry = next(iter(self.due), None)
        return None if entry is None else (entry, self.due[entry][0])

    def forget(self, entry: tuple[int, int]) -> None:
        """One block less."""
        _, parent = self.due.pop(entry)
        self.by_parent[parent].remove(entry)
        if not self.by_parent[parent]:
            del self.by_parent[parent]
