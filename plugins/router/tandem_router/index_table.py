# SPDX-License-Identifier: Apache-2.0
"""Who holds a block: a table from block key to bitmasks of slots, one mask per tier. Compiled.

The table is one of `places`; its rows are uint64 [n + 1, 1 + planes * words]: the key, then `words` words of slot bits for
each of `planes` tiers. Keys are hashes, so that they are their own tags. All of a block lies side by side, and the blocks
of a sequence behind one another: a lookup mostly reads on where it is.
"""

import numpy as np
from numpy.typing import NDArray

from tandem_protocol.compiled import Int, compiled, inlined, prefetch, trailing_zeros, words_at
from tandem_router.places import (
    TOP,
    WORDS,
    Places,
    Rows,
    State,
    Table,
    give_back,
    places_of,
    prefetch_place,
    prefetch_row,
    row_at,
    row_of,
    rows_of,
    seek,
    spare,
    state_at,
    tag_of,
    take,
)
from tandem_router.table_memory import zeroed

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_FAR = 24
_NEAR = 12
"""How many blocks ahead of one that isn't behind its predecessor a lookup asks for places and for rows: about a memory latency each."""
_STRIDE = 8
"""Blocks that are compared without a branch: their rows are two cache lines."""
_LEAD = 64
"""How many rows ahead of those that are compared the processor is asked for: it doesn't look beyond a page by itself."""


def empty(blocks: int, words: int, planes: int) -> Table:
    """A table for at least so many blocks."""
    table = Table.empty(blocks, 1 + planes * words)
    table.state[WORDS] = words
    return table


def reshaped(table: Table, words: int, planes: int) -> Table:
    """The same blocks with more words and planes. Nobody may write to `table` any more."""
    count, columns = len(table.rows), 1 + planes * words
    rows = zeroed(count * columns).reshape(count, columns)
    _copy_rows(table.rows[: table.top], int(table.state[WORDS]), rows, words)
    new = table.with_rows(rows)
    new.state[WORDS] = words
    return new


@inlined
def has_bit(places: Places, rows: Rows, key: Int, column: Int, bit: Int) -> Int:
    """Whether a slot's bit is set."""
    return (rows[row_of(places, rows, tag_of(key), key), column] & bit) != _ZERO


@inlined
def row_for(places: Places, rows: Rows, state: State, guess: Int, key: Int) -> Int:
    """The row of a key, a new one if need be; `guess`: where it may be, at most the spare row."""
    if rows[guess, 0] == key:
        return guess
    place = seek(places, rows, tag_of(key), key)
    if places[place] == _ZERO:
        return take(places, rows, state, place, tag_of(key), key)
    return row_at(places, rows, place)


@inlined
def set_bit(rows: Rows, row: Int, column: Int, bit: Int) -> Int:
    """Sets a slot's bit; whether it was clear."""
    mask = rows[row, column]
    rows[row, column] = mask | bit
    return (mask & bit) == _ZERO


@inlined
def clear_bit(places: Places, rows: Rows, state: State, key: Int, column: Int, bit: Int) -> None:
    """Clears a slot's bit, and gives the row back if nobody is left."""
    place = seek(places, rows, tag_of(key), key)
    row = row_at(places, rows, place)
    if (rows[row, column] & bit) == _ZERO:
        return
    rows[row, column] &= ~bit
    for other in range(1, rows.shape[1]):
        if rows[row, other] != _ZERO:
            return
    give_back(places, rows, state, place)


@compiled
def _copy_rows(old: Rows, old_words: Int, new: Rows, new_words: Int) -> None:
    planes = (old.shape[1] - 1) // old_words
    for row in range(len(old)):
        new[row, 0] = old[row, 0]
        if old[row, 0] == _ZERO:
            new[row, new.shape[1] - 1] = old[row, old.shape[1] - 1]  # the next free row
            continue
        for plane in range(planes):
            for word in range(old_words):
                new[row, 1 + plane * new_words + word] = old[row, 1 + plane * old_words + word]


@compiled
def count_bits(table: Int, counts: NDArray[np.int64]) -> Int:
    """Adds up the bits of each slot, into [tiers, slots]; answers rows in use, or -1 if a row can't be found or is nobody's."""
    state = state_at(table)
    places, rows, words, used = places_of(state), rows_of(state), np.int64(state[WORDS]), 0
    for row in range(np.int64(state[TOP])):
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
        if held == _ZERO or row_of(places, rows, tag_of(rows[row, 0]), rows[row, 0]) != np.uint64(row):
            return -1
    return used


@inlined
def _next_row(places: Places, rows: Rows, keys: NDArray[np.uint64], index: Int, guess: Int) -> Int:
    """The row of block `index`; the spare one if nobody holds it."""
    if rows[guess, 0] == keys[index]:
        return guess
    if index + _FAR < len(keys):
        prefetch_place(places, tag_of(keys[index + _FAR]))
    if index + _NEAR < len(keys):
        prefetch_row(places, rows, tag_of(keys[index + _NEAR]))
    return row_of(places, rows, tag_of(keys[index]), keys[index])


