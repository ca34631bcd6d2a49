# SPDX-License-Identifier: Apache-2.0
"""What one slot (a worker's dp rank) holds: its engine's block hashes, each with our key and the groups that have it. Compiled.

`rows` is uint64 [capacity, 3]: the engine's hash, our key (0: empty), and three masks of 16 KV-cache groups, one per
tier. A block counts as held in a tier once every group in `required` has it, and only then has the slot's bit in the
index. Masks rather than counts, because engines repeat themselves: a store that comes twice must change nothing.
At most one of a slot's hashes with the same key counts in a tier, the last (an adapter's name given to other weights).
"""

import numpy as np
from numpy.typing import NDArray

from tandem_protocol.compiled import Int, compiled, fold_multiply, inlined, prefetch
from tandem_router.index_table import Rows, clear_bit, has_bit, set_bit
from tandem_router.table_memory import zeroed

GROUPS = 16
"""Groups per slot that can be told apart."""
ALL_GROUPS = (1 << GROUPS) - 1

_AHEAD = 12
"""How many blocks ahead of the current one a store asks for the rows."""
_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_GROUP_BITS = np.uint64(GROUPS)
_MASK = np.uint64(ALL_GROUPS)
_MIX_HASH = np.uint64(0xA0761D6478BD642F)
_MIX_WORD = np.uint64(0xE7037ED1A0B428DB)

Counts = NDArray[np.int64]
"""int64 [5], added to: see the constants below."""
STORED, REMOVED, UNKNOWN, ADDED, REFUSED = 0, 1, 2, 3, 4
"""Masks changed by a store and by a removal, hashes that aren't known, rows more, and new blocks beyond the room."""


def empty_holdings(capacity: int) -> Rows:
    """Rows that hold nothing; `capacity` is a power of two."""
    return zeroed(capacity, 3)


@inlined
def _home(rows: Rows, block_hash: Int) -> Int:
    # Mixed again: engines' hashes may be anything, even counters.
    return fold_multiply(block_hash ^ _MIX_HASH, _MIX_WORD) & np.uint64(len(rows) - 1)


@inlined
def _find(rows: Rows, block_hash: Int) -> Int:
    last = np.uint64(len(rows) - 1)
    row = _home(rows, block_hash)
    while rows[row, 1] != _ZERO and rows[row, 0] != block_hash:
        row = (row + _ONE) & last
    return row


@inlined
def _erase(rows: Rows, row: Int) -> None:
    last = np.uint64(len(rows) - 1)
    hole, probe = row, (row + _ONE) & last
    while rows[probe, 1] != _ZERO:
        home = _home(rows, rows[probe, 0])
        if ((probe - home) & last) >= ((probe - hole) & last):
            for column in range(3):
                rows[hole, column] = rows[probe, column]
            hole = probe
        probe = (probe + _ONE) & last
    for column in range(3):
        rows[hole, column] = _ZERO


@inlined
def _groups(packed: Int, tier: Int) -> Int:
    return (packed >> (np.uint64(tier) * _GROUP_BITS)) & _MASK


@inlined
def _with_groups(packed: Int, tier: Int, groups: Int) -> Int:
    shift = np.uint64(tier) * _GROUP_BITS
    return (packed & ~(_MASK << shift)) | (groups << shift)


@inlined
def _complete(groups: Int, required: Int) -> Int:
    return required != _ZERO and (groups & required) == required


@inlined
def _prefetch_rows(rows: Rows, table: Rows, block_hash: Int, key: Int) -> None:
    prefetch(np.uint64(rows.ctypes.data) + _home(rows, block_hash) * np.uint64(24))
    prefetch(np.uint64(table.ctypes.data) + (key & np.uint64(len(table) - 1)) * np.uint64(8 * table.shape[1]))


@compiled
def key_of(rows: Rows, block_hash: Int) -> Int:
    """Our key for an engine's hash; 0 if it isn't held."""
    return rows[_find(rows, block_hash), 1]


@compiled
def copy_holdings(old: Rows, new: Rows) -> Int:
    """Fills empty rows from others, leaving out what no group holds; how many were copied."""
    copied = 0
    for row in range(len(old)):
        if old[row, 1] != _ZERO and old[row, 2] != _ZERO:
            new[_find(new, old[row, 0])] = old[row]
            copied += 1
    return copied


@inlined
def _supersede(rows: Rows, kept: Int, tier: Int, required: Int) -> Int:
    """Takes the tier from the other hash with the key of `kept`; 1 if that one is gone. A scan, but only when one name has two contents."""
    key, block_hash = rows[kept, 1], rows[kept, 0]
    for row in range(len(rows)):
        if rows[row, 1] == key and rows[row, 0] != block_hash and _complete(_groups(rows[row, 2], tier), required):
            rows[row, 2] = _with_groups(rows[row, 2], tier, _ZERO)
            if rows[row, 2] == _ZERO:
                _erase(rows, row)
                return 1
            return 0
    return 0


