# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV-cache events, from the wire into NumPy arrays and back.

A payload is msgpack: `[ts, events, dp_rank]`, each event a map (vLLM 0.32) or an array (older) with the tag `type`
(vllm/distributed/kv_events.py). Unknown fields are ignored, events of unknown types skipped and counted. The long lists
(token ids, block hashes) never become Python objects: msgspec hands them over raw and a compiled loop reads them.
"""

from collections.abc import Iterable
from enum import IntEnum
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tandem_protocol.blocks import extra_key
from tandem_protocol.errors import RequestError
from tandem_protocol.msgpack_integers import read_hashes, read_tokens
from tandem_protocol.msgpack_integers import warm_up as warm_up_integers

Hashes = NDArray[np.uint64]


class Tier(IntEnum):
    """Where a worker holds a block, best first; vLLM's `medium`."""

    GPU = 0
    CPU = 1
    STORAGE = 2


class BlockStored(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A worker now holds a run of blocks. All arrays are C-contiguous."""

    hashes: Hashes
    """The engine's own block hashes, [n]; of longer ones the low 64 bits."""
    parent: int | None = None
    """Engine's hash of the block before the first; None at the start of a sequence."""
    tokens: NDArray[np.uint32]
    """[n * block_size], or empty where the publisher doesn't know them (offload tiers)."""
    block_size: int
    lora_name: str = ""
    extra: Hashes | None = None
    """[n], keys of multimodal and other content beyond the tokens (`blocks.extra_key`), 0 for none."""
    group: int = 0
    """KV-cache group of a hybrid model."""
    spec_kind: str | None = None
    """vLLM's kind of that group (`full_attention`, `sliding_window`, ...); None from publishers that don't say."""
    tier: Tier = Tier.GPU


class BlockRemoved(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A worker no longer holds these blocks in a tier."""

    hashes: Hashes
    group: int | None = None
    """None: in every group."""
    tier: Tier = Tier.GPU


class AllBlocksCleared(msgspec.Struct, frozen=True):
    """The worker dropped its GPU prefix cache; what it holds in other tiers stays."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, frozen=True):
    """One decoded payload."""

    timestamp_s: float
    events: tuple[Event, ...]
    dp_rank: int | None = None
    unknown: int = 0
    """Events that were skipped because their type is unknown."""


def decode(payload: bytes | memoryview) -> EventBatch:
    """Decodes a payload; the result keeps no reference to it.

    Raises msgspec.DecodeError (or its ValidationError) for what isn't an event batch; a batch is decoded whole or not at all.
    """
    try:
        usual = _USUAL.decode(payload)
        return EventBatch(usual.ts, tuple(wire.event() for wire in usual.events), usual.data_parallel_rank)
    except msgspec.ValidationError:
        return _decode_one_by_one(payload)
    except (UnicodeDecodeError, RecursionError) as exc:  # what msgspec lets through for bad text and bottomless nesting
        raise msgspec.DecodeError(f"not an event batch: {exc}") from exc


def encode(events: Iterable[Event], timestamp_s: float = 0.0, dp_rank: int | None = None) -> bytes:
    """The payload that vLLM 0.32 would send. Extra keys are hashes here and can't be turned back: RequestError if there are any."""
    return msgspec.msgpack.encode([timestamp_s, [_to_map(event) for event in events], dp_rank])


def warm_up() -> None:
    """Compiles, or loads from the cache, all that decoding needs."""
    warm_up_integers()
    stored = BlockStored(hashes=np.ones(1, np.uint64), tokens=np.ones(16, np.uint32), block_size=16)
    decode(encode([stored, BlockRemoved(hashes=stored.hashes), AllBlocksCleared()]))


_TIERS: dict[str | None, Tier] = {None: Tier.GPU, **{tier.name: tier for tier in Tier}}


class _StoredMap(msgspec.Struct, tag="BlockStored"):
    block_hashes: msgspec.Raw
    parent_block_hash: int | bytes | None
    token_ids: msgspec.Raw
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None

    def event(self) -> BlockStored:
        hashes = read_hashes(self.block_hashes)
        lora_name = self.lora_name or ("" if self.lora_id is None else f"#{self.lora_id}")
        return BlockStored(
            hashes=hashes, parent=_low_bits(self.parent_block_hash), tokens=read_tokens(self.token_ids),
            block_size=self.block_size, lora_name=lora_name, extra=_extras(self.extra_keys, len(hashes), lora_name),
            group=self.group_idx or 0, spec_kind=self.kv_cache_spec_kind, tier=_tier(self.medium),
        )


class _RemovedMap(msgspec.Struct, tag="BlockRemoved"):
    block_hashes: msgspec.Raw
    medium: str | None = None
    group_idx: int | None = None

    def event(self) -> BlockRemoved:
        return BlockRemoved(hashes=read_hashes(self.block_hashes), group=self.group_idx, tier=_tier(self.medium))


class _ClearedMap(msgspec.Struct, tag="AllBlocksCleared"):
    def event(self) -> AllBlocksCleared:
        return AllBlocksCleared()


class _StoredArray(_StoredMap, array_like=True, tag="BlockStored"):
    pass


class _RemovedArray(_RemovedMap, array_like=True, tag="BlockRemoved"):
    pass


class _ClearedArray(_ClearedMap, array_like=True, tag="AllBlocksCleared"):
    pass


_Wire = _StoredMap | _RemovedMap | _ClearedMap


class _UsualBatch(msgspec.Struct, array_like=True):
    """All events are maps of known types: decoded in one pass."""

    ts: float
    events: list[_StoredMap | _RemovedMap | _ClearedMap]
    data_parallel_rank: int | None = None


class _AnyBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


class _Tag(msgspec.Struct):
    type: str


_USUAL = msgspec.msgpack.Decoder(_UsualBatch)
_ANY = msgspec.msgpack.Decoder(_AnyBatch)
_MAPS: msgspec.msgpack.Decoder[_Wire] = msgspec.msgpack.Decoder(_StoredMap | _RemovedMap | _ClearedMap)
_ARRAYS: msgspec.msgpack.Decoder[_Wire] = msgspec.msgpack.Decoder(_StoredArray | _RemovedArray | _ClearedArray)
_TYPES = frozenset({"BlockStored", "BlockRemoved", "AllBlocksCleared"})


def _decode_one_by_one(payload: bytes | memoryview) -> EventBatch:
    try:
        batch = _ANY.decode(payload)
        wires = [_decode_event(raw) for raw in batch.events]
    except (UnicodeDecodeError, RecursionError) as exc:
        raise msgspec.DecodeError(f"not an event batch: {exc}") from exc
    events = tuple(wire.event() for wire in wires if wire is not None)
    return EventBatch(batch.ts, events, batch.data_parallel_rank, len(wires) - len(events))


def _decode_event(raw: msgspec.Raw) -> _Wire | None:
    """None for a type that isn't known."""
    first = memoryview(raw)[0]
    is_array = 0x90 <= first <= 0x9F or first in (0xDC, 0xDD)
    try:
        return (_ARRAYS if is_array else _MAPS).decode(raw)
    except msgspec.ValidationError:
        if _type_of(raw, is_array) in _TYPES:
            raise
        return None


def _type_of(raw: msgspec.Raw, is_array: bool) -> str:
    if not is_array:
        return msgspec.msgpack.decode(raw, type=_Tag).type
    fields = msgspec.msgpack.decode(raw, type=list[Any])
    if not fields or not isinstance(fields[0], str):
        raise msgspec.ValidationError("an event array must begin with its type")
    return fields[0]


def _low_bits(value: int | bytes | None) -> int | None:
    """vLLM's own rule for hashes of bytes (`maybe_convert_block_hash`); signed integers become unsigned."""
    if value is None:
        return None
    return (int.from_bytes(value, "big") if isinstance(value, bytes) else value) & 0xFFFF_FFFF_FFFF_FFFF


def _tier(medium: str | None) -> Tier:
    tier = _TIERS.get(medium if medium is None else medium.upper())
    if tier is None:
        raise msgspec.ValidationError(f"medium {medium!r} is not one of GPU, CPU, STORAGE")
    return tier


def _extras(entries: list[Any] | None, blocks: int, lora_name: str) -> Hashes | None:
    if not entries or not any(entries):
        return None
    if len(entries) != blocks:
        raise msgspec.ValidationError(f"{len(entries)} extra_keys for {blocks} block hashes")
    try:
        keys = np.array([extra_key(entry, lora_name) for entry in entries], np.uint64)
    except RequestError as exc:
        raise msgspec.ValidationError(str(exc)) from exc
    return keys if keys.any() else None


def _to_map(event: Event) -> dict[str, Any]:
    if isinstance(event, AllBlocksCleared):
        return {"type": "AllBlocksCleared"}
    common = {"block_hashes": event.hashes.tolist(), "medium": event.tier.name, "group_idx": event.group}
    if isinstance(event, BlockRemoved):
        return {"type": "BlockRemoved", **common}
    if event.extra is not None:
        raise RequestError("extra keys can't be encoded: publish events without them")
    return {
        "type": "BlockStored", **common, "parent_block_hash": event.parent, "token_ids": event.tokens.tolist(),
        "block_size": event.block_size, "lora_id": None, "lora_name": event.lora_name or None, "kv_cache_spec_kind": event.spec_kind,
    }
