# SPDX-License-Identifier: Apache-2.0
"""Who holds a block: an open-addressing table from block key to bitmasks of slots, one mask per tier. Compiled.

`rows` is uint64 [capacity, 1 + planes * words], a power of two of rows: the key (0: empty), then `words` words of slot
bits for each of `planes` tiers. All of a block lies side by side, so that a lookup costs one cache line. Collisions go to
the next row; an erased row is filled from those after it, so that there are no tombstones. `used` is int64 [1], rows in use.
"""

import numpy as np
from numpy.typing import NDArray

from tandem_protocol.compiled import Int, compiled, inlined, prefetch, trailing_zeros
from tandem_router.table_memory import zeroed

Rows = NDArray[np.uint64]

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_AHEAD = 48
"""How many blocks ahead of the current one a lookup asks for the row: about a memory latency."""


def empty_rows(capacity: int, words: int, planes: int) -> Rows:
    """Rows of an empty table; `capacity` is a power of two."""
    return zeroed(capacity, 1 + planes * words)


@inlined
def find(rows: Rows, key: Int) -> Int:
    """Row of a key, or the row where it belongs (whose key is 0)."""
    last = np.uint64(len(rows) - 1)
    row = key & last
    while rows[row, 0] != key and rows[row, 0] != _ZERO:
        row = (row + _ONE) & last
    return row


@inlined
def has_bit(rows: Rows, key: Int, column: Int, bit: Int) -> Int:
    """Whether a slot's bit is set."""
    return (rows[find(rows, key), column] & bit) != _ZERO


@inlined
def set_bit(rows: Rows, used: NDArray[np.int64], key: Int, column: Int, bit: Int) -> Int:
    """Sets a slot's bit, with a row for the key if need be; whether it was clear."""
    row = find(rows, key)
    if rows[row, 0] == _ZERO:
        rows[row, 0] = key
        used[0] += 1
    was_clear = (rows[row, column] & bit) == _ZERO
    rows[row, column] |= bit
    return was_clear


@inlined
def clear_bit(rows: Rows, used: NDArray[np.int64], key: Int, column: Int, bit: Int) -> Int:
    """Clears a slot's bit, and the row if nobody is left; whether it was set."""
    row = find(rows, key)
    if rows[row, 0] == _ZERO or (rows[row, column] & bit) == _ZERO:
        return False
    rows[row, column] &= ~bit
    for other in range(1, rows.shape[1]):
        if rows[row, other] != _ZERO:
            return True
    erase(rows, row)
    used[0] -= 1
    return True


@inlined
def erase(rows: Rows, row: Int) -> None:
    """Empties a row and moves later rows of the same run back over it."""
    last = np.uint64(len(rows) - 1)
    hole, probe = row, (row + _ONE) & last
    while rows[probe, 0] != _ZERO:
        home = rows[probe, 0] & last
        if ((probe - home) & last) >= ((probe - hole) & last):
            for column in range(rows.shape[1]):
                rows[hole, column] = rows[probe, column]
            hole = probe
        probe = (probe + _ONE) & last
    for column in range(rows.shape[1]):
        rows[hole, column] = _ZERO


@compiled
def copy_rows(old: Rows, old_words: Int, new: Rows, new_words: Int) -> None:
    """Fills an empty table from another with as many or fewer words and planes."""
    planes = (old.shape[1] - 1) // old_words
    for row in range(len(old)):
        if old[row, 0] != _ZERO:
            target = find(new, old[row, 0])
            new[target, 0] = old[row, 0]
            for plane in range(planes):
                for word in range(old_words):
                    new[target, 1 + plane * new_words + word] = old[row, 1 + plane * old_words + word]


