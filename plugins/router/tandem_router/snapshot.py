# SPDX-License-Identifier: Apache-2.0
"""The index as bytes, so that a restarted router is warm: a NumPy archive of what each slot holds. No pickle."""

import io
import zipfile
from collections.abc import Iterable

import msgspec
import numpy as np
from numpy.typing import NDArray

from tandem_protocol.errors import ConfigError
from tandem_protocol.kv_events import Tier
from tandem_router.members import MAX_SLOTS, Member

_VERSION = 1


class _Slot(msgspec.Struct, frozen=True):
    slot: int
    name: str
    dp_rank: int
    block_size: int
    seen: list[int]
    full: int
    partial: int
    required: list[int]
    learned: list[tuple[int, str | None, int]]


class _Header(msgspec.Struct, frozen=True):
    version: int
    slots: list[_Slot]


def pack(members: Iterable[Member]) -> bytes:
    """All members, 24 bytes per block that one holds."""
    arrays, slots = {}, []
    for m in members:
        learned = [(group, kind, int(tier)) for group, kind, tier in m.learned]
        slots.append(_Slot(m.slot, m.name, m.dp_rank, m.block_size, m.seen, m.full, m.partial, m.required, learned))
        arrays[f"rows{m.slot}"] = m.rows[m.rows[:, 1] != 0]
    arrays["header"] = np.frombuffer(msgspec.json.encode(_Header(_VERSION, slots)), np.uint8)
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def unpack(raw: bytes) -> list[tuple[Member, list[int]]]:
    """Members that aren't in any index yet, each with the groups it requires by tier. Raises ConfigError for what is no snapshot."""
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as archive:
            header = msgspec.json.decode(archive["header"].tobytes(), type=_Header)
            if header.version != _VERSION:
                raise ConfigError(f"the index snapshot has version {header.version}, this router reads {_VERSION}: delete it")
            return [(_member(slot, archive[f"rows{slot.slot}"]), slot.required) for slot in header.slots]
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile, msgspec.MsgspecError) as exc:
        raise ConfigError(f"not a snapshot of the KV index ({exc}): delete it, the index fills from events") from exc


def _member(slot: _Slot, rows: NDArray[np.uint64]) -> Member:
    shapes_fit = rows.dtype == np.uint64 and rows.ndim == 2 and rows.shape[1] == 3 and len(slot.required) == len(slot.seen) == 3
    if not shapes_fit or not 0 <= slot.slot < MAX_SLOTS:
        raise ValueError("an array has another shape")
    member = Member(slot.slot, slot.name, slot.dp_rank, slot.block_size, seen=slot.seen, full=slot.full, partial=slot.partial)
    member.learned = {(group, kind, Tier(tier)) for group, kind, tier in slot.learned}
    member.fill(np.ascontiguousarray(rows))
    return member
