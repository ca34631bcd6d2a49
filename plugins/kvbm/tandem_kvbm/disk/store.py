# SPDX-License-Identifier: Apache-2.0
"""DiskStore: blocks in files of one folder, within a quota, found again after a restart.

The index in memory answers lookups. A shared folder has other writers, whose files are found by asking the file system and by listing
the folder now and then; there one engine, the holder of the lock, evicts for all.
"""

import errno
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from tandem_kvbm.blob import CorruptBlockError, check_footer, make_footer
from tandem_kvbm.breaker import Breaker
from tandem_kvbm.disk.files import BlockFiles
from tandem_kvbm.disk.index import Index
from tandem_kvbm.disk.options import DiskOptions
from tandem_kvbm.disk.seat import ROOT, Seat, take_seat
from tandem_kvbm.disk.sweep import sweep
from tandem_kvbm.layout import Layout
from tandem_kvbm.store import BlockStore, MissingBlockError, StoreStats, StoreUnavailableError, Written
from tandem_protocol.errors import ConfigError

log = logging.getLogger(__name__)
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class DiskStore(BlockStore):
    """One engine's folder, or one that engines share. Error handling: nothing is tried twice; errors in a row rest the disk."""

    def __init__(self, options: DiskOptions, layout: Layout, *, first_seat: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._options, self._layout, self._first_seat, self._clock = options, layout, first_seat, clock
        self._fingerprint = layout.fingerprint
        self._reads = Breaker(options.failures, options.backoff_s, options.backoff_max_s, clock)
        self._writes = Breaker(options.failures, options.backoff_s, options.backoff_max_s, clock)
        self._listing = threading.Lock()
        self._listed_s = 0.0
        self._seat: Seat
        self._files: BlockFiles
        self._index: Index

    def open(self) -> Sequence[bytes]:
        """Takes a seat and lists it: some seconds for a million blocks."""
        options = self._options
        self._seat = take_seat(options.folder, self._layout, shared=options.shared, first=self._first_seat)
        if options.forget_s:
            sweep(Path(options.folder) / ROOT, options.forget_s, time.time())
        try:
            return self._take_over()
        except OSError as exc:
            self._seat.leave()
            where = self._seat.folder
            raise ConfigError(f"disk tier: can't use {where}: {exc.strerror}; set DYN_KVBM_DISK_CACHE_DIR to another folder") from exc
        except ConfigError:
            self._seat.leave()
            raise

    def _take_over(self) -> Sequence[bytes]:
        options = self._options
        self._files = BlockFiles(self._seat.folder, self._layout.block_bytes, direct_io=options.direct_io, fdatasync=options.fdatasync)
        capacity = options.quota_bytes // self._files.file_bytes
        if capacity < 1:
            raise ConfigError(f"disk tier: a quota of {options.quota_bytes} bytes is less than one block of {self._files.file_bytes} bytes")
        self._index = Index(options.policy, capacity, options.full_s, self._clock)
        leftovers = self._files.remove_leftovers() if self._seat.is_owner else 0
        for found in sorted(self._files.scan()):
            self._index.put(found.key)
        removed = self._index.trim() if self._seat.is_owner else []
        self._remove(removed)
        self._listed_s = self._clock()
        log.info("kvbm.disk_open folder=%s blocks=%d capacity=%d leftovers=%d over_quota=%d direct_io=%s", self._seat.folder,
                 len(self._index), capacity, leftovers, len(removed), self._files.direct_io)
        return self._index.snapshot()

    def holds(self, key: bytes) -> bool | None:
        """In a shared folder only a yes is certain, and even that until somebody evicts it."""
        if key in self._index:
            return True
        return None if self._options.shared else False

    def ready(self) -> bool:
        """What can't be read needn't be written either."""
        return not self._reads.is_shut_off()

    def probe(self, keys: Sequence[bytes]) -> list[bool]:
        """Asks the file system, which answers from its cache as a rule."""
        if not self._reads.admit():
            raise StoreUnavailableError("the disk failed and is left alone for a while")
        try:
            found = [key in self._index or self._files.exists(key) for key in keys]
        except OSError as exc:
            raise self._failed(self._reads, exc) from exc
        self._reads.succeeded()
        for key, there in zip(keys, found, strict=True):
            if there:
                self._index.put(key)
        return found

    def read(self, key: bytes, into: memoryview) -> None:
        """One file, straight into the caller's memory where that is aligned."""
        if not self._reads.admit():
            raise StoreUnavailableError("the disk failed and is left alone for a while")
        try:
            with self._index.reading(key):
                footer = self._files.read(key, into)
            check_footer(footer, key, self._fingerprint, into)
        except CorruptBlockError:
            self._reads.succeeded()
            self._forget(key)
            raise
        except FileNotFoundError as exc:
            raise self._missing(key, exc) from exc
        except OSError as exc:
            raise self._failed(self._reads, exc) from exc
        self._reads.succeeded()

    def write(self, key: bytes, block: memoryview, priority: int = 0) -> Written:
        """Gives up what it must first, so that the quota is never exceeded."""
        gone = self._list_again() if self._options.shared else ()
        if key in self._index or (self._options.shared and self._is_written_by_others(key)):
            return Written(False, gone)
        if not self._writes.admit():
            raise StoreUnavailableError("the disk failed and is left alone for a while", gone)
        claim = self._index.claim(key, priority, may_evict=self._seat.is_owner)
        stored = False
        try:
            self._remove(claim.victims)
            if claim.granted:
                self._files.write(key, block, make_footer(key, self._fingerprint, block))
                stored = True
        except OSError as exc:
            raise self._not_written(exc, gone + claim.victims) from exc
        finally:
            self._index.settle(key, claim, priority, stored=stored)
        self._writes.succeeded()
        return Written(stored, gone + claim.victims)

    def touch(self, keys: Sequence[bytes]) -> None:
        """In memory; the files learn of it when they are read."""
        self._index.touch(keys)

    def clear(self) -> Sequence[bytes]:
        """Everything in the folder, if it is ours to evict in; else nothing."""
        if not self._seat.is_owner:
            return ()
        keys = [key for key in self._index.snapshot() if self._index.drop(key)]
        self._remove(keys)
        return keys

    def stats(self) -> StoreStats:
        """Bytes of the files."""
        size = self._files.file_bytes
        return StoreStats(len(self._index), len(self._index) * size, self._index.capacity * size)

    def close(self) -> None:
        """Gives up the seat; the blocks stay."""
        self._seat.leave()

    def check_integrity(self) -> None:
        """Raises AssertionError."""
        self._index.check_integrity()

    def _forget(self, key: bytes) -> None:
        self._index.drop(key)
        self._remove((key,))

    def _remove(self, keys: Sequence[bytes]) -> None:
        """A file that can't be removed is found again at the next start, and evicted then; the disk's state is the breaker's matter."""
        for key in keys:
            with suppress(OSError):
                self._files.remove(key)

    def _missing(self, key: bytes, exc: FileNotFoundError) -> Exception:
        """No file: the block is gone, or the whole disk is."""
        if not self._seat.is_there():
            return self._failed(self._reads, exc)
        self._reads.succeeded()
        self._index.drop(key)
        return MissingBlockError(key.hex())

    def _not_written(self, exc: OSError, evicted: tuple[bytes, ...]) -> StoreUnavailableError:
        """A full disk is no broken one: the tier makes do with what fits."""
        if exc.errno in _FULL:
            self._writes.succeeded()
            self._index.shrink()
            return StoreUnavailableError(f"the disk is full before its quota: {exc}", evicted)
        if exc.errno == errno.ENOENT and self._seat.is_there():
            with suppress(OSError):  # somebody emptied the folder; the next write tells
                self._files.make_folders()
        return self._failed(self._writes, exc, evicted)

    def _failed(self, breaker: Breaker, exc: OSError, evicted: tuple[bytes, ...] = ()) -> StoreUnavailableError:
        breaker.failed()
        if breaker.is_shut_off():
            log.warning("kvbm.disk_failed folder=%s opened=%d error=%s", self._seat.folder, breaker.opened, exc)
        return StoreUnavailableError(f"disk: {exc}", evicted)

    def _is_written_by_others(self, key: bytes) -> bool:
        with suppress(OSError):
            if self._files.exists(key):
                self._index.put(key)
                return True
        return False

    def _list_again(self) -> tuple[bytes, ...]:
        """Learns what others did, when it is time; one thread does it, the others go on. Returns what is gone."""
        if self._clock() - self._listed_s < self._options.rescan_s or not self._listing.acquire(blocking=False):
            return ()
        try:
            self._seat.try_to_own()
            found = sorted(self._files.scan())
            there = {file.key for file in found}
            gone = [key for key in self._index.snapshot() if key not in there and not self._files.exists(key) and self._index.drop(key)]
            for file in found:
                self._index.put(file.key)
            trimmed = self._index.trim() if self._seat.is_owner else []
            self._remove(trimmed)
        except OSError as exc:
            log.warning("kvbm.disk_listing_failed folder=%s error=%s", self._seat.folder, exc)
            return ()
        finally:
            self._listed_s = self._clock()
            self._listing.release()
        return tuple(gone + trimmed)
