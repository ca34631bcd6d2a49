# SPDX-License-Identifier: Apache-2.0
"""What a tier below host memory must do: keep blocks by key, or lose them honestly.

Every method blocks and is called by several transfer threads at once, never by the scheduler's: `tier.py` stands between.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


class MissingBlockError(Exception):
    """The store doesn't hold the block (any more)."""


class StoreUnavailableError(Exception):
    """The store did not answer within its deadline, or refused; the block may be there all the same.

    `evicted`: keys that were given up for a block which then could not be written.
    """

    def __init__(self, message: str, evicted: tuple[bytes, ...] = ()) -> None:
        super().__init__(message)
        self.evicted = evicted


@dataclass(frozen=True)
class StoreStats:
    """What a store holds now."""

    blocks: int
    size_bytes: int
    capacity_bytes: int | None
    """None: not bounded by us."""


@dataclass(frozen=True)
class Written:
    """What a write did."""

    stored: bool
    """False: it was there already, or nothing could be given up for it."""
    evicted: tuple[bytes, ...] = ()
    """Keys that the store gave up for it, or found gone meanwhile, in order."""


class BlockStore(ABC):
    """Blocks of one size, of one model and layout. The tier's own buffers are page-aligned; a store must take any others, too.

    Resource handling: `open` before anything else, `close` once; whoever made the store closes it.
    Error handling: `read` raises MissingBlockError, blob.CorruptBlockError (the store has removed the block by then) or
    StoreUnavailableError; what lies in `into` after an error is undefined. `write` raises StoreUnavailableError; a full store is no
    error. Retries, with their deadline, are the store's own.
    """

    @abstractmethod
    def open(self) -> Sequence[bytes]:
        """Makes the store ready; returns the keys that it holds from an earlier run where it knows them, oldest first.

        Raises ConfigError with the fix if the store can't work at all (no such folder, no such bucket, no permission).
        """

    @abstractmethod
    def holds(self, key: bytes) -> bool | None:
        """At once and without I/O: whether the block is there; None if only `probe` can tell. Callable from any thread."""

    def ready(self) -> bool:
        """At once: False while the store is left alone after errors, when lookups miss and stores are dropped without asking it."""
        return True

    @abstractmethod
    def probe(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each block is there, asking the store itself. Raises StoreUnavailableError."""

    @abstractmethod
    def read(self, key: bytes, into: memoryview) -> None:
        """Fills `into` (C-contiguous, of block size) with the block, verified."""

    @abstractmethod
    def write(self, key: bytes, block: memoryview, priority: int = 0) -> Written:
        """Stores the block so that it is there whole or not at all, whatever happens meanwhile.

        Blocks of lower priority are given up first; a store that gives nothing up ignores it.
        """

    @abstractmethod
    def touch(self, keys: Sequence[bytes]) -> None:
        """The blocks were of use: they are given up later. At once, without I/O; keys that aren't there are ignored."""

    @abstractmethod
    def clear(self) -> Sequence[bytes]:
        """Gives up everything of this model and layout that this store may remove; returns the keys."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """At once, without I/O."""

    @abstractmethod
    def close(self) -> None:
        """Ends what the store runs; a second call does nothing."""
