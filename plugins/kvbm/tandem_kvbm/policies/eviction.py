# SPDX-License-Identifier: Apache-2.0
"""What a full tier gives up first. Pure, not thread-safe: the store's lock guards it.

Least recently used is the baseline, and what prefixes ask for. TinyLFU keeps what is used often against a flood of prompts that never
come back, at the price of forgetting yesterday's favourites slowly. Either decides among blocks of one priority (`ByPriority`).
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator
from typing import Final

import numpy as np
import xxhash

from tandem_protocol.errors import ConfigError


class EvictionPolicy(ABC):
    """An order among blocks."""

    @abstractmethod
    def add(self, key: bytes) -> None:
        """The block came, and was of use just now. It must not be there."""

    @abstractmethod
    def remove(self, key: bytes) -> None:
        """The block went. Raises KeyError if it isn't there."""

    @abstractmethod
    def touch(self, key: bytes) -> None:
        """The block was of use. Raises KeyError if it isn't there."""

    @abstractmethod
    def victim(self, protected: Container[bytes]) -> bytes | None:
        """The block to give up for one that will be added next, not yet removed; None if all are protected."""

    @abstractmethod
    def __len__(self) -> int: ...


class LeastRecentlyUsed(EvictionPolicy):
    """The longest unused goes first."""

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def add(self, key: bytes) -> None:
        """At the end."""
        self._keys[key] = None

    def remove(self, key: bytes) -> None:
        """Wherever it is."""
        del self._keys[key]

    def touch(self, key: bytes) -> None:
        """To the end."""
        self._keys.move_to_end(key)

    def victim(self, protected: Container[bytes]) -> bytes | None:
        """Passes over the protected ones, which are few (blocks being read)."""
        return next((key for key in self._keys if key not in protected), None)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._keys)


class Sketch:
    """How often keys were seen, about: a count-min sketch of saturating counters that are halved now and then (TinyLFU, 2017)."""

    _ROWS: Final = 4
    _MOST: Final = 15
    _SAMPLE: Final = 10

    def __init__(self, width: int) -> None:
        """`width` is a power of two; beyond that many keys the counts blur."""
        self._mask = width - 1
        self._counts = np.zeros((self._ROWS, width), np.uint8)
        self._left = self._SAMPLE * width

    def add(self, key: bytes) -> None:
        """Counts; every 10 x width times all counts are halved."""
        for row, place in enumerate(self._places(key)):
            self._counts[row, place] = min(self._MOST, int(self._counts[row, place]) + 1)
        self._left -= 1
        if self._left == 0:
            self._counts >>= 1
            self._left = self._SAMPLE * (self._mask + 1)

    def count(self, key: bytes) -> int:
        """Never too low between two halvings, unless saturated; seldom too high."""
        return min(int(self._counts[row, place]) for row, place in enumerate(self._places(key)))

    def _places(self, key: bytes) -> list[int]:
        digest = xxhash.xxh3_128_intdigest(key)
        return [(digest >> (32 * row)) & self._mask for row in range(self._ROWS)]


class TinyLfu(EvictionPolicy):
    """New blocks enter a small window; at its end they stay only if they were seen more often than the main part's oldest."""

    _WINDOW: Final = 0.05
    """Share of the blocks; wider than caches of objects have it, since the blocks of one prompt come and are used together."""

    def __init__(self, width: int = 1 << 16) -> None:
        self._window, self._main = LeastRecentlyUsed(), LeastRecentlyUsed()
        self._sketch = Sketch(width)

    def add(self, key: bytes) -> None:
        """Into the window, whose oldest move on."""
        self._sketch.add(key)
        self._window.add(key)
        while len(self._window) > self._window_size():
            oldest = next(iter(self._window))
            self._window.remove(oldest)
            self._main.add(oldest)

    def remove(self, key: bytes) -> None:
        """From where it is."""
        self._part_of(key).remove(key)

    def touch(self, key: bytes) -> None:
        """Counts, and keeps it longer."""
        self._part_of(key).touch(key)
        self._sketch.add(key)

    def victim(self, protected: Container[bytes]) -> bytes | None:
        """Of the window's oldest and the main part's oldest, the one less often seen; the window's if equal."""
        newer, older = self._window.victim(protected), self._main.victim(protected)
        if newer is None or older is None or len(self._window) < self._window_size():
            return newer if older is None else older
        return older if self._sketch.count(newer) > self._sketch.count(older) else newer

    def __len__(self) -> int:
        return len(self._window) + len(self._main)

    def __contains__(self, key: bytes) -> bool:
        return key in self._window or key in self._main

    def _window_size(self) -> int:
        return max(1, int(len(self) * self._WINDOW))

    def _part_of(self, key: bytes) -> LeastRecentlyUsed:
        return self._window if key in self._window else self._main


POLICIES: Final[dict[str, Callable[[], EvictionPolicy]]] = {"lru": LeastRecentlyUsed, "tinylfu": TinyLfu}


class ByPriority:
    """Blocks of the lowest priority go first, within one priority as the policy says: KVBM's `(priority, tick)`."""

    def __init__(self, policy: str) -> None:
        """Raises ConfigError for a name that isn't in POLICIES."""
        if policy not in POLICIES:
            raise ConfigError(f"KV tier: no eviction policy {policy!r}; known are {', '.join(sorted(POLICIES))}")
        self._make = POLICIES[policy]
        self._classes: dict[int, EvictionPolicy] = {}
        self._priorities: dict[bytes, int] = {}

    def add(self, key: bytes, priority: int = 0) -> None:
        """The block must not be there."""
        if priority not in self._classes:
            self._classes[priority] = self._make()
        self._priorities[key] = priority
        self._classes[priority].add(key)

    def remove(self, key: bytes) -> None:
        """Raises KeyError if it isn't there."""
        self._classes[self._priorities.pop(key)].remove(key)

    def touch(self, key: bytes) -> None:
        """Nothing happens if it isn't there."""
        priority = self._priorities.get(key)
        if priority is not None:
            self._classes[priority].touch(key)

    def victim(self, protected: Container[bytes], priority: int) -> bytes | None:
        """The block to give up for one of `priority`; None if only blocks of more worth, or protected ones, are left."""
        for own in sorted(self._classes):
            if own > priority:
                return None
            victim = self._classes[own].victim(protected)
            if victim is not None:
                return victim
        return None

    def __len__(self) -> int:
        return len(self._priorities)

    def __contains__(self, key: bytes) -> bool:
        return key in self._priorities

    def __iter__(self) -> Iterator[bytes]:
        """In the order in which they came."""
        return iter(self._priorities)

    def check_integrity(self) -> None:
        """Every block has one place. Raises AssertionError."""
        if sum(len(policy) for policy in self._classes.values()) != len(self._priorities):
            raise AssertionError("blocks and their places differ in number")
