# SPDX-License-Identifier: Apache-2.0
"""A batch of events as a few operations on arrays. Everything that can be wrong with a batch shows here, before anything is changed.

vLLM sends an event per block where tiers store and where the device evicts. Events in a row that differ only in their blocks are one
operation: what an event costs is mostly the number of array operations that it leads to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from tandem_kvbm.consolidator import wire
from tandem_protocol.kv_events import Tier
from tandem_protocol.msgpack_integers import read_hashes, read_tokens

HIGHEST_GROUP = 63


@dataclass(frozen=True)
class Owner:
    """Who holds blocks in a tier, within one publisher: an engine's own tiers have none, secondary tiers a name each."""

    name: str = ""
    locality: str = ""


@dataclass(frozen=True, eq=False)
class Store:
    """One owner has n blocks more."""

    hashes: NDArray[np.uint64]
    tokens: NDArray[np.uint32]
    """All blocks', or none."""
    parents: NDArray[np.uint64]
    has_parents: NDArray[np.bool_]
    chained: bool
    """Each block but the first has the one before it as its parent, so that `event` says it all."""
    extras: list[bytes] | None
    tier: Tier
    group: int
    owner: Owner
    event: wire.Stored


@dataclass(frozen=True, eq=False)
class Remove:
    """One owner has blocks less in a tier; group None means in every group."""

    hashes: NDArray[np.uint64]
    tier: Tier
    group: int | None
    owner: Owner


@dataclass(frozen=True)
class Clear:
    """A publisher's GPU tier is empty."""


Operation = Store | Remove | Clear


def operations(events: list[wire.Event]) -> list[Operation]:
    """In the order of the events. Raises msgspec.ValidationError."""
    result: list[Operation] = []
    for kind, group in groupby(events, type):
        if kind is wire.Stored:
            for _, alike in groupby(group, _STORED):
                result.extend(_stores(cast("list[wire.Stored]", list(alike))))
        elif kind is wire.Removed:
            result.extend(_remove(cast("list[wire.Removed]", list(alike))) for _, alike in groupby(group, _REMOVED))
        else:
            result.extend(Clear() for _ in group)
    return result


def _remove(events: list[wire.Removed]) -> Remove:
    first, hashes = events[0], wire.hashes_of_many([event.block_hashes for event in events])
    return Remove(hashes, wire.tier_of(first.medium), _group(first.group_idx), _owner(first))


def _stores(events: list[wire.Stored]) -> list[Store]:
    """One, if all of them are complete and have no extra keys."""
    block_size = events[0].block_size
    if len(events) > 1 and block_size > 0 and wire.nothing_extra(events):
        hashes, sizes = wire.joined([event.block_hashes for event in events])
        tokens, lengths = wire.joined([event.token_ids for event in events])
        if lengths == [block_size * size for size in sizes] and 0 not in sizes:
            return [_joined(events, hashes, tokens, sizes)]
    return [_single(event) for event in events]


def _joined(events: list[wire.Stored], raw_hashes: msgspec.Raw, raw_tokens: msgspec.Raw, sizes: list[int]) -> Store:
    """Several stores as one. If each begins where the last ended, the first event becomes that of all."""
    event, hashes = events[0], read_hashes(raw_hashes)
    begins = np.cumsum([0, *sizes[:-1]])
    given = [wire.low_bits(one.parent_block_hash) for one in events]
    parents, has_parents = _parents(hashes)
    chained = given[1:] == parents[begins[1:]].tolist()
    parents[begins], has_parents[begins] = [parent or 0 for parent in given], [parent is not None for parent in given]
    if chained:
        event.block_hashes, event.token_ids = raw_hashes, raw_tokens
        event.extra_keys = msgspec.Raw(wire.NIL)
    return Store(hashes, read_tokens(raw_tokens), parents, has_parents, chained, None, wire.tier_of(event.medium),
                 _group(event.group_idx) or 0, _owner(event), event)


def _single(event: wire.Stored) -> Store:
    hashes, parent = read_hashes(event.block_hashes), wire.low_bits(event.parent_block_hash)
    parents, has_parents = _parents(hashes)
    parents[:1], has_parents[:1] = parent or 0, parent is not None
    return Store(
        hashes=hashes, tokens=read_tokens(event.token_ids), parents=parents, has_parents=has_parents, chained=True,
        extras=wire.extras_of(event.extra_keys, len(hashes)), tier=wire.tier_of(event.medium), group=_group(event.group_idx) or 0,
        owner=_owner(event), event=event,
    )


def _parents(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Parents of a run of blocks, the first one's still to be told."""
    parents, has_parents = np.zeros(len(hashes), np.uint64), np.ones(len(hashes), np.bool_)
    parents[1:] = hashes[:-1]
    return parents, has_parents


def _group(group: int | None) -> int | None:
    if group is not None and not 0 <= group <= HIGHEST_GROUP:
        raise msgspec.ValidationError(f"KV-cache group {group} is not from 0 to {HIGHEST_GROUP}")
    return group


def _owner(event: wire.Stored | wire.Removed) -> Owner:
    return _NOBODY if event.ownership is None and event.locality is None else Owner(event.ownership or "", event.locality or "")


_NOBODY = Owner()
_PLACE = ("medium", "group_idx", "ownership", "locality")
_REMOVED: Callable[[Any], Any] = attrgetter(*_PLACE)
_STORED: Callable[[Any], Any] = attrgetter(
    *_PLACE, "block_size", "lora_name", "lora_id", "kv_cache_spec_kind", "kv_cache_spec_sliding_window")
"""What events must have in common to be done at once."""