@compiled
def store(
    rows: Rows, table: Rows, used: Counts, hashes: Rows, keys: Rows, place: Rows, required: Rows, tier: Int, group: Int,
    room: Int, counts: Counts,
) -> None:
    """Notes that a group holds blocks: `hashes` [n] with our `keys` [n]; a key of 0 takes the one that is known, else counts as UNKNOWN.

    `place` [4]: columns of the slot's word in the index for each tier, then its bit. `required` [3]: groups by tier.
    At most `room` rows are added, for which both tables must have space; blocks beyond are REFUSED.
    """
    bit = place[3]
    for index in range(len(hashes)):
        if index + _AHEAD < len(hashes):
            _prefetch_rows(rows, table, hashes[index + _AHEAD], keys[index + _AHEAD])
        row = _find(rows, hashes[index])
        key = keys[index] if keys[index] != _ZERO else rows[row, 1]
        if key == _ZERO:
            counts[UNKNOWN] += 1
            continue
        if rows[row, 1] == _ZERO:
            if counts[ADDED] >= room:
                counts[REFUSED] += 1
                continue
            counts[ADDED] += 1
            rows[row, 0] = hashes[index]
        elif rows[row, 1] != key:
            _withdraw(rows, row, table, used, place, required)
            rows[row, 2] = _ZERO
        rows[row, 1] = key
        before = _groups(rows[row, 2], tier)
        after = before | group
        if after == before:
            continue
        counts[STORED] += 1
        rows[row, 2] = _with_groups(rows[row, 2], tier, after)
        if _complete(after, required[tier]) and not _complete(before, required[tier]) and not set_bit(table, used, key, place[tier], bit):
            counts[ADDED] -= _supersede(rows, row, tier, required[tier])


@inlined
def _withdraw(rows: Rows, row: Int, table: Rows, used: Counts, place: Rows, required: Rows) -> None:
    """Clears the slot's bits of one held block."""
    for tier in range(3):
        if _complete(_groups(rows[row, 2], tier), required[tier]):
            clear_bit(table, used, rows[row, 1], place[tier], place[3])


@compiled
def remove(
    rows: Rows, table: Rows, used: Counts, hashes: Rows, place: Rows, required: Rows, tier: Int, groups: Int,
    unknown: NDArray[np.bool_], counts: Counts,
) -> None:
    """Notes that `groups` no longer hold blocks; `unknown` [n] is set for those that they didn't."""
    for index in range(len(hashes)):
        row = _find(rows, hashes[index])
        before = _groups(rows[row, 2], tier)
        if rows[row, 1] == _ZERO or (before & groups) == _ZERO:
            unknown[index] = True
            counts[UNKNOWN] += 1
            continue
        counts[REMOVED] += 1
        after = before & ~groups
        if _complete(before, required[tier]) and not _complete(after, required[tier]):
            clear_bit(table, used, rows[row, 1], place[tier], place[3])
        rows[row, 2] = _with_groups(rows[row, 2], tier, after)
        if rows[row, 2] == _ZERO:
            _erase(rows, row)
            counts[ADDED] -= 1


@compiled
def require(rows: Rows, begin: Int, end: Int, table: Rows, used: Counts, place: Rows, tier: Int, old: Int, new: Int) -> None:
    """Brings rows begin..end in line with other required groups of a tier (0: the tier is dropped); groups not required are forgotten.

    Leaves rows that no group holds; `copy_holdings` leaves them out. The index must have room for as many rows.
    """
    bit = place[3]
    for row in range(begin, end):
        if rows[row, 1] == _ZERO:
            continue
        groups = _groups(rows[row, 2], tier)
        was, now = _complete(groups, old), _complete(groups, new)
        kept = groups & new
        if was and not now:
            clear_bit(table, used, rows[row, 1], place[tier], bit)
        elif now and not was and not set_bit(table, used, rows[row, 1], place[tier], bit):
            kept = _ZERO  # another hash has the key already
        rows[row, 2] = _with_groups(rows[row, 2], tier, kept)


@compiled
def faults(rows: Rows, table: Rows, place: Rows, required: Rows, held: Counts) -> Int:
    """Rows that contradict the index or can't be found; adds the blocks that count by tier to `held` [3]."""
    wrong = 0
    for row in range(len(rows)):
        if rows[row, 1] == _ZERO:
            continue
        wrong += _find(rows, rows[row, 0]) != row or rows[row, 2] == _ZERO
        for tier in range(3):
            complete = _complete(_groups(rows[row, 2], tier), required[tier])
            held[tier] += complete
            if complete and not has_bit(table, rows[row, 1], place[tier], place[3]):
                wrong += 1
    return wrong
