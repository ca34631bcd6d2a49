# SPDX-License-Identifier: Apache-2.0
"""The KV index: which worker holds which block in which tier, from the workers' own events.

One feed thread applies events, any thread matches. Writers exclude one another for a whole event (`_writing`); the
table itself is locked (`_reading`) only while a piece of at most 1,024 blocks changes or a match runs, so that a match
never waits for a big event or for a table that grows: the bigger one is built aside. Compiled code releases the GIL.
"""

import functools
import threading
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tandem_protocol import blocks as block_keys
from tandem_protocol.blocks import NO_EXTRA, Keys, root_of, salt_of
from tandem_protocol.compiled import read_only
from tandem_protocol.errors import ConfigError
from tandem_protocol.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event, Tier
from tandem_protocol.kv_events import warm_up as warm_up_events
from tandem_router import holdings, index_table, integrity, snapshot
from tandem_router.index_counts import ApplyResult, IndexStats, SlotInfo
from tandem_router.members import MAX_SLOTS, Member
from tandem_router.orphans import Orphan, Orphans
from tandem_router.overlap import Overlap
from tandem_router.places import Table

_PIECE = 1024
"""Blocks that change under one hold of the table's lock: about 0.05 ms."""
_SCAN = 16 * _PIECE
_TIERS = len(Tier)
_LEAST_BLOCKS = 20_000
_NO_KEY = np.uint64(0)
_ALL_GROUPS = np.uint64(holdings.ALL_GROUPS)
_GROUP_BITS = tuple(np.uint64(1 << group) for group in range(holdings.GROUPS))
_EMPTY = ApplyResult()

_Outcome = tuple[int, int, int, int, int]
"""Of a store: the last key, masks changed, rows more, unknown hashes, blocks beyond the room."""


