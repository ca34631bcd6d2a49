# SPDX-License-Identifier: Apache-2.0
"""The file in which a router keeps its index and its places in the publishers' streams, for a warm restart."""

from pathlib import Path

import msgspec

from tandem_protocol.durable import replace_file
from tandem_protocol.errors import ConfigError
from tandem_protocol.event_sequence_terms import Position

_FORMAT = 1


class Place(msgspec.Struct, frozen=True):
    """Where the index's content of one publisher ends."""

    worker_id: str
    endpoint: str
    dp_rank: int
    slot: int
    position: Position


class Snapshot(msgspec.Struct, frozen=True):
    """The index's own dump and the places that belong to it, taken at one moment."""

    index: bytes
    places: tuple[Place, ...]
    format: int = _FORMAT


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Replaces `path` whole, or not at all, and durably. Raises OSError."""
    replace_file(path, msgspec.msgpack.encode(snapshot))


def read_snapshot(path: Path) -> Snapshot:
    """Raises OSError if it can't be read, ConfigError if it isn't a snapshot of this format."""
    try:
        snapshot = msgspec.msgpack.decode(path.read_bytes(), type=Snapshot)
    except msgspec.DecodeError as exc:
        raise ConfigError(f"{path} is not a snapshot of the router's index ({exc}): remove it, the router starts without") from exc
    if snapshot.format != _FORMAT:
        raise ConfigError(f"{path} has format {snapshot.format}, this router writes {_FORMAT}: remove it, the router starts without")
    return snapshot