@compiled
def count_bits(rows: Rows, words: Int, counts: NDArray[np.int64]) -> Int:
    """Adds up the bits of each slot, into [planes, slots]; answers rows in use, or -1 if a row can't be found or is nobody's."""
    used = 0
    for row in range(len(rows)):
        if rows[row, 0] == _ZERO:
            continue
        used += 1
        held = _ZERO
        for column in range(rows.shape[1] - 1):
            mask = rows[row, 1 + column]
            held |= mask
            while mask != _ZERO:
                counts[column // words, np.uint64((column % words) * 64) + trailing_zeros(mask)] += 1
                mask &= mask - _ONE
        if held == _ZERO or find(rows, rows[row, 0]) != row:
            return -1
    return used


@inlined
def _advance(rows: Rows, row: Int, words: Int, word: Int, state: Rows) -> None:
    """Sorts the slots of a word that are still on their prefix by the best tier that holds this block; the others fall out."""
    alive = _ZERO
    for plane in range(len(state)):
        alive |= state[plane, word]
    for plane in range(len(state)):
        state[plane, word] = rows[row, 1 + plane * words + word] & alive
        alive &= ~state[plane, word]


@inlined
def _turn(rows: Rows, row: Int, words: Int, index: Int, state: Rows, since: NDArray[np.int32], blocks: NDArray[np.int32]) -> Int:
    """Books and moves all slots whose best tier is another from block `index` on; whether any slot is left."""
    left = _ZERO
    before = np.empty(len(state), np.uint64)
    for word in range(words):
        before[:] = state[:, word]
        _advance(rows, row, words, word, state)
        changed = _ZERO
        for plane in range(len(state)):
            changed |= before[plane] ^ state[plane, word]
            left |= state[plane, word]
        _book(changed, before, word, index, since, blocks)
    return left != _ZERO


@inlined
def _book(changed: Int, tiers: Rows, word: Int, index: Int, since: NDArray[np.int32], blocks: NDArray[np.int32]) -> None:
    """Ends at `index` the run of each slot in `changed`, in the tier that it was in by `tiers` [planes]."""
    while changed != _ZERO:
        slot = np.uint64(word * 64) + trailing_zeros(changed)
        bit = changed & (~changed + _ONE)
        for plane in range(len(tiers)):
            if tiers[plane] & bit != _ZERO:
                blocks[plane, slot] += index - since[slot]
        since[slot] = index
        changed ^= bit


@inlined
def _stays(rows: Rows, row: Int, words: Int, state: Rows) -> Int:
    """Whether every slot that is on its prefix has this block in the same best tier as the one before."""
    for word in range(words):
        alive = _ZERO
        for plane in range(len(state)):
            alive |= state[plane, word]
        for plane in range(len(state)):
            mask = rows[row, 1 + plane * words + word] & alive
            if mask != state[plane, word]:
                return False
            alive &= ~mask
    return True


@inlined
def _run(rows: Rows, keys: NDArray[np.uint64], begin: Int, words: Int, state: Rows) -> Int:
    """First block from `begin` on at which anything changes for any slot; len(keys) if nothing does."""
    last, base, stride = np.uint64(len(rows) - 1), np.uint64(rows.ctypes.data), np.uint64(8 * rows.shape[1])
    for ahead in range(begin, min(begin + _AHEAD, len(keys))):
        prefetch(base + (keys[ahead] & last) * stride)
    plain, mask = len(state) == 1 and words == 1, state[0, 0]
    for index in range(begin, len(keys)):
        if index + _AHEAD < len(keys):
            prefetch(base + (keys[index + _AHEAD] & last) * stride)
        row = find(rows, keys[index])
        if plain:
            if rows[row, 1] & mask != mask:
                return index
        elif not _stays(rows, row, words, state):
            return index
    return len(keys)


@compiled
def match_prefix(rows: Rows, words: Int, keys: NDArray[np.uint64], blocks: NDArray[np.int32]) -> None:
    """Adds each slot's prefix by best tier to `blocks`, int32 [>= planes, 64 * words]; stops when no slot is left.

    A slot is only touched where its best tier changes or its prefix ends: a thousand blocks that a worker holds on the
    GPU cost a thousand lookups and one addition.
    """
    planes = (rows.shape[1] - 1) // words
    state = np.zeros((planes, words), np.uint64)
    state[0] = ~_ZERO  # before the first block everybody is on its prefix
    since = np.zeros(64 * words, np.int32)
    index, left = 0, len(keys) > 0
    while left:
        left = _turn(rows, find(rows, keys[index]), words, index, state, since, blocks)
        index = _run(rows, keys, index + 1, words, state) if left else index
        if index == len(keys):
            left = False
            for word in range(words):
                everybody = _ZERO
                for plane in range(planes):
                    everybody |= state[plane, word]
                _book(everybody, np.ascontiguousarray(state[:, word]), word, index, since, blocks)
