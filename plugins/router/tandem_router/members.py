# SPDX-License-Identifier: Apache-2.0
"""One slot of the index: a worker's dp rank, what it holds, and which KV-cache groups make a block complete."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tandem_protocol.kv_events import BlockStored, Tier
from tandem_router.holdings import BIT, COLUMNS, FACTS, PLACE, REQUIRED, TABLE, copy_holdings
from tandem_router.places import Rows, Table

MAX_SLOTS = 4096
_LEAST_BLOCKS = 600
_FULL_KINDS = frozenset({None, "full_attention", "mla_attention", "sink_full_attention", "unknown"})
"""Kinds of KV-cache group (vLLM's KVCacheSpecKind) without which no prefix hit is possible; None from publishers that don't say."""


@dataclass(eq=False)
class Member:
    """State of one slot."""

    slot: int
    name: str
    dp_rank: int
    block_size: int
    """0 until its first event tells."""
    table: Table = field(default_factory=lambda: Table.empty(_LEAST_BLOCKS, COLUMNS))
    """See `holdings`."""
    room: int = 0
    """Blocks that it announced to have on its device."""
    held: int = 0
    """Rows in use: blocks that it holds in any tier."""
    seen: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Groups that stored anything, by tier: bitmasks."""
    full: int = 0
    partial: int = 0
    """Groups by kind: with and without full attention."""
    required: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Groups without which a block isn't complete, by tier: bitmasks. Changed by `require` alone."""
    learned: set[tuple[int, str | None, Tier]] = field(default_factory=set)
    """What events have told about groups."""
    address: int = field(init=False)
    """Of the slot's facts: what compiled code gets."""
    _facts: NDArray[np.uint64] = field(init=False)

    def __post_init__(self) -> None:
        self._facts = np.zeros(FACTS, np.uint64)
        self.address = self._facts.ctypes.data
        self._facts[BIT] = 1 << (self.slot % 64)
        self._facts[TABLE] = self.table.address
        self.settle(self.slot // 64 + 1)

    def settle(self, words: int) -> None:
        """Notes the width of the index's masks, and so the column of the slot's word for each tier."""
        for tier in Tier:
            self._facts[PLACE + tier] = 1 + tier * words + self.slot // 64

    def require(self, tier: Tier, groups: int) -> None:
        """Notes which groups a block needs in a tier; the caller brings the tables in line."""
        self.required[tier] = groups
        self._facts[REQUIRED + tier] = groups

    def use(self, table: Table) -> None:
        """Takes another table with the same content."""
        self.table = table
        self._facts[TABLE] = table.address

    @property
    def rows(self) -> Rows:
        """Rows that were ever in use; those whose key is 0 are free."""
        return self.table.rows[: self.table.top]

    def learn(self, event: BlockStored) -> list[int]:
        """Notes the event's group; answers which groups are required from now on, by tier, for the caller to enforce.

        Windowed and state groups drop old blocks on purpose, so that they say little about a prefix: only full-attention
        groups count, or all groups if there is no such.
        """
        self.learned.add((event.group, event.spec_kind, event.tier))
        bit = 1 << event.group
        if event.spec_kind is None and self.partial & bit:
            pass  # known better from another event
        elif event.spec_kind in _FULL_KINDS:
            self.full, self.partial = self.full | bit, self.partial & ~bit
        else:
            self.full, self.partial = self.full & ~bit, self.partial | bit
        self.seen[event.tier] |= bit
        return [groups & self.full if self.full else groups for groups in self.seen]

    def counts(self, group: int, tier: Tier) -> bool:
        """Whether the group matters in the tier."""
        return bool(self.required[tier] >> group & 1)

    def prepare(self, blocks: int) -> None:
        """Makes room for so many rows in all, so that no event need wait for it."""
        self.room = blocks
        self.use(self.table.prepare(blocks))

    def compact(self) -> None:
        """Leaves out the rows that no group holds, and gives back the room that isn't needed."""
        self.fill(self.rows)

    def fill(self, rows: Rows) -> None:
        """Holds what `rows` [n, 3] of another table say, and nothing else."""
        table = Table.empty(max(_LEAST_BLOCKS, self.room, len(rows)), COLUMNS)
        self.held = copy_holdings(rows, table.address)
        self.use(table)
