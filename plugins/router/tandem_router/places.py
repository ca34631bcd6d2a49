# SPDX-License-Identifier: Apache-2.0
"""Rows in the order in which they came, and an open-addressing table of where each of them is. Compiled.

A table is three arrays. `rows` is uint64 [n + 1, columns]: the first column is what a row is found by, and the last row,
the spare one, stays zero: it answers for everything that isn't there. `places` is uint64 [capacity], a power of two: the
low 32 bits of a row's hash (`tag`) above its number plus one; 0 is empty. `state` is uint64 [9], see below.

Blocks of one sequence are stored together, and so lie side by side: who has found a block looks for the next one in the
row behind it and mostly needs no search, while a search costs two cache lines. Collisions go to the next place; an erased
place is filled from those after it, so that there are no tombstones. Freed rows are used again, the last one first:
engines evict a sequence from its end, so that its rows are given out in order again.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tandem_protocol.compiled import Int, compiled, grid_at, inlined, prefetch, words_at
from tandem_router.table_memory import HUGE_BYTES, zeroed

Rows = NDArray[np.uint64]
Places = NDArray[np.uint64]
State = NDArray[np.uint64]

USED, TOP, FREE = 0, 1, 2
"""Of `state`: rows in use, rows ever in use, and the first free one plus one (the next one stands in its last column)."""
_PLACES, _CAPACITY, _ROWS, _COUNT, _COLUMNS = 3, 4, 5, 6, 7
"""Where the two other arrays are, and how big: compiled code gets the address of `state` alone."""
WORDS = 8
"""For the owner of the table."""

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFF_FFFF)
_LEAST_PLACES = 1024
_BATCH = 1024
_HEADROOM = 4
"""By how much more rows a big table has than it needs: they take no memory before they are used, and needn't be copied when it grows."""


@dataclass(eq=False)
class Table:
    """The three arrays. Whoever owns a table decides about locks."""

    places: Places
    rows: Rows
    state: State
    address: int = field(init=False)
    """Of `state`: what compiled code gets."""
    _sure: int = 0
    """Rows for which there is room at least."""

    def __post_init__(self) -> None:
        self.address = self.state.ctypes.data
        self.state[_PLACES:WORDS] = (self.places.ctypes.data, len(self.places), self.rows.ctypes.data, *self.rows.shape)

    @classmethod
    def empty(cls, blocks: int, columns: int) -> "Table":
        """With room for at least so many rows."""
        capacity = capacity_for(blocks)
        return cls(_empty_places(capacity), _empty_rows(_limit(capacity), columns), np.zeros(9, np.uint64))

    def has_room(self, blocks: int) -> bool:
        """Whether so many rows can be added. They pass for added from now on, so that the next question is cheap."""
        if blocks > self._sure:
            self._sure = min(_limit(len(self.places)), len(self.rows) - 1) - self.used
        self._sure -= blocks
        return self._sure >= 0

    def bigger(self, blocks: int) -> "Table":
        """The same rows under the same numbers, with room for so many in all. Nobody may write to this table any more."""
        places, rows = _empty_places(capacity_for(blocks)), self.rows
        rehash(self.places, places)
        if blocks >= len(rows):
            rows = _empty_rows(_limit(len(places)), rows.shape[1])
            rows[: self.top] = self.rows[: self.top]
        return Table(places, rows, self.state.copy())

    def with_rows(self, rows: Rows) -> "Table":
        """The same places with other rows."""
        return Table(self.places, rows, self.state.copy())

    def prepare(self, blocks: int) -> "Table":
        """This table or a bigger one, with room for so many rows in all whose memory is there already."""
        table = self if blocks <= min(_limit(len(self.places)), len(self.rows) - 1) else self.bigger(blocks)
        table.rows[table.top : blocks].fill(_ZERO)
        return table

    @property
    def used(self) -> int:
        """Rows in use."""
        return int(self.state[USED])

    @property
    def top(self) -> int:
        """Rows behind this one were never in use."""
        return int(self.state[TOP])

    @property
    def size_bytes(self) -> int:
        """Of the places and of all rows that were ever in use: those behind them take no memory yet."""
        return int(self.places.nbytes + (self.top + 1) * self.rows.strides[0])


