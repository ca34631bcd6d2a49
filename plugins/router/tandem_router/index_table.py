# SPDX-License-Identifier: Apache-2.0
"""Who holds a block: an open-addressing table from block key to bitmasks of slots, one mask per tier. Compiled.

`rows` is uint64 [capacity, 1 + planes * words], a power of two of rows: the key (0: empty), then `words` words of slot
bits for each of `planes` tiers. All of a block lies side by side, so that a lookup costs one cache line. Collisions go to
the next row; an erased row is filled from those after it, so that there are no tombstones. `used` is int64 [1], rows in use.
"""

import numpy as np
from numpy.typing import NDArray

from tandem_protocol.compiled import Int, compiled, inlined, prefetch, trailing_zeros

Rows = NDArray[np.uint64]

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_AHEAD = 24
"""How many blocks ahead of the current one a lookup asks for the row: about a memory latency."""


def empty_rows(capacity: int, words: int, planes: int) -> Rows:
    """Rows of an empty table; `capacity` is a power of two."""
    return np.zeros((capacity, 1 + planes * words), np.uint64)


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
def _change(changed: Int, word: Int, index: Int, state: Rows, since: NDArray[np.int32], blocks: NDArray[np.int32]) -> None:
    """Books the run that ends at `index` for each slot in `changed`, to the tier that it was in."""
    while changed != _ZERO:
        bit = changed & (~changed + _ONE)
        changed ^= bit
        slot = np.uint64(word * 64) + trailing_zeros(bit)
        for plane in range(len(state)):
            if state[plane, word] & bit:
                blocks[plane, slot] += index - since[slot]
        since[slot] = index


@inlined
def _step(rows: Rows, row: Int, words: Int, index: Int, state: Rows, since: NDArray[np.int32], blocks: NDArray[np.int32]) -> Int:
    """Moves all slots on over one block; whether any is left. `state` [planes, words]: who is still on its prefix, by best tier."""
    left = _ZERO
    for word in range(words):
        alive = _ZERO
        for plane in range(len(state)):
            alive |= state[plane, word]
        changed = _ZERO
        for plane in range(len(state)):
            mask = rows[row, 1 + plane * words + word] & alive
            changed |= mask ^ state[plane, word]
            alive &= ~mask
        changed |= alive
        if changed != _ZERO:
            _change(changed, word, index, state, since, blocks)
            _advance(rows, row, words, word, state)
        for plane in range(len(state)):
            left |= state[plane, word]
    return left != _ZERO


@inlined
def _advance(rows: Rows, row: Int, words: Int, word: Int, state: Rows) -> None:
    alive = _ZERO
    for plane in range(len(state)):
        alive |= state[plane, word]
    for plane in range(len(state)):
        state[plane, word] = rows[row, 1 + plane * words + word] & alive
        alive &= ~state[plane, word]


@compiled
def match_prefix(rows: Rows, words: Int, keys: NDArray[np.uint64], blocks: NDArray[np.int32]) -> None:
    """Adds each slot's prefix by best tier to `blocks`, int32 [>= planes, 64 * words]; stops when no slot is left.

    A slot is only touched where its best tier changes or its prefix ends: a thousand blocks that a worker holds on the
    GPU cost a thousand lookups and one addition.
    """
    planes = (rows.shape[1] - 1) // words
    state = np.zeros((planes, words), np.uint64)
    since = np.zeros(64 * words, np.int32)
    last, base, stride = np.uint64(len(rows) - 1), np.uint64(rows.ctypes.data), np.uint64(8 * rows.shape[1])
    index, more = 0, len(keys) > 0
    if more:
        row = find(rows, keys[0])
        for word in range(words):
            state[0, word] = ~_ZERO  # before the first block everybody is on its prefix; `_advance` sorts them by tier
            _advance(rows, row, words, word, state)
    for ahead in range(min(_AHEAD, len(keys))):
        prefetch(base + (keys[ahead] & last) * stride)
    while more:
        if index + _AHEAD < len(keys):
            prefetch(base + (keys[index + _AHEAD] & last) * stride)
        more = _step(rows, find(rows, keys[index]), words, index, state, since, blocks)
        index += 1
        if more and index == len(keys):
            more = False
            for word in range(words):
                everybody = _ZERO
                for plane in range(planes):
                    everybody |= state[plane, word]
                _change(everybody, word, index, state, since, blocks)
