# SPDX-License-Identifier: Apache-2.0
"""Which blocks the world was told of, so that every removal follows its arrival, and nothing is announced twice."""

from collections import deque
from collections.abc import Iterable

from tandem_kvbm.store import BlockStore


class Announcements:
    """Any thread notes; the scheduler's thread takes. Switched off, it keeps nothing."""

    def __init__(self, store: BlockStore, enabled: bool) -> None:
        self._store, self._enabled = store, enabled
        self._told: set[bytes] = set()
        self._noted: deque[tuple[bytes, bool]] = deque()

    @property
    def waiting(self) -> bool:
        """Whether there is something to take."""
        return bool(self._noted)

    def note(self, keys: Iterable[bytes], there: bool) -> None:
        """Blocks came or went, as far as the caller knows."""
        if self._enabled:
            self._noted.extend((key, there) for key in keys)

    def take(self) -> tuple[list[bytes], list[bytes]]:
        """Blocks that came and that went since the last call.

        A thread may note a block's going after another has noted its coming back, so the store has the last word where it knows.
        Blocks of an earlier run are told when they are first read: only then does vLLM know their tokens.
        """
        noted: dict[bytes, bool] = {}
        while self._noted:
            key, there = self._noted.popleft()
            noted[key] = there
        now = {key: there if (held := self._store.holds(key)) is None else held for key, there in noted.items()}
        came = [key for key, there in now.items() if there and key not in self._told]
        went = [key for key, there in now.items() if not there and key in self._told]
        self._told.update(came)
        self._told.difference_update(went)
        return came, went