def capacity_for(blocks: int) -> int:
    """Places for so many rows: a power of two, filled between a third and two thirds."""
    return max(_LEAST_PLACES, 1 << (3 * blocks // 2).bit_length())


def _limit(capacity: int) -> int:
    return 2 * capacity // 3


def _empty_places(capacity: int) -> Places:
    places = zeroed(capacity)
    places.fill(_ZERO)  # they are used in no order: the system gives its pages now rather than in the middle of an event
    return places


def _empty_rows(count: int, columns: int) -> Rows:
    roomy = _HEADROOM * count
    count = roomy if 8 * roomy * columns > HUGE_BYTES else count
    return zeroed((count + 1) * columns).reshape(count + 1, columns)


@inlined
def state_at(address: Int) -> State:
    """A table's `state`."""
    return words_at(address, 9)


@inlined
def places_of(state: State) -> Places:
    """A table's `places`."""
    return words_at(state[_PLACES], state[_CAPACITY])


@inlined
def rows_of(state: State) -> Rows:
    """A table's `rows`."""
    return grid_at(state[_ROWS], state[_COUNT], state[_COLUMNS])


@inlined
def rows_of_width(state: State, columns: Int) -> Rows:
    """As `rows_of`, where the number of columns is known when it is compiled."""
    return grid_at(state[_ROWS], state[_COUNT], columns)


@inlined
def tag_of(well_mixed: Int) -> Int:
    """What stands for a hash in its place; its lowest bits say where that is."""
    return well_mixed & _LOW


@inlined
def seek(places: Places, rows: Rows, tag: Int, value: Int) -> Int:
    """Place of the row that begins with `value`, or the empty place where it belongs."""
    last = np.uint64(len(places) - 1)
    place = tag & last
    while True:
        entry = places[place]
        if entry == _ZERO or (entry >> _HALF == tag and rows[(entry & _LOW) - _ONE, 0] == value):
            return place
        place = (place + _ONE) & last


@inlined
def spare(rows: Rows) -> Int:
    """The row of zeros."""
    return np.uint64(len(rows) - 1)


@inlined
def row_at(places: Places, rows: Rows, place: Int) -> Int:
    """The row of a place; the spare one of an empty place."""
    entry = places[place]
    return (entry & _LOW) - _ONE if entry != _ZERO else spare(rows)


@inlined
def row_of(places: Places, rows: Rows, tag: Int, value: Int) -> Int:
    """The row that begins with `value`; the spare one if there is none."""
    return row_at(places, rows, seek(places, rows, tag, value))


@inlined
def take(places: Places, rows: Rows, state: State, place: Int, tag: Int, value: Int) -> Int:
    """A row that begins with `value` and is zero besides, noted in an empty place. The table must have room."""
    link = rows.shape[1] - 1
    if state[FREE] == _ZERO:
        row = state[TOP]
        state[TOP] += _ONE
    else:
        row = state[FREE] - _ONE
        state[FREE] = rows[row, link]
        rows[row, link] = _ZERO
    state[USED] += _ONE
    places[place] = (tag << _HALF) | (row + _ONE)
    rows[row, 0] = value
    return row


@inlined
def give_back(places: Places, rows: Rows, state: State, place: Int) -> None:
    """Frees the row of a place, and moves later places of the same run back over it."""
    row = row_at(places, rows, place)
    for column in range(rows.shape[1]):
        rows[row, column] = _ZERO
    rows[row, rows.shape[1] - 1] = state[FREE]
    state[FREE] = row + _ONE
    state[USED] -= _ONE
    _erase(places, place)


@inlined
def _erase(places: Places, place: Int) -> None:
    last = np.uint64(len(places) - 1)
    hole, probe = place, (place + _ONE) & last
    while places[probe] != _ZERO:
        home = (places[probe] >> _HALF) & last
        if ((probe - home) & last) >= ((probe - hole) & last):
            places[hole] = places[probe]
            hole = probe
        probe = (probe + _ONE) & last
    places[hole] = _ZERO


@inlined
def prefetch_place(places: Places, tag: Int) -> None:
    """Asks for the cache line where a search for the tag begins."""
    prefetch(np.uint64(places.ctypes.data) + ((tag & np.uint64(len(places) - 1)) << np.uint64(3)))


@inlined
def prefetch_row(places: Places, rows: Rows, tag: Int) -> None:
    """Asks for the row in the first place of a search for the tag: mostly the right one. Never faults, there need be none."""
    entry = places[tag & np.uint64(len(places) - 1)]
    prefetch(np.uint64(rows.ctypes.data) + ((entry & _LOW) - _ONE) * np.uint64(8 * rows.shape[1]))


@inlined
def likely_row(places: Places, rows: Rows, tag: Int) -> Int:
    """The row in the first place of a search for the tag; the spare one if there is none."""
    return row_at(places, rows, tag & np.uint64(len(places) - 1))


@compiled
def rehash(old: Places, new: Places) -> None:
    """Fills empty places from others."""
    last = np.uint64(len(new) - 1)
    batch = np.empty(_BATCH, np.uint64)
    for begin in range(0, len(old), _BATCH):
        filled = 0
        for index in range(begin, begin + _BATCH):  # first those in use, without a branch that nobody could predict
            batch[filled] = old[index]
            filled += old[index] != _ZERO
        for index in range(filled):
            place = (batch[index] >> _HALF) & last
            while new[place] != _ZERO:
                place = (place + _ONE) & last
            new[place] = batch[index]


@compiled
def is_broken(address: Int) -> bool:
    """Whether the counts of a table are wrong, or its free rows: each in no place, and all that were ever in use and aren't now."""
    state = state_at(address)
    places, rows = places_of(state), rows_of(state)
    filled = _ZERO
    for place in range(len(places)):
        filled += np.uint64(places[place] != _ZERO)
    free, row = _ZERO, state[FREE]
    while row != _ZERO and free <= state[TOP]:
        free += _ONE
        row = rows[row - _ONE, rows.shape[1] - 1]
    clean = True
    for column in range(rows.shape[1]):
        clean = clean and rows[spare(rows), column] == _ZERO
    return not clean or filled != state[USED] or free + filled != state[TOP]
