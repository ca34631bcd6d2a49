# SPDX-License-Identifier: Apache-2.0
"""What the blocks of one lane contain, and how events are made of it: single ones for the stream, or all of it for a dump."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tandem_kvbm.consolidator import wire
from tandem_kvbm.consolidator.table import BIRTH, EXTRA, FLAGS, HAS_PARENT, HELD, LINKED, LORA, ROOTED, Table, empty_table
from tandem_protocol.kv_events import Tier

_LEAST_SLOTS = 1024
_NIL = b"\xc0"
_FULL_KINDS = frozenset({None, "full_attention", "mla_attention", "sink_full_attention", "unknown"})
"""Groups that a consumer indexes by; a dump names a block in such a one first."""
_MOST_HASHES = 8192
"""Of one event of removals."""

Slots = NDArray[np.int64]


class Unit(msgspec.Struct, frozen=True):
    """A tier and KV-cache group, over all holders."""

    tier: Tier
    group: int


class Kind(msgspec.Struct, frozen=True):
    """What a publisher said about a KV-cache group."""

    name: str | None = None
    sliding_window: int | None = None


class Adapter(msgspec.Struct, frozen=True):
    """A LoRA adapter as events name it."""

    name: str | None = None
    id: int | None = None


@dataclass
class Content:
    """The table, and what its numbers stand for."""

    table: Table = field(default_factory=lambda: empty_table(_LEAST_SLOTS, 4, 2, 0))
    block_size: int = 0
    """Tokens; 0 until an event tells."""
    units: list[Unit] = field(default_factory=list)
    kinds: dict[int, Kind] = field(default_factory=dict)
    adapters: list[Adapter] = field(default_factory=lambda: [Adapter()])
    extras: dict[int, bytes] = field(default_factory=dict)
    """Slot -> raw extra key, for blocks with the flag EXTRA."""

    def copy(self) -> "Content":
        """As it is now, for another thread."""
        arrays: dict[str, Any] = {name: array.copy() for name, array in self.table._asdict().items()}
        table = Table(**arrays)
        return replace(self, table=table, units=[*self.units], kinds={**self.kinds}, adapters=[*self.adapters], extras={**self.extras})


def stored(content: Content, slots: Slots, unit: Unit) -> list[wire.Event]:
    """Events that tell of rooted blocks in a unit, one per run of blocks that follow each other."""
    if len(slots) == 0:
        return []
    table = content.table
    hashes, facts = table.hashes[slots], table.facts[slots]
    follows = (facts[1:, FLAGS] & HAS_PARENT != 0) & (table.parents[slots[1:]] == hashes[:-1]) & (facts[1:, LORA] == facts[:-1, LORA])
    bounds = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(slots)]
    return [_run(content, slots[begin:end], unit) for begin, end in pairwise(bounds)]


def removed(hashes: NDArray[np.uint64], unit: Unit) -> list[wire.Event]:
    """Events that take blocks out of a unit."""
    return [wire.Removed(wire.raw_hashes(hashes[begin : begin + _MOST_HASHES]), unit.tier.name, unit.group)
            for begin in range(0, len(hashes), _MOST_HASHES)]


def everything(content: Content) -> Iterator[tuple[int, wire.Event]]:
    """Events, each with its number of blocks, that make of nothing what consumers of the stream hold now.

    Parents come first. Blocks that nobody holds any more but whose descendants need them are stored, and removed at the end.
    """
    table = content.table
    linked = np.flatnonzero(table.facts[:, FLAGS] & LINKED)
    linked = linked[np.argsort(table.facts[linked, BIRTH], kind="stable")]
    order = sorted(range(len(content.units)), key=lambda unit: content.kinds.get(content.units[unit].group, Kind()).name not in _FULL_KINDS)
    if not order:
        return
    tally, held = table.tally[linked][:, order] > 0, table.facts[linked, HELD] > 0
    shown = held & _is_rooted(table, linked)
    first = np.where(shown, np.argmax(tally, axis=1), 0)
    for begin, end in _stretches(first):
        yield from _sized(content, linked[begin:end], content.units[order[first[begin]]])
    for at, unit in enumerate(order):
        yield from _sized(content, linked[shown & tally[:, at] & (first != at)], content.units[unit])
    ghosts = table.hashes[linked[~shown]]
    for event in removed(ghosts, content.units[order[0]]):
        yield min(len(ghosts), _MOST_HASHES), event


def _is_rooted(table: Table, slots: Slots) -> NDArray[np.bool_]:
    rooted: NDArray[np.bool_] = table.facts[slots, FLAGS] & ROOTED != 0
    return rooted


def _stretches(values: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Bounds of runs of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return list(pairwise(edges)) if len(values) else []


def _sized(content: Content, slots: Slots, unit: Unit) -> Iterator[tuple[int, wire.Event]]:
    for begin in range(0, len(slots), _MOST_HASHES):
        piece = slots[begin : begin + _MOST_HASHES]
        events = stored(content, piece, unit)
        for event in events:
            yield max(1, len(piece) // len(events)), event


def _run(content: Content, slots: Slots, unit: Unit) -> wire.Stored:
    table, first = content.table, slots[0]
    flags, adapter, kind = table.facts[first, FLAGS], content.adapters[table.facts[first, LORA]], content.kinds.get(unit.group, Kind())
    return wire.Stored(
        block_hashes=wire.raw_hashes(table.hashes[slots]), parent_block_hash=int(table.parents[first]) if flags & HAS_PARENT else None,
        token_ids=wire.raw_tokens(table.tokens[slots].reshape(-1)), block_size=content.block_size, lora_id=adapter.id,
        medium=unit.tier.name, lora_name=adapter.name, extra_keys=_extra_keys(content, slots), group_idx=unit.group,
        kv_cache_spec_kind=kind.name, kv_cache_spec_sliding_window=kind.sliding_window,
    )


def _extra_keys(content: Content, slots: Slots) -> msgspec.Raw:
    has = content.table.facts[slots, FLAGS] & EXTRA
    if not has.any():
        return msgspec.Raw(_NIL)
    return wire.raw_extras([content.extras[slot] if flag else _NIL for slot, flag in zip(slots.tolist(), has.tolist(), strict=True)])
