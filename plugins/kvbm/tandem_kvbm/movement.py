# SPDX-License-Identifier: Apache-2.0
"""One block between a row of the primary tier and a store, on a transfer thread; every way in which that can end, counted."""

from tandem_kvbm.announcements import Announcements
from tandem_kvbm.blob import CorruptBlockError
from tandem_kvbm.counters import TierCounters
from tandem_kvbm.store import BlockStore, MissingBlockError, StoreUnavailableError
from tandem_kvbm.transfers import Copy, Transfer


class Mover:
    """`rows` is the primary tier as flat bytes. Thread-safe as far as the store is."""

    def __init__(self, store: BlockStore, rows: memoryview, counters: TierCounters, announcements: Announcements) -> None:
        self._store, self._rows, self._counters, self._announcements = store, rows, counters, announcements

    def move(self, transfer: Transfer, buffer: memoryview, copy: Copy) -> bool:
        """Moves the block through `buffer`; True if it arrived."""
        row = self._rows[transfer.slot * buffer.nbytes : (transfer.slot + 1) * buffer.nbytes]
        return self._load(transfer, row, buffer, copy) if transfer.job.is_load else self._save(transfer, row, buffer, copy)

    def _load(self, transfer: Transfer, row: memoryview, buffer: memoryview, copy: Copy) -> bool:
        try:
            self._store.read(transfer.key, buffer)
        except (MissingBlockError, CorruptBlockError) as exc:
            self._counters.add("missing" if isinstance(exc, MissingBlockError) else "corrupt")
            self._announcements.note((transfer.key,), there=False)
            return False
        except StoreUnavailableError:
            self._counters.add("read_failures")
            return False
        if not copy(transfer.job, row, buffer):
            return False
        self._counters.add("loaded")
        self._counters.add("read_bytes", buffer.nbytes)
        self._announcements.note((transfer.key,), there=True)
        return True

    def _save(self, transfer: Transfer, row: memoryview, buffer: memoryview, copy: Copy) -> bool:
        if not copy(transfer.job, buffer, row):
            return False
        try:
            written = self._store.write(transfer.key, buffer, transfer.job.priority)
        except StoreUnavailableError as exc:
            self._counters.add("write_failures")
            self._gave_up(exc.evicted)
            return False
        self._gave_up(written.evicted)
        if not written.stored:
            self._counters.add("dropped", not self._store.holds(transfer.key))
            return False
        self._counters.add("stored")
        self._counters.add("written_bytes", buffer.nbytes)
        self._announcements.note((transfer.key,), there=True)
        return True

    def _gave_up(self, keys: tuple[bytes, ...]) -> None:
        self._counters.add("evicted", len(keys))
        self._announcements.note(keys, there=False)
