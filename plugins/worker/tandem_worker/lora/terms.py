# SPDX-License-Identifier: Apache-2.0
"""What a worker's adapters need of others, their bounds, and what they answer."""

from dataclasses import dataclass
from typing import Protocol

from tandem_worker.lora.adapter import Adapter
from tandem_worker.lora.deadline import Deadline
from tandem_worker.lora.source import Source
from tandem_worker.lora.store import Copy


class LoraEngine(Protocol):
    """What is needed of an engine."""

    @property
    def takes_loras(self) -> bool:
        """Whether it was started for adapters."""

    async def add(self, adapter: Adapter) -> None:
        """Loads, or finds loaded. Raises RequestError for an adapter that it refuses; some of it may be left then: `remove` it."""

    async def remove(self, adapter: Adapter) -> None:
        """Unloads; nothing if it isn't loaded. Raises UnavailableError if the engine doesn't answer."""


class CopySource(Protocol):
    """What makes copies: `fetch.Fetcher`."""

    def fetch(self, source: Source, deadline: Deadline) -> Copy:
        """Blocks. Raises RequestError or UnavailableError."""

    def release(self, copy: Copy) -> None:
        """Gives a copy back."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one worker's adapters."""

    enabled: bool
    """Whether they may change at run time."""
    load_timeout_s: float
    unload_timeout_s: float
    """How long an unload waits for the requests that use the adapter."""
    most: int


@dataclass(frozen=True)
class Loaded:
    """The answer to a load."""

    adapter: Adapter
    fresh: bool
    """False if it was there already."""
