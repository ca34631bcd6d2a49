# SPDX-License-Identifier: Apache-2.0
"""vLLM's event batches, read so that they can be written again: what only passes through stays raw bytes.

Unlike `tandem_protocol.kv_events`, which decodes for an index, this keeps extra keys as they came and knows the owner of a tier.
A payload is msgpack `[ts, events, dp_rank]`, each event a map (vLLM 0.32) or an array (older) with its type in front.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tandem_protocol.kv_events import Tier
from tandem_protocol.msgpack_integers import read_hashes

NIL = b"\xc0"
_EMPTY_LIST = b"\x90"
_NO_EXTRAS = frozenset({NIL, _EMPTY_LIST, b"\x91" + NIL})
_LOW_BITS = 0xFFFF_FFFF_FFFF_FFFF
_TIERS: dict[str | None, Tier] = {None: Tier.GPU, **{tier.name: tier for tier in Tier}}


class Stored(msgspec.Struct, tag="BlockStored", gc=False):
    """`BlockStored`; as vLLM's, without the session. Fields that only pass through are raw. It has no cycles for `gc` to look for."""

    block_hashes: msgspec.Raw
    parent_block_hash: int | bytes | None
    token_ids: msgspec.Raw
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: msgspec.Raw = msgspec.Raw(NIL)
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None


class Removed(msgspec.Struct, tag="BlockRemoved", gc=False):
    """`BlockRemoved`."""

    block_hashes: msgspec.Raw
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class Cleared(msgspec.Struct, tag="AllBlocksCleared"):
    """`AllBlocksCleared`: the GPU tier of its publisher is empty."""


class _StoredArray(Stored, array_like=True, tag="BlockStored"):
    pass


class _RemovedArray(Removed, array_like=True, tag="BlockRemoved"):
    pass


class _ClearedArray(Cleared, array_like=True, tag="AllBlocksCleared"):
    pass


Event = Stored | Removed | Cleared


class Batch(msgspec.Struct, frozen=True):
    """One decoded payload."""

    timestamp_s: float
    events: list[Event]
    dp_rank: int | None
    unknown: int = 0
    """Events of types that nobody knows."""


class _UsualBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[Stored | Removed | Cleared]
    data_parallel_rank: int | None = None


class _RawBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


class _Tag(msgspec.Struct):
    type: str


_USUAL = msgspec.msgpack.Decoder(_UsualBatch)
_RAW = msgspec.msgpack.Decoder(_RawBatch)
_MAPS: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Stored | Removed | Cleared)
_ARRAYS: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(_StoredArray | _RemovedArray | _ClearedArray)
_ENCODER = msgspec.msgpack.Encoder()
_RAWS = msgspec.msgpack.Decoder(list[msgspec.Raw])
_KNOWN = frozenset({"BlockStored", "BlockRemoved", "AllBlocksCleared"})


def decode(payload: bytes) -> Batch:
    """Reads a batch; raw fields refer to `payload`. Raises msgspec.DecodeError for what isn't one."""
    try:
        usual = _USUAL.decode(payload)
        return Batch(usual.ts, list(usual.events), usual.data_parallel_rank)
    except msgspec.ValidationError:
        return _decode_one_by_one(payload)
    except (UnicodeDecodeError, RecursionError) as exc:
        raise msgspec.DecodeError(f"not an event batch: {exc}") from exc


def encode(timestamp_s: float, events: Sequence[Event], dp_rank: int | None) -> bytes:
    """A payload as vLLM 0.32 sends it."""
    return _ENCODER.encode([timestamp_s, events, dp_rank])


def hashes_of_many(raws: Sequence[msgspec.Raw]) -> NDArray[np.uint64]:
    """The hashes of several events one after the other: vLLM sends one event per evicted block, and reading each for itself costs."""
    return read_hashes(raws[0] if len(raws) == 1 else joined(raws)[0])


def joined(raws: Sequence[msgspec.Raw]) -> tuple[msgspec.Raw, list[int]]:
    """One array of several, and how many elements each had. Raises msgspec.ValidationError for what isn't an array."""
    parts = [bytes(raw) for raw in raws]
    size, count = _header(parts[0])
    head = parts[0][:size]
    if {part[:size] for part in parts} == {head}:  # usual, and several times as fast
        counts, bodies = [count] * len(parts), [part[size:] for part in parts]
    else:
        headers = [_header(part) for part in parts]
        counts, bodies = [count for _, count in headers], [part[size:] for part, (size, _) in zip(parts, headers, strict=True)]
    return msgspec.Raw(b"".join([b"\xdd", sum(counts).to_bytes(4, "big"), *bodies])), counts


