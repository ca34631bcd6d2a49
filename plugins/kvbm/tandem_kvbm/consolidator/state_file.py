# SPDX-License-Identifier: Apache-2.0
"""What a consolidator keeps on disk, so that its restart costs consumers nothing that the engine's replay buffer has forgotten."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tandem_kvbm.consolidator.content import Adapter, Content, Kind, Unit
from tandem_kvbm.consolidator.lane_terms import Place
from tandem_kvbm.consolidator.table import BIRTHS, BLOCKS, FREE, STAMPS, WAITING, Table, reindex
from tandem_protocol.durable import replace_file
from tandem_protocol.errors import ConfigError
from tandem_protocol.event_sequence_terms import Position

_FORMAT = 1
_SIZES = (BLOCKS, FREE, BIRTHS, STAMPS, WAITING)
_SAVED = [name for name in Table._fields if name != "lookup"]


class SavedArray(msgspec.Struct, frozen=True):
    """One array of a table."""

    kind: str
    shape: tuple[int, ...]
    raw: bytes


class SavedLane(msgspec.Struct, frozen=True):
    """One rank."""

    arrays: dict[str, SavedArray]
    block_size: int
    units: list[Unit]
    kinds: dict[int, Kind]
    adapters: list[Adapter]
    extras: dict[int, bytes]
    places: list[Place]


class SavedState(msgspec.Struct, frozen=True):
    """All ranks, and where the publishers' streams were then."""

    lanes: dict[int, SavedLane]
    positions: dict[str, Position]
    """By name and endpoint of the publisher."""
    format: int = _FORMAT


def save_lane(content: Content, places: list[Place]) -> SavedLane:
    """A lane as it is written."""
    arrays = {name: _saved(getattr(content.table, name)) for name in _SAVED}
    return SavedLane(arrays, content.block_size, content.units, content.kinds, content.adapters, content.extras, places)


def load_lane(saved: SavedLane) -> Content:
    """Inverse of `save_lane`. Raises ConfigError for arrays that don't fit each other."""
    try:
        arrays: dict[str, Any] = {name: _loaded(saved.arrays[name]) for name in _SAVED}
        slots = len(arrays["hashes"])
        table = Table(lookup=np.zeros((1 << (2 * slots - 1).bit_length(), 2), np.uint64), **arrays)
    except (KeyError, ValueError, TypeError) as exc:
        raise ConfigError(f"the consolidator's state file is damaged ({exc}): remove it, the consolidator starts without") from exc
    if any(len(array) != slots for name, array in arrays.items() if name != "sizes") or len(table.sizes) != len(_SIZES):
        raise ConfigError("the consolidator's state file is damaged (its arrays don't fit each other): remove it")
    reindex(table)
    return Content(table, saved.block_size, saved.units, saved.kinds, saved.adapters, saved.extras)


def write_state(path: Path, lanes: Mapping[int, SavedLane], positions: Mapping[str, Position]) -> None:
    """Replaces `path` whole, or not at all, and durably. Raises OSError."""
    replace_file(path, msgspec.msgpack.encode(SavedState(dict(lanes), dict(positions))))


def read_state(path: Path) -> SavedState | None:
    """None if there is none. Raises ConfigError for a file that isn't a state of this format."""
    try:
        state = msgspec.msgpack.decode(path.read_bytes(), type=SavedState)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as exc:
        raise ConfigError(f"{path} is not a consolidator's state ({exc}): remove it, the consolidator starts without") from exc
    if state.format != _FORMAT:
        raise ConfigError(f"{path} has format {state.format}, this consolidator writes {_FORMAT}: remove it")
    return state


def _saved(array: NDArray[Any]) -> SavedArray:
    return SavedArray(array.dtype.str, array.shape, array.tobytes())


def _loaded(saved: SavedArray) -> NDArray[Any]:
    return np.frombuffer(saved.raw, np.dtype(saved.kind)).reshape(saved.shape).copy()