class KvIndex:
    """Blocks to workers. Slots number the dp ranks of workers; a slot is given to another worker after `remove_worker`."""

    def __init__(self, max_blocks: int = 1 << 24, max_orphans: int = 1 << 16) -> None:
        """`max_blocks` bounds pairs of block and slot (50 to 90 bytes each), `max_orphans` blocks that wait for a parent."""
        if max_blocks < 1 or max_orphans < 1:
            raise ConfigError(f"max_blocks {max_blocks} and max_orphans {max_orphans} must be at least 1")
        self._max_blocks = max_blocks
        self._writing = threading.RLock()
        self._reading = threading.Lock()
        self._members: list[Member | None] = []
        self._orphans = Orphans(max_orphans)
        self._words = self._planes = 1
        self._table = index_table.empty(_LEAST_BLOCKS, 1, 1)
        self._held = 0
        self._applied = _EMPTY

    # Workers

    def add_worker(self, name: str, dp_rank: int, block_size: int = 0, blocks: int = 0) -> int:
        """The slot of a worker's dp rank, new or known. `block_size` 0: taken from its first event.

        `blocks`: how many it can hold on its device. The memory for them is taken now, so that no event has to wait for it;
        it may hold more (in other tiers), and 0 means that it isn't known.
        """
        with self._writing:
            known = [member.slot for member in self._in_use() if (member.name, member.dp_rank) == (name, dp_rank)]
            slot = known[0] if known else self._occupy(name, dp_rank, block_size)
            if blocks > self._member(slot).room:
                self._prepare(self._member(slot), blocks)
            return slot

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
            required = member.required[tier]
            self._require(member, tier, 0)
            self._compact(member)
            member.require(tier, required)
            return before - member.held

    # Questions

    def match(self, keys: Keys) -> Overlap:
        """How many leading blocks of a prompt each slot holds. `keys`: `blocks.hash_blocks` of the prompt. Never waits for an event."""
        wanted = np.ascontiguousarray(keys, np.uint64)
        with self._reading:
            blocks = np.zeros((_TIERS, len(self._members)), np.int32)
            index_table.match_prefix(self._table.address, wanted, blocks)
        return Overlap(blocks)

    def stats(self) -> IndexStats:
        """State and totals."""
        with self._writing:
            members = self._in_use()
            return IndexStats(
                blocks=self._table.used, holdings=self._held, orphans=self._orphans.blocks, slots=len(members),
                size_bytes=self._table.size_bytes + sum(member.table.size_bytes for member in members), applied=self._applied,
            )

    def check_integrity(self) -> None:
        """Compares all tables with one another; raises TandemError for the first contradiction. Takes about 20 ns per block and slot."""
        with self._writing:
            integrity.check(self._table, self._members, self._held)

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

    def _prepare(self, member: Member, blocks: int) -> None:
        others = sum(one.room for one in self._in_use() if one is not member)
        room = min(blocks, max(0, self._max_blocks - others))
        member.prepare(room)
        self._replace(self._table.prepare(others + room))

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
        if (event.group, event.spec_kind, event.tier) not in member.learned:
            if not 0 <= event.group < holdings.GROUPS:
                return ApplyResult(refused=size)
            self._enforce(member, member.learn(event))
        if not member.required[event.tier] >> event.group & 1:
            return ApplyResult(ignored=size)
        if len(event.tokens) == 0:
            return self._store_blocks(member, event, _NO_KEY, 0)
        member.block_size = member.block_size or event.block_size
        misfit = event.block_size != member.block_size or len(event.tokens) != size * member.block_size
        if misfit or (event.extra is not None and len(event.extra) != size):
            return ApplyResult(refused=size)
        return self._store_sequence(member, event)

    def _store_sequence(self, member: Member, event: BlockStored) -> ApplyResult:
        """Stores an event with tokens, and then the orphans that waited for any of its blocks."""
        parent = _root_key(event.lora_name) if event.parent is None else np.uint64(event.parent)
        result = self._store_blocks(member, event, parent, event.block_size)
        if self._orphans.waits_for(member.slot) and not result.orphans:
            for block_hash in event.hashes.tolist():
                for orphan in self._orphans.take(member.slot, block_hash):
                    result += self._adopt(member, orphan)
        return result

    def _adopt(self, member: Member, orphan: Orphan) -> ApplyResult:
        event = orphan.event
        result = self._store_sequence(member, event)
        gone = event.hashes[orphan.removed]
        return result + self._remove(member, BlockRemoved(hashes=gone, group=event.group, tier=event.tier)) if len(gone) else result

    def _store_blocks(self, member: Member, event: BlockStored, parent: np.uint64, size: int) -> ApplyResult:
        """Stores blocks of `size` tokens behind `parent`; of size 0: hashes alone. Sets the event aside if its parent isn't known."""
        blocks = len(event.hashes)
        room = min(blocks, self._max_blocks - self._held)
        if not member.table.has_room(room):
            member.use(member.table.bigger(member.held + room))
        if event.tier >= self._planes or not self._table.has_room(room):
            self._grow(room, event.tier)
        store = self._store_piece if blocks <= _PIECE else self._store_pieces
        last, stored, added, unresolved, refused = store(member, event, parent, event.parent is None, size, room)
        if last == 0 and size:
            return ApplyResult(orphans=blocks, dropped=self._orphans.add(member.slot, event))
        self._hold(member, added)
        return ApplyResult(stored=stored, unresolved=unresolved, refused=refused)

    def _store_piece(self, member: Member, event: BlockStored, parent: np.uint64, is_key: bool, size: int, room: int) -> _Outcome:
        extra = NO_EXTRA if event.extra is None else _frozen(event.extra)
        hashes, tokens = _frozen(event.hashes), _frozen(event.tokens)
        with self._reading:
            outcome: _Outcome = holdings.store(self._table.address, member.address, parent, is_key, hashes, tokens, size, extra,
                                               int(event.tier), _GROUP_BITS[event.group], room)
        return outcome

    def _store_pieces(self, member: Member, event: BlockStored, parent: np.uint64, is_key: bool, size: int, room: int) -> _Outcome:
        key, totals = parent, np.zeros(4, np.int64)
        for begin in range(0, len(event.hashes), _PIECE):
            end = begin + _PIECE
            piece = msgspec.structs.replace(event, hashes=event.hashes[begin:end], tokens=event.tokens[begin * size : end * size],
                                            extra=None if event.extra is None else event.extra[begin:end])
            last, *more = self._store_piece(member, piece, key, is_key or begin > 0, size, room - int(totals[1]))
            if last == 0 and size:
                return 0, 0, 0, 0, 0
            key = np.uint64(last)
            totals += more
        stored, added, unresolved, refused = totals.tolist()
        return int(key), stored, added, unresolved, refused

    def _remove(self, member: Member, event: BlockRemoved) -> ApplyResult:
        size = len(event.hashes)
        if event.group is not None and not member.counts(event.group, event.tier) and member.partial >> event.group & 1:
            return ApplyResult(ignored=size)
        groups = _ALL_GROUPS if event.group is None else np.uint64((1 << event.group) & holdings.ALL_GROUPS)
        unknown, removed, tier = np.zeros(size, np.bool_), 0, int(event.tier)
        hashes = _frozen(event.hashes)
        for begin in range(0, size, _PIECE):
            piece = slice(begin, begin + _PIECE)
            with self._reading:
                changed, gone = holdings.remove(self._table.address, member.address, hashes[piece], tier, groups, unknown[piece])
            self._hold(member, -gone)
            removed += changed
        if self._orphans.waits_for(member.slot):
            unknown &= ~self._orphans.remove(member.slot, event.tier, event.group, event.hashes)
        return ApplyResult(removed=removed, unknown_removed=int(np.count_nonzero(unknown)))

    def _enforce(self, member: Member, required: list[int]) -> None:
        """Takes over what a member has learned about its groups: rare, a few times after it joined."""
        changed = [tier for tier in Tier if member.required[tier] != required[tier]]
        for tier in changed:
            self._require(member, tier, required[tier])
        if changed and member.held:
            self._compact(member)

    def _compact(self, member: Member) -> None:
        self._held -= member.held
        member.compact()
        self._held += member.held

    def _hold(self, member: Member, blocks: int) -> None:
        member.held += blocks
        self._held += blocks

    def _require(self, member: Member, tier: Tier, required: int) -> None:
        if member.held:
            self._grow(member.held, tier)
        top = member.table.top
        for begin in range(0, top, _SCAN):
            with self._reading:
                holdings.require(self._table.address, member.address, begin, min(begin + _SCAN, top), int(tier), np.uint64(required))
        member.require(tier, required)

    def _grow(self, blocks: int, tier: Tier) -> None:
        """Makes room for so many more rows, and for the tier."""
        if not self._table.has_room(blocks):
            self._replace(self._table.bigger(self._table.used + blocks))
        if tier >= self._planes:
            self._reshape(self._words, tier + 1)

    def _reshape(self, words: int, planes: int) -> None:
        if (words, planes) != (self._words, self._planes):
            self._replace(index_table.reshaped(self._table, words, planes))
            self._words, self._planes = words, planes
            for member in self._in_use():
                member.settle(words)

    def _replace(self, table: Table) -> None:
        with self._reading:
            self._table = table


@functools.lru_cache(maxsize=4096)
def _root_key(lora_name: str) -> np.uint64:
    return np.uint64(root_of(salt_of(lora_name)))


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    """Read-only, as what is decoded: numba would compile once more for the other kind."""
    return read_only(array) if array.flags.writeable else array


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
    keys = block_keys.hash_blocks(tokens, 16)
    index.match(keys)
    index.match(read_only(keys))
    index.apply(slot, AllBlocksCleared())
    index.check_integrity()
