# SPDX-License-Identifier: Apache-2.0
"""Holders' claims on the blocks of a table: what a store, a removal, a loss of everything changes. Compiled."""

import numpy as np
from numpy.typing import NDArray

from tandem_kvbm.consolidator.table import (
    CHILDREN,
    CONTENT,
    EXTRA,
    FLAGS,
    FREE,
    HAS_PARENT,
    HELD,
    LINKED,
    LORA,
    ROOTED,
    STAMP,
    WAITING,
    WAITS,
    Table,
    find,
    has_rooted_parent,
    release,
    root,
    take,
    wait_no_more,
)
from tandem_protocol.compiled import Int, compiled, inlined

# What became of a stored block.
ANNOUNCE, ALL, NEWLY, WAIT, REFUSED, BARE, LEARNED, LOOSE = (1 << bit for bit in range(8))
"""To publish in this unit; in all units that hold it; newly rooted; waits for its parent; no room; content not known; content new;
published before, but its parent is held no more, so that consumers know it by its hash alone."""
MOST_CLAIMS = 65535
_ZERO = np.uint64(0)


@inlined
def _claim(table: Table, slot: Int, place: Int, unit: Int, counting: Int) -> Int:
    """Counts a claim; whether the unit holds the block only now."""
    claims = table.counts[slot, place]
    if claims == 0 or (counting and claims < MOST_CLAIMS):
        table.counts[slot, place] = claims + 1
    if claims != 0:
        return False
    table.tally[slot, unit] += 1
    first = table.tally[slot, unit] == 1
    if first:
        table.facts[slot, HELD] += 1
    return first


@inlined
def _learn(table: Table, slot: Int, tokens: NDArray[np.uint32], start: Int, has_parent: Int, parent: Int, lora: Int) -> None:
    for at in range(table.tokens.shape[1]):
        table.tokens[slot, at] = tokens[start + at]
    table.parents[slot] = parent
    table.facts[slot, LORA] = lora
    table.facts[slot, FLAGS] |= CONTENT | (HAS_PARENT if has_parent else 0)


@inlined
def _settle(table: Table, slot: Int, first: Int) -> Int:
    """What is to be done about a block that has just been claimed."""
    flags = table.facts[slot, FLAGS]
    if flags & ROOTED:
        return (ANNOUNCE if has_rooted_parent(table, slot) else ANNOUNCE | LOOSE) if first else 0
    if not flags & CONTENT:
        return BARE
    if root(table, slot):
        return NEWLY | (ANNOUNCE if table.facts[slot, HELD] == 1 else ALL)
    if flags & WAITS:
        return 0
    table.facts[slot, FLAGS] |= WAITS
    table.sizes[WAITING] += 1
    return WAIT


@compiled
def store(
    table: Table, hashes: NDArray[np.uint64], tokens: NDArray[np.uint32], parents: NDArray[np.uint64], has_parents: NDArray[np.bool_],
    lora: Int, place: Int, unit: Int, counting: Int, slots: NDArray[np.int64], codes: NDArray[np.uint8],
) -> None:
    """One holder has more blocks. `tokens`: [n * B], or empty where they aren't known; `parents`, `has_parents`: [n].

    Answers `slots` [n] (-1: refused) and `codes` [n].
    """
    size = table.tokens.shape[1]
    for index in range(len(hashes)):
        slot = find(table, hashes[index])
        if slot < 0:
            if table.sizes[FREE] == 0:
                slots[index], codes[index] = -1, REFUSED
                continue
            slot = take(table, hashes[index])
        code = 0
        if len(tokens) > 0 and not table.facts[slot, FLAGS] & CONTENT:
            _learn(table, slot, tokens, index * size, has_parents[index], parents[index], lora)
            code = LEARNED
        first = _claim(table, slot, place, unit, counting)
        slots[index], codes[index] = slot, code | _settle(table, slot, first)


@inlined
def _disclaim(table: Table, slot: Int, place: Int, unit: Int, everything: Int) -> Int:
    """Takes back one claim or all of a place; whether the unit holds the block no more."""
    table.counts[slot, place] = 0 if everything else table.counts[slot, place] - 1
    if table.counts[slot, place] > 0:
        return False
    table.tally[slot, unit] -= 1
    last = table.tally[slot, unit] == 0
    if last:
        table.facts[slot, HELD] -= 1
    return last


@inlined
def _withdraw(table: Table, slot: Int, places: NDArray[np.int64], units: NDArray[np.int64], everything: Int) -> tuple[Int, Int]:
    """Takes back claims of several places: whether there was any, and a bit for each place whose unit a consumer has to forget."""
    claimed, gone = False, _ZERO
    for index in range(len(places)):
        if table.counts[slot, places[index]] > 0:
            claimed = True
            if _disclaim(table, slot, places[index], units[index], everything) and table.facts[slot, FLAGS] & ROOTED:
                gone |= np.uint64(1) << np.uint64(index)
    if claimed and table.facts[slot, HELD] == 0:
        table.facts[slot, FLAGS] &= ~ROOTED
        wait_no_more(table, slot)
        if table.facts[slot, CHILDREN] == 0:
            release(table, slot)
    return claimed, gone


@compiled
def remove(table: Table, hashes: NDArray[np.uint64], places: NDArray[np.int64], units: NDArray[np.int64], gone: NDArray[np.uint64]) -> Int:
    """One holder has these blocks less, in up to 64 places. Answers how many it didn't have; for `gone` [n] see `_withdraw`."""
    unknown = 0
    for index in range(len(hashes)):
        slot = find(table, hashes[index])
        gone[index] = _ZERO
        if slot < 0:
            unknown += 1
            continue
        claimed, gone[index] = _withdraw(table, slot, places, units, False)
        unknown += not claimed
    return unknown


@compiled
def drop(table: Table, places: NDArray[np.int64], units: NDArray[np.int64], hashes: NDArray[np.uint64], gone: NDArray[np.uint64]) -> Int:
    """Takes back every claim of some places, at most 64. Fills `hashes` and `gone` [C]; answers how many of them."""
    filled = 0
    for slot in range(len(table.hashes)):
        if table.facts[slot, HELD] == 0:
            continue
        block_hash = table.hashes[slot]
        _, bits = _withdraw(table, slot, places, units, True)
        if bits != _ZERO:
            hashes[filled], gone[filled] = block_hash, bits
            filled += 1
    return filled


@compiled
def root_waiting(table: Table, slot: Int, stamp: Int) -> Int:
    """Roots a block that waits; whether it is to be published now. Not if the slot is another block's by now."""
    flags = table.facts[slot, FLAGS]
    if table.facts[slot, STAMP] != stamp or not flags & WAITS:
        return False
    return root(table, slot)


@compiled
def waits(table: Table, slot: Int, stamp: Int) -> Int:
    """Whether the block waits still."""
    return table.facts[slot, STAMP] == stamp and table.facts[slot, FLAGS] & WAITS != 0


@compiled
def give_up(table: Table, slot: Int) -> None:
    """A block has waited too long for its parent: its content is forgotten (unless descendants need it), its holders are not."""
    wait_no_more(table, slot)
    if not table.facts[slot, FLAGS] & LINKED:
        table.facts[slot, FLAGS] &= ~(CONTENT | HAS_PARENT | EXTRA)
