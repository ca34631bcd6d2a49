# SPDX-License-Identifier: Apache-2.0
"""The KV index: which worker holds which block in which tier, from the workers' own events.

One feed thread applies events, any thread matches. Writers exclude one another for a whole event (`_writing`); the
table itself is locked (`_reading`) only while a piece of at most 1,024 blocks changes or a match runs, so that a match
never waits for a big event or for a table that grows: the bigger one is built aside. Compiled code releases the GIL.
"""

import threading

import numpy as np
from numpy.typing import NDArray

from tandem_protocol import blocks as block_keys
from tandem_protocol.blocks import Keys, extend, root_of, salt_of
from tandem_protocol.compiled import read_only
from tandem_protocol.errors import ConfigError, TandemError
from tandem_protocol.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event, Tier
from tandem_protocol.kv_events import warm_up as warm_up_events
from tandem_router import holdings, index_table, snapshot
from tandem_router.index_counts import ApplyResult, IndexStats, SlotInfo
from tandem_router.members import MAX_SLOTS, Member, capacity_for
from tandem_router.orphans import Orphan, Orphans
from tandem_router.overlap import Overlap

_PIECE = 1024
"""Blocks that change under one hold of the table's lock: about 0.1 ms."""
_SCAN = 16 * _PIECE
_TIERS = len(Tier)
_ALL_GROUPS = np.uint64(holdings.ALL_GROUPS)
_EMPTY = ApplyResult()


