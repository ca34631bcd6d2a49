# SPDX-License-Identifier: Apache-2.0
"""What is believed to be in the bucket, for how long: asking costs a round trip, and others write and remove there too.

Thread-safe. The oldest belief goes first when the bound is reached.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable


class Presence:
    """Key -> whether it is there, each for a time."""

    def __init__(self, entries: int, present_ttl_s: float, absent_ttl_s: float, clock: Callable[[], float]) -> None:
        self._entries, self._clock = entries, clock
        self._ttl_s = {True: present_ttl_s, False: absent_ttl_s}
        self._beliefs: OrderedDict[bytes, tuple[bool, float]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._beliefs)

    def get(self, key: bytes) -> bool | None:
        """None if nothing (or nothing fresh) is known."""
        with self._lock:
            belief = self._beliefs.get(key)
            if belief is None:
                return None
            there, until = belief
            if self._clock() >= until:
                del self._beliefs[key]
                return None
            return there

    def put(self, keys: Iterable[bytes], there: bool) -> None:
        """Seen just now."""
        until = self._clock() + self._ttl_s[there]
        with self._lock:
            for key in keys:
                self._beliefs.pop(key, None)
                self._beliefs[key] = (there, until)
            while len(self._beliefs) > self._entries:
                self._beliefs.popitem(last=False)

    def clear(self) -> None:
        """Nothing is known."""
        with self._lock:
            self._beliefs.clear()
