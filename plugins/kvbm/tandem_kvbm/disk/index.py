# SPDX-License-Identifier: Apache-2.0
"""What lies in a folder, in memory: who is there, who is being written, read or removed, and who goes next. No I/O.

Thread-safe by one lock. All files have one size, so the quota is a number of blocks.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from tandem_kvbm.policies.eviction import ByPriority

_MOST_VICTIMS: Final = 8
"""Per write: a quota that shrank is reached step by step."""


class Claim(NamedTuple):
    """What a writer may do. The victims are out of the index: their files must be removed, and `settle` called, in any case."""

    granted: bool
    victims: tuple[bytes, ...] = ()


class Index:
    """Blocks by key, at most `capacity` with those being written."""

    def __init__(self, policy: str, capacity: int, full_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._blocks = ByPriority(policy)
        self.capacity, self._full_s, self._clock = capacity, full_s, clock
        self._writing: set[bytes] = set()
        self._leaving: set[bytes] = set()
        self._readers: Counter[bytes] = Counter()
        self._ceiling, self._ceiling_until = capacity, 0.0
        self._lock = threading.Lock()

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def put(self, key: bytes) -> bool:
        """The block was found in the folder; False if that was known, or it is on its way in or out."""
        with self._lock:
            if key in self._blocks or key in self._writing or key in self._leaving:
                return False
            self._blocks.add(key)
            return True

    def drop(self, key: bytes) -> bool:
        """The block is gone; False if that was known."""
        with self._lock:
            if key not in self._blocks:
                return False
            self._blocks.remove(key)
            return True

    def touch(self, keys: Iterable[bytes]) -> None:
        """They were of use."""
        with self._lock:
            for key in keys:
                self._blocks.touch(key)

    @contextmanager
    def reading(self, key: bytes) -> Iterator[None]:
        """Nobody gives the block up meanwhile."""
        with self._lock:
            self._readers[key] += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers[key] -= 1
                if not self._readers[key]:
                    del self._readers[key]

    def claim(self, key: bytes, priority: int, *, may_evict: bool = True) -> Claim:
        """Asks for a place; not granted if the block is there or on its way, or no place can be made."""
        with self._lock:
            if key in self._blocks or key in self._writing or key in self._leaving:
                return Claim(False)
            limit = self._limit()
            victims = self._evict(limit, priority) if may_evict else ()
            if self._used() >= limit:
                return Claim(False, victims)
            self._writing.add(key)
            return Claim(True, victims)

    def settle(self, key: bytes, claim: Claim, priority: int, *, stored: bool) -> None:
        """The end of a claim."""
        with self._lock:
            self._leaving.difference_update(claim.victims)
            if claim.granted:
                self._writing.discard(key)
            if stored:
                self._blocks.add(key, priority)

    def shrink(self) -> None:
        """The disk is full although the quota isn't: for a while, no more than there is now, less the block that didn't fit."""
        with self._lock:
            self._ceiling = max(0, self._used() - 1)
            self._ceiling_until = self._clock() + self._full_s

    def trim(self) -> list[bytes]:
        """Takes out all that is beyond the capacity, for a folder that was just listed."""
        with self._lock:
            gone: list[bytes] = []
            while len(self._blocks) > self.capacity and (victim := self._blocks.victim((), _ANY_PRIORITY)) is not None:
                self._blocks.remove(victim)
                gone.append(victim)
            return gone

    def snapshot(self) -> list[bytes]:
        """All that is there, in the order in which they came."""
        with self._lock:
            return list(self._blocks)

    def check_integrity(self) -> None:
        """No block is in two states, and the capacity is kept. Raises AssertionError."""
        with self._lock:
            self._blocks.check_integrity()
            if any(key in self._blocks for key in self._writing | self._leaving) or self._writing & self._leaving:
                raise AssertionError("a block is in two states")
            if self._used() > self.capacity:
                raise AssertionError("more blocks than the capacity")

    def _used(self) -> int:
        return len(self._blocks) + len(self._writing)

    def _limit(self) -> int:
        return min(self.capacity, self._ceiling) if self._clock() < self._ceiling_until else self.capacity

    def _evict(self, limit: int, priority: int) -> tuple[bytes, ...]:
        victims: list[bytes] = []
        while self._used() >= limit and len(victims) < _MOST_VICTIMS:
            victim = self._blocks.victim(self._readers, priority)
            if victim is None:
                break
            self._blocks.remove(victim)
            victims.append(victim)
        self._leaving.update(victims)
        return tuple(victims)


_ANY_PRIORITY: Final = 1 << 62