@inlined
def _same(rows: Rows, row: Int, keys: NDArray[np.uint64], index: Int, mask: Int) -> Int:
    """How many blocks from `index` on are those of the rows from `row` on, and are held by all of `mask`. One tier, one word."""
    end = min(np.int64(len(keys)) - np.int64(index), np.int64(len(rows)) - np.int64(row))
    count, line = 0, np.uint64(rows.ctypes.data) + np.uint64(16) * (row + np.uint64(_LEAD))
    while count + _STRIDE <= end:
        wrong = _ZERO
        prefetch(line)
        prefetch(line + np.uint64(64))
        line += np.uint64(16 * _STRIDE)
        for step in range(count, count + _STRIDE):
            wrong |= (rows[np.int64(row) + step, 0] ^ keys[index + step]) | (~rows[np.int64(row) + step, 1] & mask)
        if wrong != _ZERO:
            break
        count += _STRIDE
    while count < end and rows[np.int64(row) + count, 0] == keys[index + count] and (~rows[np.int64(row) + count, 1] & mask) == _ZERO:
        count += 1
    return count


@inlined
def _end(slots: Int, index: Int, blocks: NDArray[np.int32]) -> None:
    """Ends the prefix of each slot of a mask at `index`. One tier, one word."""
    while slots != _ZERO:
        blocks[0, trailing_zeros(slots)] = index
        slots &= slots - _ONE


@compiled
def _match_plain(state: State, keys: NDArray[np.uint64], blocks: NDArray[np.int32]) -> None:
    """`match_prefix` with one tier and one word of slots."""
    places, rows = places_of(state), rows_of(state)
    row = _next_row(places, rows, keys, 0, spare(rows))
    mask, index = rows[row, 1], 1
    while mask != _ZERO:
        if index < len(keys) and rows[row + _ONE, 0] == keys[index]:  # else this block lies elsewhere: mind the others' cache lines
            same = _same(rows, row + _ONE, keys, index, mask)
            index += same
            row += np.uint64(same)
        if index == len(keys):
            _end(mask, index, blocks)
            return
        row = _next_row(places, rows, keys, index, row + _ONE)
        _end(mask & ~rows[row, 1], index, blocks)
        mask &= rows[row, 1]
        index += 1


@inlined
def _advance(rows: Rows, row: Int, words: int, word: Int, runs: Rows) -> None:
    """Sorts the slots of a word that are still on their prefix by the best tier that holds this block; the others fall out."""
    alive = _ZERO
    for plane in range(len(runs)):
        alive |= runs[plane, word]
    for plane in range(len(runs)):
        runs[plane, word] = rows[row, 1 + plane * words + word] & alive
        alive &= ~runs[plane, word]


@inlined
def _turn(rows: Rows, row: Int, words: Int, index: Int, runs: Rows, since: NDArray[np.int32], blocks: NDArray[np.int32]) -> Int:
    """Books and moves all slots whose best tier is another from block `index` on; whether any slot is left."""
    left = _ZERO
    before = np.empty(len(runs), np.uint64)
    for word in range(words):
        for plane in range(len(runs)):
            before[plane] = runs[plane, word]
        _advance(rows, row, words, word, runs)
        changed = _ZERO
        for plane in range(len(runs)):
            changed |= before[plane] ^ runs[plane, word]
            left |= runs[plane, word]
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
def _stays(rows: Rows, row: Int, words: Int, runs: Rows) -> Int:
    """Whether every slot that is on its prefix has this block in the same best tier as the one before."""
    for word in range(words):
        alive = _ZERO
        for plane in range(len(runs)):
            alive |= runs[plane, word]
        for plane in range(len(runs)):
            mask = rows[row, 1 + plane * words + word] & alive
            if mask != runs[plane, word]:
                return False
            alive &= ~mask
    return True


@inlined
def _first(rows: Rows, row: Int, words: Int, runs: Rows, since: NDArray[np.int32]) -> Int:
    """Begins the runs of all slots that hold the first block; whether there are any."""
    left = _ZERO
    for word in range(words):
        held = _ZERO
        for plane in range(len(runs)):
            runs[plane, word] = rows[row, 1 + plane * words + word] & ~held
            held |= runs[plane, word]
        left |= held
    return left != _ZERO


@compiled
def _match_tiers(state: State, keys: NDArray[np.uint64], blocks: NDArray[np.int32]) -> None:
    """`match_prefix` with any number of tiers and words."""
    places, rows, words = places_of(state), rows_of(state), np.int64(state[WORDS])
    runs = np.zeros(((rows.shape[1] - 1) // words, words), np.uint64)
    since = np.zeros(64 * words, np.int32)
    row, index = _next_row(places, rows, keys, 0, spare(rows)), 1
    left = _first(rows, row, words, runs, since)
    while left and index < len(keys):
        row = _next_row(places, rows, keys, index, row + _ONE)
        if not _stays(rows, row, words, runs):
            left = _turn(rows, row, words, index, runs, since, blocks)
        index += 1
    _turn(rows, spare(rows), words, index, runs, since, blocks)


@compiled
def match_prefix(table: Int, keys: NDArray[np.uint64], blocks: NDArray[np.int32]) -> None:
    """Adds each slot's prefix by best tier to `blocks`, int32 [tiers, slots], of zeros; stops when no slot is left.

    A slot is only touched where its best tier changes or its prefix ends: a thousand blocks that a worker holds on the
    GPU cost a thousand comparisons and one addition.
    """
    state, wanted = state_at(table), words_at(keys.ctypes.data, len(keys))  # one type of array, read-only or not
    if len(keys) == 0:
        return
    if rows_of(state).shape[1] == 2:
        _match_plain(state, wanted, blocks)
    else:
        _match_tiers(state, wanted, blocks)
