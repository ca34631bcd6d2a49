# SPDX-License-Identifier: Apache-2.0
"""One slot of the index: a worker's dp rank, what it holds, and which KV-cache groups make a block complete."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tandem_protocol.kv_events import BlockStored, Tier
from tandem_router.holdings import copy_holdings, empty_holdings
from tandem_router.index_table import Rows

MAX_SLOTS = 4096
_LEAST_ROWS = 1024
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
    rows: Rows = field(default_factory=lambda: empty_holdings(_LEAST_ROWS))
    """See `holdings`."""
    held: int = 0
    """Rows in use: blocks that it holds in any tier."""
    seen: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Groups that stored anything, by tier: bitmasks."""
    full: int = 0
    partial: int = 0
    """Groups by kind: with and without full attention."""
    required: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(3, np.uint64))
    place: NDArray[np.uint64] = field(init=False)

    learned: set[tuple[int, str | None, Tier]] = field(default_factory=set)
    """What events have told about groups."""

    def __post_init__(self) -> None:
        self.settle(self.slot // 64 + 1)

    def settle(self, words: int) -> None:
        """Notes the width of the index's masks. `place` is where the slot's bit is in it: a column per tier, then the bit."""
        columns = [1 + tier * words + self.slot // 64 for tier in Tier]
        self.place = np.array([*columns, 1 << (self.slot % 64)], np.uint64)

    def learn(self, event: BlockStored) -> NDArray[np.uint64] | None:
        """Notes the event's group; answers which groups are required from now on, by tier, for the caller to enforce.

        None if it tells nothing new.

        Windowed and state groups drop old blocks on purpose, so that they say little about a prefix: only full-attention
        groups count, or all groups if there is no such.
        """
        told = (event.group, event.spec_kind, event.tier)
        if told in self.learned:
            return None
        self.learned.add(told)
        bit = 1 << event.group
        if event.spec_kind is None and self.partial & bit:
            pass  # known better from another event
        elif event.spec_kind in _FULL_KINDS:
            self.full, self.partial = self.full | bit, self.partial & ~bit
        else:
            self.full, self.partial = self.full & ~bit, self.partial | bit
        self.seen[event.tier] |= bit
        return np.array([groups & self.full if self.full else groups for groups in self.seen], np.uint64)

    def counts(self, group: int, tier: Tier) -> bool:
        """Whether the group matters in the tier."""
        return bool(int(self.required[tier]) >> group & 1)

    def reserve(self, blocks: int) -> None:
        """Makes room for so many more rows."""
        if 3 * (self.held + blocks) > 2 * len(self.rows):
            self.rebuild(self.held + blocks)

    def rebuild(self, blocks: int) -> None:
        """Moves to a table with room for `blocks` rows, without those that no group holds."""
        rows = empty_holdings(max(_LEAST_ROWS, capacity_for(blocks)))
        self.held = copy_holdings(self.rows, rows)
        self.rows = rows


def capacity_for(blocks: int) -> int:
    """Rows of a table for so many blocks: a power of two, filled between a third and two thirds."""
    return 1 << (3 * blocks // 2).bit_length()
