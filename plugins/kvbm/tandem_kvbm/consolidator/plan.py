# SPDX-License-Identifier: Apache-2.0
"""What a consolidator is to do: the words that settings, pump and lanes share.

Imports nothing heavy, so that the launcher can read the settings without compiling anything.
"""

from dataclasses import dataclass, field
from pathlib import Path

from tandem_protocol.event_sequence_terms import Limits

ALL_RANKS = -1
"""The rank of a publisher whose blocks every rank can use."""


@dataclass(frozen=True)
class Publisher:
    """A stream to follow."""

    name: str
    endpoint: str
    replay_endpoint: str
    rank: int
    """Whose blocks it tells of; ALL_RANKS for tiers that all ranks share."""

    @property
    def key(self) -> str:
        """What it is known by in the state file: another endpoint is another publisher."""
        return f"{self.name} {self.endpoint}"


@dataclass(frozen=True)
class LaneLimits:
    """Bounds of one lane."""

    max_blocks: int = 1 << 22
    max_orphans: int = 1 << 16
    orphan_s: float = 30.0


@dataclass(frozen=True)
class Plan:
    """What a consolidator does."""

    publishers: tuple[Publisher, ...]
    endpoint: str
    """To bind."""
    replay_endpoint: str
    buffer_steps: int = 10_000
    lane: LaneLimits = field(default_factory=LaneLimits)
    sequence: Limits = field(default_factory=Limits)
    state: Path | None = None
    save_s: float = 30.0
    """Between two writes of the state, if anything changed."""
