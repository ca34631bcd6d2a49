# SPDX-License-Identifier: Apache-2.0
"""What one slot (a worker's dp rank) holds: its engine's block hashes, each with our key and the groups that have it. Compiled.

The table is one of `places`; its rows are uint64 [n + 1, 3]: the engine's hash, our key (0: a free row), and three masks of
16 KV-cache groups, one per tier. A block counts as held in a tier once every group that is required has it, and only then
has the slot's bit in the index. Masks rather than counts, because engines repeat themselves: a store that comes twice must
change nothing. At most one of a slot's hashes with the same key counts in a tier, the last (an adapter's name given to
other weights).

Compiled functions get the addresses of two tables' states, the slot's own and the index's, and the slot's `facts`.
"""

import numpy as np
from numpy.typing import NDArray

from tandem_protocol.blocks import Keys, chain_into
from tandem_protocol.compiled import Int, compiled, fold_multiply, inlined, words_at
from tandem_router.index_table import clear_bit, has_bit, row_for, set_bit
from tandem_router.places import (
    TOP,
    Places,
    Rows,
    State,
    give_back,
    likely_row,
    places_of,
    prefetch_place,
    prefetch_row,
    row_at,
    row_of,
    rows_of,
    rows_of_width,
    seek,
    spare,
    state_at,
    tag_of,
    take,
)

GROUPS = 16
"""Groups per slot that can be told apart."""
ALL_GROUPS = (1 << GROUPS) - 1
COLUMNS = 3

PLACE, BIT, REQUIRED, TABLE = 0, 3, 4, 7
"""Of `facts`, uint64 [8]: the columns of the slot's word in the index, by tier; its bit there; the groups required, by tier;
the address of the state of the slot's table."""
FACTS = 8

_FAR = 24
_MIDDLE = 16
_NEAR = 8
"""How many blocks ahead of the current one a writer asks for places, for rows, and for what those lead to."""
_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_GROUP_BITS = np.uint64(GROUPS)
_MASK = np.uint64(ALL_GROUPS)
_MIX_HASH = np.uint64(0xA0761D6478BD642F)
_MIX_WORD = np.uint64(0xE7037ED1A0B428DB)


@inlined
def _tag(block_hash: Int) -> Int:
    # Mixed again: engines' hashes may be anything, even counters.
    return tag_of(fold_multiply(block_hash ^ _MIX_HASH, _MIX_WORD))


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


@compiled
def copy_holdings(rows: Rows, table: Int) -> Int:
    """Fills an empty table with rows [n, 3] of another, leaving out what no group holds; how many were copied."""
    state = state_at(table)
    places, new = places_of(state), rows_of(state)
    copied = 0
    for row in range(len(rows)):
        if rows[row, 1] != _ZERO and rows[row, 2] != _ZERO:
            tag = _tag(rows[row, 0])
            place = seek(places, new, tag, rows[row, 0])
            if places[place] == _ZERO:
                taken = take(places, new, state, place, tag, rows[row, 0])
                new[taken, 1], new[taken, 2] = rows[row, 1], rows[row, 2]
                copied += 1
    return copied


@inlined
def _supersede(places: Places, rows: Rows, state: State, kept: Int, tier: Int, required: Int) -> Int:
    """Takes the tier from the other hash with the key of `kept`; 1 if that one is gone. A scan, but only when one name has two contents."""
    key, block_hash = rows[kept, 1], rows[kept, 0]
    for row in range(np.int64(state[TOP])):
        if rows[row, 1] == key and rows[row, 0] != block_hash and _complete(_groups(rows[row, 2], tier), required):
            rows[row, 2] = _with_groups(rows[row, 2], tier, _ZERO)
            if rows[row, 2] == _ZERO:
                give_back(places, rows, state, seek(places, rows, _tag(rows[row, 0]), rows[row, 0]))
                return 1
            return 0
    return 0


