# SPDX-License-Identifier: Apache-2.0
"""The blocks of one data-parallel rank: what each contains, and who holds it in which tier. Compiled arrays, no object per block.

A block has a slot, which stays its own until it is gone. A *place* is one holder's claim in one tier and KV-cache group
(`lane`); a *unit* is a tier and group over all holders. `counts` has the claims per place, `tally` how many places of a unit
claim the block: the block is held in a unit while its tally is above 0, and the change from 0 or to 0 is what gets published.

A block is *rooted* while it is held, its content is known, and the chain of its parents was held when it came; only rooted blocks
are published. One that nobody holds any more stays, unrooted, as long as rooted descendants need its tokens for a dump.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tandem_protocol.compiled import Int, compiled, fold_multiply, inlined

# Columns of `facts`.
BIRTH, FLAGS, CHILDREN, HELD, LORA, STAMP = range(6)
"""Order of rooting (parents first); flags; blocks that have this one as their parent; units that hold it; adapter; age."""
USED, CONTENT, HAS_PARENT, ROOTED, LINKED, WAITS, EXTRA = (1 << bit for bit in range(7))
# Elements of `sizes`.
BLOCKS, FREE, BIRTHS, STAMPS, WAITING = range(5)

_ZERO = np.uint64(0)
_MIX_HASH = np.uint64(0xA0761D6478BD642F)
_MIX_WORD = np.uint64(0xE7037ED1A0B428DB)


class Table(NamedTuple):
    """C slots, P places, U units, B tokens per block."""

    lookup: NDArray[np.uint64]
    """[a power of two, 2]: hash, slot + 1 (0: empty); open addressing."""
    hashes: NDArray[np.uint64]
    """[C]"""
    parents: NDArray[np.uint64]
    """[C], meaningful with HAS_PARENT."""
    facts: NDArray[np.int64]
    """[C, 6], see the columns above."""
    counts: NDArray[np.uint16]
    """[C, P]"""
    tally: NDArray[np.uint16]
    """[C, U]"""
    tokens: NDArray[np.uint32]
    """[C, B]"""
    free: NDArray[np.int64]
    """[C], a stack of free slots, FREE of them."""
    sizes: NDArray[np.int64]
    """[5], see above."""


def empty_table(capacity: int, places: int, units: int, block_size: int) -> Table:
    """A table without blocks."""
    return Table(
        lookup=np.zeros((1 << (2 * capacity - 1).bit_length(), 2), np.uint64), hashes=np.zeros(capacity, np.uint64),
        parents=np.zeros(capacity, np.uint64), facts=np.zeros((capacity, 6), np.int64), counts=np.zeros((capacity, places), np.uint16),
        tally=np.zeros((capacity, units), np.uint16), tokens=np.zeros((capacity, block_size), np.uint32),
        free=np.arange(capacity - 1, -1, -1, dtype=np.int64), sizes=np.array([0, capacity, 0, 0, 0], np.int64),
    )


def resized(old: Table, capacity: int, places: int, units: int, block_size: int) -> Table:
    """The same blocks in the same slots, with more room in any direction."""
    new, size = empty_table(capacity, places, units, block_size), len(old.hashes)
    new.hashes[:size], new.parents[:size], new.facts[:size] = old.hashes, old.parents, old.facts
    new.counts[:size, : old.counts.shape[1]] = old.counts
    new.tally[:size, : old.tally.shape[1]] = old.tally
    new.tokens[:size, : old.tokens.shape[1]] = old.tokens
    new.sizes[:] = old.sizes
    fresh = capacity - size
    new.free[: old.sizes[FREE]] = old.free[: old.sizes[FREE]]
    new.free[old.sizes[FREE] : old.sizes[FREE] + fresh] = np.arange(capacity - 1, size - 1, -1)
    new.sizes[FREE] += fresh
    reindex(new)
    return new


@inlined
def _home(table: Table, block_hash: Int) -> Int:
    return np.int64(fold_multiply(block_hash ^ _MIX_HASH, _MIX_WORD) & np.uint64(len(table.lookup) - 1))


@inlined
def _row(table: Table, block_hash: Int) -> Int:
    """Row of `lookup` that has the hash, or where it belongs."""
    last = len(table.lookup) - 1
    row = _home(table, block_hash)
    while table.lookup[row, 1] != _ZERO and table.lookup[row, 0] != block_hash:
        row = (row + 1) & last
    return row


@inlined
def find(table: Table, block_hash: Int) -> Int:
    """The block's slot; -1 if there is none."""
    return np.int64(table.lookup[_row(table, block_hash), 1]) - 1


