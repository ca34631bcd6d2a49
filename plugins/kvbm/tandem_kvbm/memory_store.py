# SPDX-License-Identifier: Apache-2.0
"""MemoryStore: blocks in this process's memory. The simplest thing that a tier can stand on: a baseline, and a double in tests."""

import threading
from collections.abc import Sequence

from tandem_kvbm.blob import CorruptBlockError, check_footer, make_footer
from tandem_kvbm.policies.eviction import ByPriority
from tandem_kvbm.store import BlockStore, MissingBlockError, StoreStats, Written


class MemoryStore(BlockStore):
    """At most `capacity` blocks of `block_bytes` each, lost at `close`."""

    def __init__(self, capacity: int, block_bytes: int, fingerprint: bytes = b"", policy: str = "lru") -> None:
        self._capacity, self._block_bytes, self._fingerprint = capacity, block_bytes, fingerprint
        self._order = ByPriority(policy)
        self._blocks: dict[bytes, tuple[bytes, bytes]] = {}
        self._lock = threading.Lock()

    def open(self) -> Sequence[bytes]:
        """Memory remembers nothing."""
        return ()

    def holds(self, key: bytes) -> bool | None:
        """Always certain."""
        return key in self._blocks

    def probe(self, keys: Sequence[bytes]) -> list[bool]:
        """The same."""
        return [key in self._blocks for key in keys]

    def read(self, key: bytes, into: memoryview) -> None:
        """Copies the block."""
        held = self._blocks.get(key)
        if held is None:
            raise MissingBlockError(key.hex())
        block, footer = held
        into[:] = block
        try:
            check_footer(footer, key, self._fingerprint, into)
        except CorruptBlockError:
            self._drop((key,))
            raise

    def write(self, key: bytes, block: memoryview, priority: int = 0) -> Written:
        """Copies the block."""
        held = bytes(block), make_footer(key, self._fingerprint, block)
        with self._lock:
            if key in self._blocks:
                return Written(stored=False)
            victim = self._order.victim((), priority) if len(self._blocks) >= self._capacity else None
            if victim is None and len(self._blocks) >= self._capacity:
                return Written(stored=False)
            if victim is not None:
                self._remove(victim)
            self._blocks[key] = held
            self._order.add(key, priority)
        return Written(stored=True, evicted=() if victim is None else (victim,))

    def touch(self, keys: Sequence[bytes]) -> None:
        """Keeps them longer."""
        with self._lock:
            for key in keys:
                self._order.touch(key)

    def clear(self) -> Sequence[bytes]:
        """Everything."""
        return self._drop(tuple(self._blocks))

    def stats(self) -> StoreStats:
        """Bytes of blocks."""
        return StoreStats(len(self._blocks), len(self._blocks) * self._block_bytes, self._capacity * self._block_bytes)

    def close(self) -> None:
        """Forgets all."""
        self._drop(tuple(self._blocks))

    def _drop(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        with self._lock:
            gone = [key for key in keys if key in self._blocks]
            for key in gone:
                self._remove(key)
        return gone

    def _remove(self, key: bytes) -> None:
        del self._blocks[key]
        self._order.remove(key)