@compiled
def store(
    table: Int, member: Int, parent: Int, parent_is_key: Int, hashes: Rows, tokens: NDArray[np.uint32], size: Int, extra: Keys,
    tier: Int, group: Int, room: Int,
) -> tuple[Int, Int, Int, Int, Int]:
    """Notes that a group holds blocks `hashes` [n], with their `tokens` [n * size], or of any length if `size` is 0: hashes alone.

    `parent`: our key of the block before (`parent_is_key`), or the engine's hash. `extra` as in `blocks`. `group`: its bit.
    At most `room` rows are added, for which both tables must have space. Answers the last block's key (0 if the
    parent isn't known; nothing is changed then), masks changed, rows more, hashes that are unknown, and blocks beyond the room.
    """
    facts = words_at(member, FACTS)
    own_state = state_at(facts[TABLE])
    own_places, own = places_of(own_state), rows_of_width(own_state, COLUMNS)
    keys = np.zeros(len(hashes), np.uint64)
    if size > 0:
        key = parent if parent_is_key else own[row_of(own_places, own, _tag(parent), parent), 1]
        if key == _ZERO:
            return key, 0, 0, 0, 0
        chain_into(keys, key, tokens, size, extra)
    stored, added, unknown, refused = _store_keys(table, facts, own_places, own, own_state, hashes, keys, tier, group, room)
    return (keys[len(keys) - 1] if size > 0 and len(keys) > 0 else parent), stored, added, unknown, refused


@inlined
def _store_keys(
    table: Int, facts: Rows, own_places: Places, own: Rows, own_state: State, hashes: Rows, keys: Keys, tier: Int, group: Int, room: Int,
) -> tuple[Int, Int, Int, Int]:
    """`store`, with our `keys` [n]; a key of 0 takes the one that is known."""
    state = state_at(table)
    places, rows = places_of(state), rows_of(state)
    guess, required, column, bit = spare(rows), facts[REQUIRED + tier], np.int64(facts[PLACE + tier]), facts[BIT]
    stored, added, unknown, refused = 0, 0, 0, 0
    for index in range(len(hashes)):
        if index + _NEAR < len(hashes):
            prefetch_place(own_places, _tag(hashes[index + _NEAR]))
            prefetch_place(places, tag_of(keys[index + _NEAR]))
        tag = _tag(hashes[index])
        place = seek(own_places, own, tag, hashes[index])
        row = row_at(own_places, own, place)
        key = keys[index] if keys[index] != _ZERO else own[row, 1]
        if key == _ZERO:
            unknown += 1
            continue
        if own[row, 1] == _ZERO:
            if added >= room:
                refused += 1
                continue
            added += 1
            row = take(own_places, own, own_state, place, tag, hashes[index])
        elif own[row, 1] != key:
            _withdraw(own, row, places, rows, state, facts)
            own[row, 2] = _ZERO
        own[row, 1] = key
        before = _groups(own[row, 2], tier)
        after = before | group
        if after == before:
            continue
        stored += 1
        own[row, 2] = _with_groups(own[row, 2], tier, after)
        if _complete(after, required) and not _complete(before, required):
            held = row_for(places, rows, state, guess, key)
            guess = held + _ONE
            if not set_bit(rows, held, column, bit):
                added -= _supersede(own_places, own, own_state, row, tier, required)
    return stored, added, unknown, refused


@inlined
def _withdraw(own: Rows, row: Int, places: Places, rows: Rows, state: State, facts: Rows) -> None:
    """Clears the slot's bits of one held block."""
    for tier in range(3):
        if _complete(_groups(own[row, 2], tier), facts[REQUIRED + tier]):
            clear_bit(places, rows, state, own[row, 1], np.int64(facts[PLACE + tier]), facts[BIT])