class KvIndex:
    """Blocks to workers. Slots number the dp ranks of workers; a slot is given to another worker after `remove_worker`."""

    def __init__(self, max_blocks: int = 1 << 24, max_orphans: int = 1 << 16) -> None:
        """`max_blocks` bounds pairs of block and slot (60 to 85 bytes each), `max_orphans` blocks that wait for a parent."""
        if max_blocks < 1 or max_orphans < 1:
            raise ConfigError(f"max_blocks {max_blocks} and max_orphans {max_orphans} must be at least 1")
        self._max_blocks = max_blocks
        self._writing = threading.RLock()
        self._reading = threading.Lock()
        self._members: list[Member | None] = []
        self._orphans = Orphans(max_orphans)
        self._words = self._planes = 1
        self._rows = index_table.empty_rows(capacity_for(_PIECE), 1, 1)
        self._used = np.zeros(1, np.int64)
        self._held = 0
        self._applied = _EMPTY

    # Workers

    def add_worker(self, name: str, dp_rank: int, block_size: int = 0) -> int:
        """The slot of a worker's dp rank, new or known. `block_size` 0: taken from its first event."""
        with self._writing:
            known = [member.slot for member in self._in_use() if (member.name, member.dp_rank) == (name, dp_rank)]
            return known[0] if known else self._occupy(name, dp_rank, block_size)

    def remove_worker(self, name: str) -> None:
        """Forgets all dp ranks of a worker; unknown names are no error."""
        with self._writing:
            for member in [member for member in self._in_use() if member.name == name]:
                self._orphans.clear(member.slot)
                for tier in Tier:
                    self._require(member, tier, 0)
                self._held -= member.held
                self._members[member.slot] = None

    def slots(self) -> tuple[SlotInfo, ...]:
        """All slots in use."""
        with self._writing:
            return tuple(SlotInfo(m.slot, m.name, m.dp_rank, m.block_size, m.held) for m in self._in_use())

    def size(self, slot: int) -> int:
        """Blocks that the slot holds in any tier."""
        with self._writing:
            return self._member(slot).held

    # Events

    def apply(self, slot: int, event: Event) -> ApplyResult:
        """Applies one event of a slot, and tells what became of its blocks. Raises ConfigError for a slot that isn't in use."""
        with self._writing:
            member = self._member(slot)
            if isinstance(event, BlockStored):
                result = self._store(member, event)
            elif isinstance(event, BlockRemoved):
                result = self._remove(member, event)
            else:
                assert isinstance(event, AllBlocksCleared)
                result = ApplyResult(removed=self.clear(slot))
            self._applied += result
            return result

    def clear(self, slot: int, tier: Tier = Tier.GPU) -> int:
        """Forgets what a slot holds in one tier; answers how many blocks it now holds less."""
        with self._writing:
            member = self._member(slot)
            self._orphans.clear(slot, tier)
            before = member.held
            required = int(member.required[tier])
            self._require(member, tier, 0)
            self._compact(member)
            member.required[tier] = required
            return before - member.held

    # Questions

    def match(self, keys: Keys) -> Overlap:
        """How many leading blocks of a prompt each slot holds. `keys`: `blocks.hash_blocks` of the prompt. Never waits for an event."""
        wanted = read_only(np.ascontiguousarray(keys, np.uint64))
        with self._reading:
            found = np.zeros((_TIERS, 64 * self._words), np.int32)
            index_table.match_prefix(self._rows, self._words, wanted, found)
            return Overlap(found[:, : len(self._members)])

    def stats(self) -> IndexStats:
        """State and totals."""
        with self._writing:
            members = self._in_use()
            return IndexStats(
                blocks=int(self._used[0]), holdings=self._held, orphans=self._orphans.blocks, slots=len(members),
                size_bytes=self._rows.nbytes + sum(member.rows.nbytes for member in members), applied=self._applied,
            )

    def check_integrity(self) -> None:
        """Compares all tables with one another; raises TandemError for the first contradiction. Takes about 20 ns per block and slot."""
        with self._writing:
            bits = np.zeros((_TIERS, 64 * self._words), np.int64)
            if index_table.count_bits(self._rows, self._words, bits) != self._used[0]:
                raise TandemError("the KV index counts its rows wrongly: restart the router, and report this")
            if sum(member.held for member in self._in_use()) != self._held:
                raise TandemError("the KV index counts its holdings wrongly: restart the router, and report this")
            for slot in range(bits.shape[1]):
                self._check_slot(slot, bits[:, slot])

    # Snapshots

    def dump(self) -> bytes:
        """Everything but orphans, for `load`."""
        with self._writing:
            return snapshot.pack(self._in_use())

    def load(self, raw: bytes) -> None:
        """Fills an empty index from `dump`.

        Raises ConfigError if the index isn't empty, or the snapshot is none or too big; TandemError if it is damaged.
        """
        with self._writing:
            if self._members:
                raise ConfigError("a snapshot is loaded into an index that has workers: load it before the first add_worker")
            loaded = snapshot.unpack(raw)
            if sum(member.held for member, _ in loaded) > self._max_blocks:
                raise ConfigError(f"the snapshot holds more than max_blocks {self._max_blocks}: raise it, or delete the snapshot")
            for member, required in loaded:
                self._enter(member)
                for tier in Tier:
                    self._require(member, tier, required[tier])
            self.check_integrity()

    # Below: the caller holds `_writing`.

    def _in_use(self) -> list[Member]:
        return [member for member in self._members if member is not None]

    def _member(self, slot: int) -> Member:
        member = self._members[slot] if 0 <= slot < len(self._members) else None
        if member is None:
            raise ConfigError(f"slot {slot} of the KV index is not in use: add_worker gives slots")
        return member

    def _occupy(self, name: str, dp_rank: int, block_size: int) -> int:
        free = [slot for slot, member in enumerate(self._members) if member is None]
        slot = free[0] if free else len(self._members)
        if slot >= MAX_SLOTS:
            raise ConfigError(f"more than {MAX_SLOTS} dp ranks: give each router fewer workers")
        self._enter(Member(slot, name, dp_rank, block_size))
        return slot

    def _enter(self, member: Member) -> None:
        self._reshape(max(self._words, member.slot // 64 + 1), self._planes)
        member.settle(self._words)
        with self._reading:
            self._members.extend([None] * (member.slot + 1 - len(self._members)))
            self._members[member.slot] = member
        self._held += member.held

    def _store(self, member: Member, event: BlockStored) -> ApplyResult:
        size = len(event.hashes)
        if not 0 <= event.group < holdings.GROUPS:
            return ApplyResult(refused=size)
        required = member.learn(event)
        if required is not None:
            self._enforce(member, required)
        if not member.counts(event.group, event.tier):
            return ApplyResult(ignored=size)
        if len(event.tokens) == 0:
            return self._store_keys(member, event, np.zeros(size, np.uint64))
        member.block_size = member.block_size or event.block_size
        misfit = event.block_size != member.block_size or len(event.tokens) != size * event.block_size
        if misfit or (event.extra is not None and len(event.extra) != size):
            return ApplyResult(refused=size)
        return self._store_sequence(member, event)

    def _store_sequence(self, member: Member, event: BlockStored) -> ApplyResult:
        """Stores an event with tokens, and then the orphans that waited for any of its blocks."""
        parent = root_of(salt_of(event.lora_name)) if event.parent is None else int(holdings.key_of(member.rows, np.uint64(event.parent)))
        if parent == 0:
            return ApplyResult(orphans=len(event.hashes), dropped=self._orphans.add(member.slot, event))
        result = self._store_keys(member, event, extend(parent, event.tokens, event.block_size, event.extra))
        if self._orphans.waits_for(member.slot):
            for block_hash in event.hashes.tolist():
                for orphan in self._orphans.take(member.slot, block_hash):
                    result += self._adopt(member, orphan)
        return result

    def _adopt(self, member: Member, orphan: Orphan) -> ApplyResult:
        event = orphan.event
        result = self._store_sequence(member, event)
        gone = event.hashes[orphan.removed]
        return result + self._remove(member, BlockRemoved(hashes=gone, group=event.group, tier=event.tier)) if len(gone) else result

    def _store_keys(self, member: Member, event: BlockStored, keys: Keys) -> ApplyResult:
        size = len(event.hashes)
        room = min(size, self._max_blocks - self._held)
        member.reserve(room)
        self._grow(room, event.tier)
        counts = np.zeros(5, np.int64)
        group, hashes = np.uint64(1 << event.group), read_only(event.hashes)
        for begin in range(0, size, _PIECE):
            piece = slice(begin, begin + _PIECE)
            with self._reading:
                holdings.store(member.rows, self._rows, self._used, hashes[piece], keys[piece], member.place, member.required,
                               int(event.tier), group, room, counts)
        self._hold(member, int(counts[holdings.ADDED]))
        stored, unresolved, refused = (int(counts[which]) for which in (holdings.STORED, holdings.UNKNOWN, holdings.REFUSED))
        return ApplyResult(stored=stored, unresolved=unresolved, refused=refused)

    def _remove(self, member: Member, event: BlockRemoved) -> ApplyResult:
        size = len(event.hashes)
        if event.group is not None and not member.counts(event.group, event.tier) and member.partial >> event.group & 1:
            return ApplyResult(ignored=size)
        groups = _ALL_GROUPS if event.group is None else np.uint64((1 << event.group) & holdings.ALL_GROUPS)
        unknown, counts = np.zeros(size, np.bool_), np.zeros(5, np.int64)
        hashes = read_only(event.hashes)
        for begin in range(0, size, _PIECE):
            piece = slice(begin, begin + _PIECE)
            with self._reading:
                holdings.remove(member.rows, self._rows, self._used, hashes[piece], member.place, member.required, int(event.tier), groups,
                                unknown[piece], counts)
        self._hold(member, int(counts[holdings.ADDED]))
        if self._orphans.waits_for(member.slot):
            unknown &= ~self._orphans.remove(member.slot, event.tier, event.group, event.hashes)
        return ApplyResult(removed=int(counts[holdings.REMOVED]), unknown_removed=int(np.count_nonzero(unknown)))

    def _enforce(self, member: Member, required: NDArray[np.uint64]) -> None:
        """Takes over what a member has learned about its groups: rare, a few times after it joined."""
        changed = [tier for tier in Tier if member.required[tier] != required[tier]]
        for tier in changed:
            if member.held:
                self._require(member, tier, int(required[tier]))
            member.required[tier] = required[tier]
        if changed and member.held:
            self._compact(member)

    def _compact(self, member: Member) -> None:
        self._held -= member.held
        member.rebuild(member.held)
        self._held += member.held

    def _hold(self, member: Member, blocks: int) -> None:
        member.held += blocks
        self._held += blocks

    def _require(self, member: Member, tier: Tier, required: int) -> None:
        self._grow(member.held, tier)
        for begin in range(0, len(member.rows), _SCAN):
            with self._reading:
                holdings.require(member.rows, begin, min(begin + _SCAN, len(member.rows)), self._rows, self._used, member.place, int(tier),
                                 member.required[tier], np.uint64(required))
        member.required[tier] = required

    def _grow(self, blocks: int, tier: Tier) -> None:
        """Makes room for so many more rows, and for the tier."""
        needed = int(self._used[0]) + blocks
        if 3 * needed > 2 * len(self._rows):
            self._rebuild(capacity_for(needed), self._words, self._planes)
        self._reshape(self._words, max(self._planes, tier + 1))

    def _reshape(self, words: int, planes: int) -> None:
        if (words, planes) != (self._words, self._planes):
            self._rebuild(len(self._rows), words, planes)

    def _rebuild(self, capacity: int, words: int, planes: int) -> None:
        rows = index_table.empty_rows(capacity, words, planes)
        index_table.copy_rows(self._rows, self._words, rows, words)
        with self._reading:
            self._rows, self._words, self._planes = rows, words, planes
        for member in self._in_use():
            member.settle(words)

    def _check_slot(self, slot: int, bits: NDArray[np.int64]) -> None:
        member = self._members[slot] if slot < len(self._members) else None
        held = np.zeros(_TIERS, np.int64)
        wrong = 0 if member is None else holdings.faults(member.rows, self._rows, member.place, member.required, held)
        if wrong or (held != bits).any():
            raise TandemError(f"slot {slot} of the KV index contradicts itself ({wrong} faults, {held} blocks by tier, {bits} bits): "
                              "remove the worker and add it again, and report this")


def warm_up() -> None:
    """Compiles, or loads from the cache, all that the index runs, so that no request or event waits for it."""
    block_keys.warm_up()
    warm_up_events()
    index = KvIndex()
    slot = index.add_worker("warm", 0)
    tokens = np.arange(32, dtype=np.uint32)
    stored = BlockStored(hashes=np.array([1, 2], np.uint64), tokens=tokens, block_size=16)
    index.apply(slot, stored)
    index.apply(slot, BlockStored(hashes=stored.hashes, parent=2, tokens=tokens, block_size=16, tier=Tier.CPU, group=1))
    index.apply(slot, BlockRemoved(hashes=stored.hashes[:1]))
    index.match(block_keys.hash_blocks(tokens, 16))
    index.apply(slot, AllBlocksCleared())
    index.check_integrity()
