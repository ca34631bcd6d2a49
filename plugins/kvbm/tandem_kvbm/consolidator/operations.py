# SPDX-License-Identifier: Apache-2.0
"""A batch of events as a few operations on arrays. Everything that can be wrong with a batch shows here, before anything is changed."""

from dataclasses import dataclass
from itertools import groupby

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
    """One owner has a run of blocks."""

    hashes: NDArray[np.uint64]
    tokens: NDArray[np.uint32]
    parent: int | None
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
    """In the order of the events; successive removals of one kind are one operation. Raises msgspec.ValidationError."""
    result: list[Operation] = []
    for kind, together in groupby(events, _kind):
        if kind is None:
            result.extend(_single(event) for event in together)
        else:
            hashes = wire.hashes_of_many([event.block_hashes for event in together if isinstance(event, wire.Removed)])
            result.append(Remove(hashes, *kind))
    return result


def _kind(event: wire.Event) -> tuple[Tier, int | None, Owner] | None:
    """What removals must have in common to be done at once; None for other events."""
    if not isinstance(event, wire.Removed):
        return None
    return wire.tier_of(event.medium), _group(event.group_idx), _owner(event)


def _single(event: wire.Event) -> Store | Clear:
    if not isinstance(event, wire.Stored):
        return Clear()
    hashes = read_hashes(event.block_hashes)
    return Store(
        hashes=hashes, tokens=read_tokens(event.token_ids), parent=wire.low_bits(event.parent_block_hash),
        extras=wire.extras_of(event.extra_keys, len(hashes)), tier=wire.tier_of(event.medium), group=_group(event.group_idx) or 0,
        owner=_owner(event), event=event,
    )


def _group(group: int | None) -> int | None:
    if group is not None and not 0 <= group <= HIGHEST_GROUP:
        raise msgspec.ValidationError(f"KV-cache group {group} is not from 0 to {HIGHEST_GROUP}")
    return group


def _owner(event: wire.Stored | wire.Removed) -> Owner:
    return _NOBODY if event.ownership is None and event.locality is None else Owner(event.ownership or "", event.locality or "")


_NOBODY = Owner()
