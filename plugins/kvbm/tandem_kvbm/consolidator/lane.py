# SPDX-License-Identifier: Apache-2.0
"""One data-parallel rank: what all its publishers hold, and what consumers have to be told when that changes. Pure: no sockets, no clock.

**The rule.** A consumer weighs a worker's tiers, so a tier of a rank is what it counts: a block is published as stored in (tier,
group) when the first holder has it there, and as removed when the last lost it. Holders are the owners (secondary tiers have
names) of each publisher: two owners in STORAGE are one STORAGE, one worker's GPU and CPU are two tiers. A repeated store changes
nothing on the GPU, where engines also report reuse; in CPU and STORAGE it counts, since vLLM announces the blocks that two chunks
share once per chunk (`OffloadingEventsTracker`) and takes them back as often.

A block is published only after its parent: until then it waits, bounded in number and time. One that comes without tokens is
published with those that are known of it, as soon as they are.
"""

import numpy as np
from numpy.typing import NDArray

from tandem_kvbm.consolidator import claims, wire
from tandem_kvbm.consolidator import table as tables
from tandem_kvbm.consolidator.content import Adapter, Content, Kind, Slots, Unit, removed, stored
from tandem_kvbm.consolidator.lane_terms import Counts, Place, Waiting
from tandem_kvbm.consolidator.operations import Remove, Store
from tandem_kvbm.consolidator.plan import LaneLimits
from tandem_protocol.errors import TandemError
from tandem_protocol.kv_events import Tier

MOST_PLACES = 64
MOST_ADAPTERS = 4096
_NO_TOKENS = np.empty(0, np.uint32)


