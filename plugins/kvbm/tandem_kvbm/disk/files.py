# SPDX-License-Identifier: Apache-2.0
"""Block files: `<hh>/<key in hex>.kv`, the block and then a page with its footer, so that both can be moved by direct I/O.

A file appears whole, by rename, or not at all. Nothing is synced for that: after a power cut a file may be short or have holes, which
its size or checksum tells. Files are the owner's alone, since KV blocks are what users wrote. Raises OSError.
"""

import errno
import itertools
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from tandem_kvbm.blob import FOOTER_BYTES, CorruptBlockError

PAGE: Final = 4096
"""Of the format: a file must mean the same on every machine."""
_SUFFIX: Final = ".kv"
_TEMPORARY: Final = "tmp"


class Found(NamedTuple):
    """A file of the right size."""

    used_ns: int
    key: bytes


class BlockFiles:
    """The files of one folder, which must exist. Thread-safe: every thread has its own footer page and temporary names."""

    def __init__(self, folder: Path, block_bytes: int, *, direct_io: bool, fdatasync: bool) -> None:
        self._folder, self._block_bytes, self._fdatasync = folder, block_bytes, fdatasync
        self.file_bytes = block_bytes + PAGE
        self.make_folders()
        self._own = threading.local()
        self._numbers = itertools.count()
        self.direct_io = direct_io and block_bytes % PAGE == 0 and self._can_bypass_cache()

    def make_folders(self) -> None:
        """The folders that files lie in; the one above must be there, since a mount that went away is no empty cache."""
        for name in (_TEMPORARY, *(f"{number:02x}" for number in range(256))):
            (self._folder / name).mkdir(mode=0o700, exist_ok=True)

    def path(self, key: bytes) -> Path:
        """Where the block lies."""
        name = key.hex()
        return self._folder / name[:2] / (name + _SUFFIX)

    def write(self, key: bytes, block: memoryview, footer: bytes) -> None:
        """Puts the block in its place."""
        page = self._page()
        page[:FOOTER_BYTES] = footer
        temporary = self._folder / _TEMPORARY / f"{os.getpid()}-{threading.get_ident()}-{next(self._numbers)}"
        try:
            self._fill(temporary, block, page)
            temporary.rename(self.path(key))
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise

    def read(self, key: bytes, into: memoryview) -> bytes:
        """Fills `into` and returns the footer. Raises CorruptBlockError for a file of another size, FileNotFoundError for none."""
        page = self._page()
        fd = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC | self._direct(into))
        try:
            if os.fstat(fd).st_size != self.file_bytes or os.readv(fd, [into, page]) != self.file_bytes:
                raise CorruptBlockError(f"file of another size than {self.file_bytes} bytes")
            with suppress(OSError):
                os.utime(fd)  # the order of use survives a restart; not worth an error where the file is another user's
        finally:
            os.close(fd)
        return bytes(page[:FOOTER_BYTES])

    def remove(self, key: bytes) -> None:
        """Raises FileNotFoundError if it isn't there."""
        self.path(key).unlink()

    def exists(self, key: bytes) -> bool:
        """Whether there is a file of the right size. Raises OSError for any other answer than yes or no."""
        try:
            return self.path(key).stat().st_size == self.file_bytes
        except FileNotFoundError:
            return False

    def scan(self) -> Iterator[Found]:
        """All blocks there; files of the wrong size are removed, strangers' names left alone."""
        for number in range(256):
            with os.scandir(self._folder / f"{number:02x}") as entries:
                for entry in entries:
                    found = self._examine(entry)
                    if found is not None:
                        yield found

    def remove_leftovers(self) -> int:
        """Removes what a killed process was writing; returns how many. Only for the folder's one owner."""
        leftovers = list((self._folder / _TEMPORARY).iterdir())
        for path in leftovers:
            path.unlink()
        return len(leftovers)

    def _examine(self, entry: "os.DirEntry[str]") -> Found | None:
        try:
            key = bytes.fromhex(entry.name.removesuffix(_SUFFIX))
            if self.path(key).name != entry.name:
                return None
            status = entry.stat(follow_symlinks=False)
        except (ValueError, FileNotFoundError):
            return None
        if status.st_size == self.file_bytes:
            return Found(status.st_mtime_ns, key)
        with suppress(FileNotFoundError):
            Path(entry.path).unlink()
        return None

    def _fill(self, path: Path, block: memoryview, page: mmap.mmap) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | self._direct(block), 0o600)
        try:
            if os.writev(fd, [block, page]) != self.file_bytes:
                raise OSError(errno.ENOSPC, "short write: the disk is full")
            if self._fdatasync:
                os.fdatasync(fd)
        finally:
            os.close(fd)

    def _direct(self, buffer: memoryview) -> int:
        """The flag where it can be used: the buffer must be aligned, which a caller's own may not be."""
        return os.O_DIRECT if self.direct_io and np.frombuffer(buffer, np.uint8).ctypes.data % PAGE == 0 else 0

    def _page(self) -> mmap.mmap:
        """This thread's page, zeros after the footer."""
        if not hasattr(self._own, "page"):
            self._own.page = mmap.mmap(-1, PAGE)
        page: mmap.mmap = self._own.page
        return page

    def _can_bypass_cache(self) -> bool:
        """Tries it: some file systems take the flag and fail at the write, others refuse it."""
        path = self._folder / _TEMPORARY / f"{os.getpid()}-probe"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_DIRECT, 0o600)
        except OSError:
            return False
        try:
            return os.writev(fd, [self._page()]) == PAGE and os.preadv(fd, [self._page()], 0) == PAGE
        except OSError:
            return False
        finally:
            os.close(fd)
            path.unlink()