@compiled
def reindex(table: Table) -> None:
    """Fills an empty `lookup` from the slots in use."""
    for slot in range(len(table.hashes)):
        if table.facts[slot, FLAGS] & USED:
            row = _row(table, table.hashes[slot])
            table.lookup[row, 0] = table.hashes[slot]
            table.lookup[row, 1] = np.uint64(slot + 1)


@inlined
def take(table: Table, block_hash: Int) -> Int:
    """A slot for a new block; there must be a free one."""
    table.sizes[FREE] -= 1
    slot = table.free[table.sizes[FREE]]
    row = _row(table, block_hash)
    table.lookup[row, 0] = block_hash
    table.lookup[row, 1] = np.uint64(slot + 1)
    table.hashes[slot] = block_hash
    table.facts[slot, FLAGS] = USED
    table.sizes[STAMPS] += 1
    table.facts[slot, STAMP] = table.sizes[STAMPS]
    table.sizes[BLOCKS] += 1
    return slot


@inlined
def _erase(table: Table, row: Int) -> None:
    """Empties a row of `lookup` and moves later rows of the same run back over it."""
    last = len(table.lookup) - 1
    hole, probe = row, (row + 1) & last
    while table.lookup[probe, 1] != _ZERO:
        home = _home(table, table.lookup[probe, 0])
        if ((probe - home) & last) >= ((probe - hole) & last):
            table.lookup[hole, 0], table.lookup[hole, 1] = table.lookup[probe, 0], table.lookup[probe, 1]
            hole = probe
        probe = (probe + 1) & last
    table.lookup[hole, 0], table.lookup[hole, 1] = _ZERO, _ZERO


@inlined
def wait_no_more(table: Table, slot: Int) -> None:
    """The block doesn't wait for its parent, or not any more."""
    if table.facts[slot, FLAGS] & WAITS:
        table.facts[slot, FLAGS] &= ~WAITS
        table.sizes[WAITING] -= 1


@inlined
def release(table: Table, slot: Int) -> None:
    """Gives back the slot of a block that nobody holds and nothing descends from, and then its ancestors of the same kind."""
    going = True
    while going:
        linked = table.facts[slot, FLAGS] & LINKED and table.facts[slot, FLAGS] & HAS_PARENT
        wait_no_more(table, slot)
        _erase(table, _row(table, table.hashes[slot]))
        for column in range(6):
            table.facts[slot, column] = 0
        table.free[table.sizes[FREE]] = slot
        table.sizes[FREE] += 1
        table.sizes[BLOCKS] -= 1
        going = False
        if linked:
            parent = find(table, table.parents[slot])
            if parent >= 0:
                table.facts[parent, CHILDREN] -= 1
                going = table.facts[parent, CHILDREN] == 0 and table.facts[parent, HELD] == 0
                slot = parent


@inlined
def has_rooted_parent(table: Table, slot: Int) -> Int:
    """True as well for the first block of a sequence."""
    if not table.facts[slot, FLAGS] & HAS_PARENT:
        return True
    parent = find(table, table.parents[slot])
    return parent >= 0 and parent != slot and table.facts[parent, FLAGS] & ROOTED != 0


@inlined
def root(table: Table, slot: Int) -> Int:
    """Roots a held block with content if its parent is rooted, or it has none; whether it is rooted now."""
    flags = table.facts[slot, FLAGS]
    if not has_rooted_parent(table, slot):
        return False
    if not flags & LINKED:
        if flags & HAS_PARENT:
            table.facts[find(table, table.parents[slot]), CHILDREN] += 1
        table.facts[slot, BIRTH] = table.sizes[BIRTHS]
        table.sizes[BIRTHS] += 1
    wait_no_more(table, slot)
    table.facts[slot, FLAGS] |= ROOTED | LINKED
    return True


@compiled
def faults(table: Table) -> Int:
    """Contradictions; for tests and idle moments."""
    wrong, used, waiting = 0, 0, 0
    for slot in range(len(table.hashes)):
        flags, held = table.facts[slot, FLAGS], 0
        if not flags & USED:
            wrong += flags != 0
            continue
        used += 1
        waiting += flags & WAITS != 0
        for unit in range(table.tally.shape[1]):
            held += table.tally[slot, unit] > 0
        wrong += find(table, table.hashes[slot]) != slot
        wrong += held != table.facts[slot, HELD]
        wrong += held == 0 and table.facts[slot, CHILDREN] == 0
        wrong += flags & ROOTED != 0 and (held == 0 or flags & CONTENT == 0 or flags & LINKED == 0 or flags & WAITS != 0)
        if flags & ROOTED and flags & HAS_PARENT and find(table, table.parents[slot]) < 0:
            wrong += 1
    return wrong + (used != table.sizes[BLOCKS]) + (used + table.sizes[FREE] != len(table.hashes)) + (waiting != table.sizes[WAITING])