def _header(part: bytes) -> tuple[int, int]:
    """Bytes of an array's header, and its elements."""
    if part[0] & 0xF0 == 0x90:
        return 1, part[0] & 0x0F
    if part[0] not in (0xDC, 0xDD):
        raise msgspec.ValidationError("expected an array of integers or byte strings")
    size = 3 if part[0] == 0xDC else 5
    return size, int.from_bytes(part[1:size], "big")


def raw_hashes(hashes: NDArray[np.uint64]) -> msgspec.Raw:
    """Block hashes as msgpack."""
    return _packed(hashes, 0xCF, ">u8")


def raw_tokens(tokens: NDArray[np.uint32]) -> msgspec.Raw:
    """Token ids as msgpack."""
    return _packed(tokens, 0xCE, ">u4") if len(tokens) else msgspec.Raw(_EMPTY_LIST)


def extras_of(raw: msgspec.Raw, blocks: int) -> list[bytes] | None:
    """Each block's own entry of `extra_keys`; None if no block has any. Raises msgspec.ValidationError if they don't fit the blocks."""
    if memoryview(raw)[0] == NIL[0]:
        return None
    entries = [bytes(entry) for entry in _RAWS.decode(raw)]
    if all(entry in (NIL, _EMPTY_LIST) for entry in entries):
        return None
    if len(entries) != blocks:
        raise msgspec.ValidationError(f"{len(entries)} extra_keys for {blocks} block hashes")
    return entries


def nothing_extra(events: Sequence[Stored]) -> bool:
    """Whether none of them has extra keys; of those with several blocks only one without the field is sure."""
    return {bytes(event.extra_keys) for event in events} <= _NO_EXTRAS


def raw_extras(entries: Sequence[bytes]) -> msgspec.Raw:
    """Inverse of `extras_of`."""
    return msgspec.Raw(_ENCODER.encode([msgspec.Raw(entry) for entry in entries]))


def is_integers(raw: msgspec.Raw) -> bool:
    """Whether a raw array of hashes begins with an integer, so that it can be passed on as it is."""
    view = memoryview(raw)
    at = 3 if view[0] == 0xDC else 5 if view[0] == 0xDD else 1
    return len(view) <= at or not 0xC4 <= view[at] <= 0xC6


def low_bits(value: int | bytes | None) -> int | None:
    """vLLM's own rule for hashes of bytes; signed integers become unsigned."""
    if value is None:
        return None
    return (int.from_bytes(value, "big") if isinstance(value, bytes) else value) & _LOW_BITS


def tier_of(medium: str | None) -> Tier:
    """Raises msgspec.ValidationError for a medium that vLLM doesn't have."""
    tier = _TIERS.get(medium if medium is None else medium.upper())
    if tier is None:
        raise msgspec.ValidationError(f"medium {medium!r} is not one of GPU, CPU, STORAGE")
    return tier


def _packed(values: NDArray[Any], tag: int, kind: str) -> msgspec.Raw:
    digits = values.astype(kind).view(np.uint8).reshape(len(values), -1)
    packed = np.empty((len(values), digits.shape[1] + 1), np.uint8)
    packed[:, 0], packed[:, 1:] = tag, digits
    return msgspec.Raw(b"\xdd" + len(values).to_bytes(4, "big") + packed.tobytes())


def _decode_one_by_one(payload: bytes) -> Batch:
    try:
        batch = _RAW.decode(payload)
        events = [_decode_event(raw) for raw in batch.events]
    except (UnicodeDecodeError, RecursionError) as exc:
        raise msgspec.DecodeError(f"not an event batch: {exc}") from exc
    known = [event for event in events if event is not None]
    return Batch(batch.ts, known, batch.data_parallel_rank, len(events) - len(known))


def _decode_event(raw: msgspec.Raw) -> Event | None:
    first = memoryview(raw)[0]
    is_array = 0x90 <= first <= 0x9F or first in (0xDC, 0xDD)
    try:
        return _as_map(_ARRAYS.decode(raw)) if is_array else _MAPS.decode(raw)
    except msgspec.ValidationError:
        if _type_of(raw, is_array) in _KNOWN:
            raise
        return None


def _as_map(event: Event) -> Event:
    """The event in the form that goes out."""
    kind = Stored if isinstance(event, Stored) else Removed if isinstance(event, Removed) else Cleared
    return kind(*msgspec.structs.astuple(event))


def _type_of(raw: msgspec.Raw, is_array: bool) -> str:
    if not is_array:
        return msgspec.msgpack.decode(raw, type=_Tag).type
    fields = msgspec.msgpack.decode(raw, type=list[Any])
    if not fields or not isinstance(fields[0], str):
        raise msgspec.ValidationError("an event array must begin with its type")
    return fields[0]
