# SPDX-License-Identifier: Apache-2.0
"""This worker's share of the bucket: what it wrote, what it must remove, and the note of it that survives a restart.

Removals that fail are tried again with the next ones; while too many are owed, nothing is written. Thread-safe.
"""

import threading
from collections.abc import Iterable, Sequence

from tandem_kvbm.blob import CorruptBlockError
from tandem_kvbm.objects.bucket import Bucket
from tandem_kvbm.objects.config import ObjectConfig
from tandem_kvbm.objects.counters import Count, Counters
from tandem_kvbm.objects.deadline import Deadline
from tandem_kvbm.objects.ledger import Ledger
from tandem_kvbm.objects.names import Names
from tandem_kvbm.store import MissingBlockError

_SAVE_EVERY = 256
"""Writes between two saves of the ledger: what a killed worker forgets at most, and then nobody evicts."""
_OWED_MOST = 4096
_DOUBTED_MOST = 256
_DEADLINE_S = 10.0
_LIST_PAGES = 100
"""At open: enough for 100,000 blocks; of those beyond it is unknown whether they are still there."""


class Quota:
    """What this worker wrote. Without a bound it only keeps what is owed."""

    def __init__(self, config: ObjectConfig, names: Names, bucket: Bucket, counters: Counters) -> None:
        self._names, self._bucket, self._counters = names, bucket, counters
        self._object = names.ledger_of(config.worker_id)
        self._ledger = Ledger(config.num_blocks) if config.num_blocks else None
        self._owed: dict[bytes, None] = {}
        self._doubted: dict[bytes, None] = {}
        """Writes that failed: each may have arrived all the same, and then nobody would own it."""
        self._unsaved = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._ledger) if self._ledger is not None else 0

    @property
    def bounded(self) -> bool:
        """Whether there is a quota."""
        return self._ledger is not None

    def takes(self, priority: int) -> bool:
        """Whether a write makes sense: not while S3 takes no removals, and not if only blocks of more worth could be given up for it."""
        with self._lock:
            return len(self._owed) < _OWED_MOST and (self._ledger is None or self._ledger.takes(priority))

    def keys(self) -> list[bytes]:
        """What this worker wrote, in the order in which it is given up."""
        with self._lock:
            return self._ledger.keys() if self._ledger is not None else []

    def note(self, key: bytes, priority: int) -> list[bytes]:
        """A block was written; returns what is given up for it. `settle` removes that."""
        with self._lock:
            self._owed.pop(key, None)
            self._doubted.pop(key, None)
            self._unsaved += 1
            victims = self._ledger.add(key, priority) if self._ledger is not None else []
            self._owed.update(dict.fromkeys(victims))
        self._counters.add(Count.EVICTED, len(victims))
        return victims

    def touch(self, keys: Iterable[bytes]) -> None:
        """These were of use."""
        with self._lock:
            if self._ledger is not None:
                self._ledger.touch(keys)

    def forget(self, keys: Iterable[bytes]) -> None:
        """These are gone."""
        with self._lock:
            if self._ledger is not None:
                self._ledger.discard(keys)

    def give_up(self, keys: Sequence[bytes]) -> None:
        """Owes the removal of these to the next `settle`; beyond the bound they are left to the bucket's lifecycle rule, and counted."""
        with self._lock:
            room = _OWED_MOST - len(self._owed)
            self._owed.update(dict.fromkeys(keys[: max(0, room)]))
        if len(keys) > room:
            self._counters.add(Count.DELETE_FAILURES, len(keys) - room)

    def doubt(self, key: bytes) -> None:
        """A write failed: the next `settle` finds out whether it arrived. Beyond the bound the lifecycle rule must, and it's counted."""
        with self._lock:
            if self._ledger is None or key in self._ledger:
                return
            kept = len(self._doubted) < _DOUBTED_MOST
            if kept:
                self._doubted[key] = None
        self._counters.add(Count.DELETE_FAILURES, not kept)

    def settle(self) -> None:
        """Removes what is owed, and saves the ledger if enough was written since. Raises StoreUnavailableError."""
        self._clear_doubts()
        with self._lock:
            owed, self._owed = list(self._owed), {}
        try:
            refused = self.delete(owed, self._bucket.deadline(_DEADLINE_S))
        except BaseException:
            self.give_up(owed)
            raise
        self.give_up(refused)
        if self._unsaved >= _SAVE_EVERY:
            self.save()

    def _clear_doubts(self) -> None:
        """Owes the removal of what arrived. What another worker has written under the name is its own."""
        deadline = self._bucket.deadline(_DEADLINE_S)
        for key in list(self._doubted):
            arrived = self._bucket.is_own(self._names.name_of(key), deadline)
            with self._lock:
                if key in self._doubted:
                    del self._doubted[key]
                    self._owed.update(dict.fromkeys([key] if arrived else []))

    def delete(self, keys: Sequence[bytes], deadline: Deadline) -> list[bytes]:
        """Removes now; returns what the bucket refused to remove."""
        by_name = {self._names.name_of(key): key for key in keys}
        refused = self._bucket.delete(list(by_name), deadline) if by_name else []
        if refused:
            self._counters.add(Count.DELETE_FAILURES, len(refused))
        return [by_name[name] for name in refused]

    def save(self) -> None:
        """Writes the ledger to the bucket. Raises StoreUnavailableError."""
        with self._lock:
            saved = self._ledger.dump() if self._ledger is not None and self._unsaved else b""
            unsaved, self._unsaved = self._unsaved, 0
        if not saved:
            return
        try:
            self._bucket.put(self._object, saved, self._bucket.deadline(_DEADLINE_S), only_new=False)
        except BaseException:
            self._unsaved += unsaved
            raise

    def load(self) -> list[bytes]:
        """Takes over the ledger of an earlier run; returns what of it is still there, oldest first. Raises StoreUnavailableError."""
        if self._ledger is None:
            return []
        deadline = self._bucket.deadline(_DEADLINE_S)
        try:
            saved = self._bucket.get_all(self._object, deadline)
        except MissingBlockError:
            return []
        try:
            with self._lock:
                self._ledger.load(saved)
        except CorruptBlockError:
            self._counters.add(Count.LEDGER_FAILURES)
            return []
        self.forget(self._gone(deadline))
        return self.keys()

    def _gone(self, deadline: Deadline) -> list[bytes]:
        """Blocks of the ledger that a complete listing doesn't show."""
        there: set[str] = set()
        pages = 0
        for page in self._bucket.names(self._names.root, _LIST_PAGES, deadline):
            there.update(page)
            pages += 1
        return [key for key in self.keys() if self._names.name_of(key) not in there] if pages < _LIST_PAGES else []
