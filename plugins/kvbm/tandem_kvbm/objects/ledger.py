# SPDX-License-Identifier: Apache-2.0
"""What this worker wrote, in the order of giving it up, and how much must go to stay within its quota. Pure, not thread-safe.

The bucket is shared, so nobody can tell from a listing who wrote what: each worker keeps its own ledger, and saves it as an object.
"""

from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice

import msgspec

from tandem_kvbm.blob import CorruptBlockError

_VERSION = 1
_BATCH_SHARE = 32
_MOST_AT_ONCE = 1000
"""S3's bound of one DeleteObjects."""


class _Saved(msgspec.Struct, frozen=True, array_like=True):
    version: int
    keys: tuple[tuple[bytes, int], ...]
    """With priority; oldest use first."""


class Ledger:
    """Keys with a priority: the lowest priority goes first, and within it the oldest use."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError("a ledger holds at least one block")
        self.capacity = capacity
        self._batch = min(max(1, capacity // _BATCH_SHARE), _MOST_AT_ONCE)
        self._priority: dict[bytes, int] = {}
        self._levels: dict[int, OrderedDict[bytes, None]] = {}

    def __len__(self) -> int:
        return len(self._priority)

    def __contains__(self, key: bytes) -> bool:
        return key in self._priority

    def keys(self) -> list[bytes]:
        """In the order in which they are given up."""
        return [key for level in sorted(self._levels) for key in self._levels[level]]

    def takes(self, priority: int) -> bool:
        """Whether there is room, or something of no more worth to give up."""
        return len(self._priority) < self.capacity or min(self._levels) <= priority

    def add(self, key: bytes, priority: int = 0) -> list[bytes]:
        """Notes a write; returns what must go. Several at once, so that one request to S3 removes many; never the block itself."""
        self.discard((key,))
        surplus = len(self._priority) + 1 - self.capacity
        victims = self._victims(surplus, priority) if surplus > 0 else []
        self.discard(victims)
        self._priority[key] = priority
        self._levels.setdefault(priority, OrderedDict())[key] = None
        return victims

    def touch(self, keys: Iterable[bytes]) -> None:
        """These were of use: they go last within their priority."""
        for key in keys:
            if key in self._priority:
                self._levels[self._priority[key]].move_to_end(key)

    def discard(self, keys: Iterable[bytes]) -> None:
        """These are gone."""
        for key in keys:
            priority = self._priority.pop(key, None)
            if priority is not None:
                del self._levels[priority][key]
                if not self._levels[priority]:
                    del self._levels[priority]

    def dump(self) -> bytes:
        """For `load`."""
        return msgspec.msgpack.encode(_Saved(_VERSION, tuple((key, self._priority[key]) for key in self.keys())))

    def load(self, saved: bytes) -> None:
        """Fills an empty ledger with what an earlier run noted. Raises CorruptBlockError."""
        try:
            old = msgspec.msgpack.decode(saved, type=_Saved)
        except msgspec.MsgspecError as exc:
            raise CorruptBlockError(f"ledger: {exc}") from exc
        if old.version != _VERSION:
            raise CorruptBlockError(f"ledger of version {old.version}, expected {_VERSION}")
        for key, priority in old.keys:
            self._priority[key] = priority
            self._levels.setdefault(priority, OrderedDict())[key] = None

    def check_integrity(self) -> None:
        """Raises AssertionError if the levels and the priorities tell different stories."""
        listed = {key: priority for priority, level in self._levels.items() for key in level}
        assert listed == self._priority, "ledger: levels and priorities differ"
        assert all(self._levels.values()), "ledger: an empty level was kept"

    def _victims(self, surplus: int, priority: int) -> list[bytes]:
        """At least the surplus; what goes along with it is of no more worth than the new block."""
        victims: list[bytes] = []
        for level in sorted(self._levels):
            wanted = surplus + self._batch - 1 if level <= priority else surplus
            victims.extend(islice(self._levels[level], max(0, wanted - len(victims))))
        return victims
