# SPDX-License-Identifier: Apache-2.0
"""What became of events, in blocks: per event and in total."""

import msgspec


class ApplyResult(msgspec.Struct, frozen=True):
    """Fate of one event's blocks. In hybrid models each group counts apart."""

    stored: int = 0
    """Newly held; a repeated store counts nowhere."""
    removed: int = 0
    unknown_removed: int = 0
    """Removed, but not held as far as the index knew: a sign of lost events."""
    orphans: int = 0
    """Set aside until their parent comes."""
    dropped: int = 0
    """Orphans given up for want of room."""
    refused: int = 0
    """Wrong block size, tokens that don't fit the hashes, too many groups, or the index is full."""
    unresolved: int = 0
    """Announced by hash alone, and the hash is unknown."""
    ignored: int = 0
    """Of groups that don't count (sliding windows beside full attention)."""

    def __add__(self, other: "ApplyResult") -> "ApplyResult":
        return ApplyResult(
            self.stored + other.stored, self.removed + other.removed, self.unknown_removed + other.unknown_removed,
            self.orphans + other.orphans, self.dropped + other.dropped, self.refused + other.refused,
            self.unresolved + other.unresolved, self.ignored + other.ignored,
        )


class IndexStats(msgspec.Struct, frozen=True):
    """State of the index now, and all that was ever applied."""

    blocks: int
    """Distinct blocks that somebody holds."""
    holdings: int
    """Pairs of block and slot; bounded by `max_blocks`."""
    orphans: int
    slots: int
    size_bytes: int
    """Of all tables."""
    applied: ApplyResult


class SlotInfo(msgspec.Struct, frozen=True):
    """One slot in use."""

    slot: int
    name: str
    dp_rank: int
    block_size: int
    """0 until known."""
    blocks: int
    """Held in any tier."""