@inlined
def _look_ahead(own_places: Places, own: Rows, places: Places, hashes: Rows, index: Int) -> None:
    """Asks for what the removal of later blocks will read."""
    if index + _FAR < len(hashes):
        prefetch_place(own_places, _tag(hashes[index + _FAR]))
    if index + _MIDDLE < len(hashes):
        prefetch_row(own_places, own, _tag(hashes[index + _MIDDLE]))
    if index + _NEAR < len(hashes):
        prefetch_place(places, tag_of(own[likely_row(own_places, own, _tag(hashes[index + _NEAR])), 1]))


@compiled
def remove(
    table: Int, member: Int, hashes: Rows, tier: Int, groups: Int, unknown: NDArray[np.bool_],
) -> tuple[Int, Int]:
    """Notes that `groups` no longer hold blocks; `unknown` [n] is set for those that they didn't. Answers masks changed and rows less."""
    facts, state = words_at(member, FACTS), state_at(table)
    places, rows = places_of(state), rows_of(state)
    own_state = state_at(facts[TABLE])
    own_places, own = places_of(own_state), rows_of_width(own_state, COLUMNS)
    removed, gone, required = 0, 0, facts[REQUIRED + tier]
    for index in range(len(hashes)):
        _look_ahead(own_places, own, places, hashes, index)
        place = seek(own_places, own, _tag(hashes[index]), hashes[index])
        row = row_at(own_places, own, place)
        before = _groups(own[row, 2], tier)
        if (before & groups) == _ZERO:
            unknown[index] = True
            continue
        removed += 1
        after = before & ~groups
        if _complete(before, required) and not _complete(after, required):
            clear_bit(places, rows, state, own[row, 1], np.int64(facts[PLACE + tier]), facts[BIT])
        own[row, 2] = _with_groups(own[row, 2], tier, after)
        if own[row, 2] == _ZERO:
            give_back(own_places, own, own_state, place)
            gone += 1
    return removed, gone


@compiled
def require(table: Int, member: Int, begin: Int, end: Int, tier: Int, new: Int) -> None:
    """Brings rows begin..end in line with other required groups of a tier (0: the tier is dropped); groups not required are forgotten.

    Leaves rows that no group holds; `copy_holdings` leaves them out. The index must have room for as many rows.
    """
    facts, state = words_at(member, FACTS), state_at(table)
    places, rows = places_of(state), rows_of(state)
    own = rows_of_width(state_at(facts[TABLE]), COLUMNS)
    column, bit, guess = np.int64(facts[PLACE + tier]), facts[BIT], spare(rows)
    for row in range(begin, end):
        if own[row, 1] == _ZERO:
            continue
        groups = _groups(own[row, 2], tier)
        was, now = _complete(groups, facts[REQUIRED + tier]), _complete(groups, new)
        kept = groups & new
        if was and not now:
            clear_bit(places, rows, state, own[row, 1], column, bit)
        elif now and not was:
            held = row_for(places, rows, state, guess, own[row, 1])
            guess = held + _ONE
            if not set_bit(rows, held, column, bit):
                kept = _ZERO  # another hash has the key already
        own[row, 2] = _with_groups(own[row, 2], tier, kept)


@compiled
def faults(table: Int, member: Int, held: NDArray[np.int64]) -> Int:
    """Rows that contradict the index or can't be found; adds the blocks that count by tier to `held` [3]."""
    facts, state = words_at(member, FACTS), state_at(table)
    places, rows = places_of(state), rows_of(state)
    own_state = state_at(facts[TABLE])
    own_places, own = places_of(own_state), rows_of_width(own_state, COLUMNS)
    wrong = 0
    for row in range(np.int64(own_state[TOP])):
        if own[row, 1] == _ZERO:
            continue
        lost = row_of(own_places, own, _tag(own[row, 0]), own[row, 0]) != np.uint64(row)
        wrong += lost or own[row, 2] == _ZERO
        for tier in range(3):
            complete = _complete(_groups(own[row, 2], tier), facts[REQUIRED + tier])
            held[tier] += complete
            if complete and not has_bit(places, rows, own[row, 1], np.int64(facts[PLACE + tier]), facts[BIT]):
                wrong += 1
    return wrong