class Lane:
    """Holders in, events out. `now`: any clock in seconds that doesn't run backwards."""

    def __init__(self, limits: LaneLimits | None = None, content: Content | None = None, places: list[Place] | None = None,
                 now: float = 0.0) -> None:
        """`content` and `places`: those of a lane of an earlier process."""
        self.counts = Counts()
        self.content = content or Content()
        self.places = places or []
        self._limits = limits or LaneLimits()
        self._numbers = {place: number for number, place in enumerate(self.places)}
        self._units = {unit: number for number, unit in enumerate(self.content.units)}
        self._adapters = {adapter: number for number, adapter in enumerate(self.content.adapters)}
        self._waiting = Waiting()
        self._restore_waiting(now)

    @property
    def held(self) -> int:
        """Blocks known, whether published or not."""
        return int(self.content.table.sizes[tables.BLOCKS])

    @property
    def waiting(self) -> int:
        """Blocks that wait for their parent."""
        return int(self.content.table.sizes[tables.WAITING])

    def store(self, source: str, operation: Store, now: float) -> list[wire.Event]:
        """A holder has more."""
        size = len(operation.hashes)
        self.counts.stored += size
        if not self._fits(operation):
            self.counts.mismatched += size
            return []
        place, adapter = self._place(source, operation), self._adapter(operation.event)
        if place is None or adapter is None:
            self.counts.refused += size
            return []
        self._learn_kind(operation)
        self._make_room(size)
        slots, codes = np.empty(size, np.int64), np.empty(size, np.uint8)
        unit = self._units[self.places[place].unit]
        claims.store(
            self.content.table, operation.hashes, operation.tokens, operation.parents, operation.has_parents, adapter, place, unit,
            operation.tier is not Tier.GPU, slots, codes,
        )
        return self._tell(operation, slots, codes, now)

    def remove(self, source: str, operation: Remove) -> list[wire.Event]:
        """A holder has less."""
        size = len(operation.hashes)
        self.counts.removed += size
        wanted = [number for number, place in enumerate(self.places) if place.source == source and place.owner == operation.owner
                  and place.unit.tier is operation.tier and operation.group in (None, place.unit.group)]
        if not wanted:
            self.counts.unknown_removed += size
            return []
        gone = np.empty(size, np.uint64)
        self.counts.unknown_removed += int(claims.remove(self.content.table, operation.hashes, *self._columns(wanted), gone))
        return self._withdraw(operation.hashes, gone, wanted)

    def clear(self, source: str, tier: Tier | None = Tier.GPU) -> list[wire.Event]:
        """A publisher holds nothing any more in a tier, or (None) in all."""
        wanted = [number for number, place in enumerate(self.places) if place.source == source and tier in (None, place.unit.tier)]
        if not wanted:
            return []
        hashes, gone = np.empty(len(self.content.table.hashes), np.uint64), np.empty(len(self.content.table.hashes), np.uint64)
        filled = int(claims.drop(self.content.table, *self._columns(wanted), hashes, gone))
        events = self._withdraw(hashes[:filled], gone[:filled], wanted)
        if self.held == 0:
            self.content.block_size = 0  # whoever comes next may be another engine
        return self._shortened(events)

    def expire(self, now: float) -> None:
        """Gives up orphans that have waited too long, or are too many."""
        while (oldest := self._waiting.oldest()) is not None:
            (slot, stamp), deadline = oldest
            if claims.waits(self.content.table, slot, stamp):
                if now < deadline and self.waiting <= self._limits.max_orphans:
                    return
                claims.give_up(self.content.table, slot)
                self.counts.expired += 1
            self._waiting.forget((slot, stamp))

    def check_integrity(self) -> None:
        """Raises TandemError if the tables contradict each other."""
        wrong = int(tables.faults(self.content.table))
        if wrong:
            raise TandemError(f"the consolidator's table contradicts itself in {wrong} places: restart it, and report this")

    def _fits(self, operation: Store) -> bool:
        tokens, size = len(operation.tokens), operation.event.block_size
        if tokens == 0:
            return True
        if size < 1 or tokens != size * len(operation.hashes) or size != (self.content.block_size or size):
            return False
        if size != self.content.block_size:
            self.content.block_size = size
            self._reshape()
        return True

    def _place(self, source: str, operation: Store) -> int | None:
        place = Place(source, operation.owner, Unit(operation.tier, operation.group))
        number = self._numbers.get(place)
        if number is None and len(self.places) < MOST_PLACES:
            number = self._numbers[place] = len(self.places)
            self.places.append(place)
            if place.unit not in self._units:
                self._units[place.unit] = len(self.content.units)
                self.content.units.append(place.unit)
            self._reshape()
        return number

    def _adapter(self, event: wire.Stored) -> int | None:
        adapter = Adapter(event.lora_name, event.lora_id)
        number = self._adapters.get(adapter)
        if number is None and len(self.content.adapters) < MOST_ADAPTERS:
            number = self._adapters[adapter] = len(self.content.adapters)
            self.content.adapters.append(adapter)
        return number

    def _learn_kind(self, operation: Store) -> None:
        event = operation.event
        if event.kv_cache_spec_kind is not None:
            self.content.kinds[operation.group] = Kind(event.kv_cache_spec_kind, event.kv_cache_spec_sliding_window)

    def _reshape(self) -> None:
        """Columns for all places and units, and for a block's tokens."""
        table = self.content.table
        places, units = table.counts.shape[1], table.tally.shape[1]
        while places < len(self.places):
            places *= 2
        while units < len(self.content.units):
            units *= 2
        shape = places, units, self.content.block_size
        if shape != (table.counts.shape[1], table.tally.shape[1], table.tokens.shape[1]):
            if self.content.block_size < table.tokens.shape[1]:
                table = table._replace(tokens=np.zeros((len(table.hashes), self.content.block_size), np.uint32))
            self.content.table = tables.resized(table, len(table.hashes), *shape)

    def _make_room(self, size: int) -> None:
        table = self.content.table
        capacity = len(table.hashes)
        while capacity - self.held < size and capacity < self._limits.max_blocks:
            capacity = min(2 * capacity, self._limits.max_blocks)
        if capacity != len(table.hashes):
            self.content.table = tables.resized(table, capacity, table.counts.shape[1], table.tally.shape[1], table.tokens.shape[1])

    def _tell(self, operation: Store, slots: Slots, codes: NDArray[np.uint8], now: float) -> list[wire.Event]:
        """The events of a store, and what must be remembered about it."""
        merged = int(np.bitwise_or.reduce(codes)) if len(codes) else 0
        if merged & claims.LEARNED and operation.extras is not None:
            self._keep_extras(operation.extras, slots, codes)
        if merged & claims.WAIT:
            self._wait(slots[codes & claims.WAIT != 0], now)
        self._count(codes, merged)
        unit = Unit(operation.tier, operation.group)
        events: list[wire.Event] = []
        all_new = len(codes) > 0 and int(np.bitwise_and.reduce(codes)) & claims.ANNOUNCE
        if all_new and operation.chained and len(operation.tokens) and merged & (claims.ALL | claims.LOOSE) == 0:
            events.append(self._passed_on(operation))
            self.counts.announced += len(codes)
        elif merged & (claims.ANNOUNCE | claims.ALL):
            events += self._named(slots[codes & claims.LOOSE != 0], unit)
            told = (codes & (claims.ANNOUNCE | claims.ALL) != 0) & (codes & claims.LOOSE == 0)
            events += self._announce(slots[told], [unit])
            events += self._announce(slots[codes & claims.ALL != 0], [other for other in self.content.units if other != unit])
        if merged & claims.NEWLY and self._waiting.by_parent:
            events += self._adopt(operation.hashes[codes & claims.NEWLY != 0].tolist(), now)
        return events

    def _count(self, codes: NDArray[np.uint8], merged: int) -> None:
        if merged & ~(claims.ANNOUNCE | claims.NEWLY | claims.LEARNED) == 0 and int(np.bitwise_and.reduce(codes)) & claims.ANNOUNCE:
            return
        self.counts.refused += int(np.count_nonzero(codes & claims.REFUSED))
        self.counts.bare += int(np.count_nonzero(codes & claims.BARE))
        self.counts.orphans += int(np.count_nonzero(codes & claims.WAIT))
        self.counts.repeated += int(np.count_nonzero(codes & ~np.uint8(claims.LEARNED) == 0))

    def _passed_on(self, operation: Store) -> wire.Stored:
        event = operation.event
        event.ownership = event.locality = None
        event.medium, event.group_idx = operation.tier.name, operation.group
        kind = self.content.kinds.get(operation.group)
        if kind is not None:
            event.kv_cache_spec_kind, event.kv_cache_spec_sliding_window = kind.name, kind.sliding_window
        event.parent_block_hash = int(operation.parents[0]) if operation.has_parents[0] else None
        if not wire.is_integers(event.block_hashes):
            event.block_hashes = wire.raw_hashes(operation.hashes)
        return event

    def _announce(self, slots: Slots, units: list[Unit]) -> list[wire.Event]:
        """Publishes blocks in those of the units that hold them."""
        events: list[wire.Event] = []
        for unit in units if len(slots) else ():
            there = slots[self.content.table.tally[slots, self._units[unit]] > 0]
            events += stored(self.content, there, unit)
            self.counts.announced += len(there)
        return events

    def _named(self, slots: Slots, unit: Unit) -> list[wire.Event]:
        """Publishes blocks that consumers know by their hashes alone: a parent that they no longer know would make orphans of them."""
        if len(slots) == 0:
            return []
        self.counts.announced += len(slots)
        return [wire.Stored(wire.raw_hashes(self.content.table.hashes[slots]), None, wire.raw_tokens(_NO_TOKENS), 0, medium=unit.tier.name,
                            group_idx=unit.group)]

    def _adopt(self, parents: list[int], now: float) -> list[wire.Event]:
        """Publishes the blocks that waited for these, and those that waited for them."""
        events: list[wire.Event] = []
        table = self.content.table
        while parents:
            rooted = [slot for parent in parents for slot, stamp in self._waiting.take(parent) if claims.root_waiting(table, slot, stamp)]
            self.counts.adopted += len(rooted)
            events += self._announce(np.array(rooted, np.int64), self.content.units)
            parents = table.hashes[np.array(rooted, np.int64)].tolist()
        return events

    def _wait(self, slots: Slots, now: float) -> None:
        stamps, parents = self.content.table.facts[slots, tables.STAMP], self.content.table.parents[slots]
        for slot, stamp, parent in zip(slots.tolist(), stamps.tolist(), parents.tolist(), strict=True):
            self._waiting.add(slot, stamp, parent, now + self._limits.orphan_s)
        self.expire(now)

    def _restore_waiting(self, now: float) -> None:
        """Blocks of a loaded table get their time anew."""
        table = self.content.table
        if table.sizes[tables.WAITING]:
            self._wait(np.flatnonzero(table.facts[:, tables.FLAGS] & tables.WAITS), now)

    def _keep_extras(self, extras: list[bytes], slots: Slots, codes: NDArray[np.uint8]) -> None:
        for index in np.flatnonzero(codes & claims.LEARNED).tolist():
            self.content.extras[int(slots[index])] = extras[index]
            self.content.table.facts[slots[index], tables.FLAGS] |= tables.EXTRA

    def _columns(self, places: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        units = [self._units[self.places[place].unit] for place in places]
        return np.array(places, np.int64), np.array(units, np.int64)

    def _withdraw(self, hashes: NDArray[np.uint64], gone: NDArray[np.uint64], places: list[int]) -> list[wire.Event]:
        events: list[wire.Event] = []
        for bit, place in enumerate(places) if gone.any() else ():
            lost = hashes[gone & np.uint64(1 << bit) != 0]
            events += removed(lost, self.places[place].unit)
            self.counts.withdrawn += len(lost)
        return events

    def _shortened(self, events: list[wire.Event]) -> list[wire.Event]:
        """One event in place of all removals from the GPU tier, if nothing is left in it."""
        columns = [number for unit, number in self._units.items() if unit.tier is Tier.GPU]
        others = [event for event in events if not isinstance(event, wire.Removed) or event.medium != Tier.GPU.name]
        if len(others) == len(events) or self.content.table.tally[:, columns].any():
            return events
        return [wire.Cleared(), *others]
