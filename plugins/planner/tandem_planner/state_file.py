# SPDX-License-Identifier: Apache-2.0
"""What the planner has learned, kept in a file, so that a restart makes no jump. Replaced whole or not at all."""

from pathlib import Path

import msgspec

from tandem_protocol.durable import replace_file
from tandem_protocol.errors import ConfigError

_FORMAT = 1


class SavedState(msgspec.Struct, frozen=True):
    """Of one planner."""

    adjusted_at_s: float
    """Unix time of the last look at the traffic."""
    brain: bytes
    """What the brain says of itself; it alone reads it."""
    gpu_hours: float = 0.0
    """Of the fleet since the first start."""
    format: int = _FORMAT


def write_state(path: Path, state: SavedState) -> None:
    """Replaces the file. Raises OSError."""
    replace_file(path, msgspec.msgpack.encode(state))


def read_state(path: Path) -> SavedState | None:
    """None if there is none. Raises ConfigError for a file that isn't a state of this format."""
    try:
        state = msgspec.msgpack.decode(path.read_bytes(), type=SavedState)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, OSError) as exc:
        raise ConfigError(f"{path} is not a planner's state ({exc}): remove it, the planner starts without") from exc
    if state.format != _FORMAT:
        raise ConfigError(f"{path} has format {state.format}, this planner writes {_FORMAT}: remove it")
    return state
