# SPDX-License-Identifier: Apache-2.0
"""This host's copies of loaded adapters, under names made of their contents.

The engine reads an adapter again whenever it was evicted from its cache, and dies if the files are gone or changed by then: so it gets a
copy that nobody else touches. Its path is part of vLLM's block hashes: equal contents have equal paths on every host with the same
DYN_LORA_PATH, other contents never have. Workers of a host share copies: each holds a shared lock (flock, which ends with its process)
on those that it has loaded, and whoever gets the exclusive lock may remove one.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tandem_protocol.errors import UnavailableError
from tandem_worker.lora.adapter import CONFIG_FILE, WEIGHTS_FILE
from tandem_worker.lora.deadline import Deadline

_FOLDER = "tandem"
_LOCK = ".lock"
_STAGING = "staging-"
_STALE_S = 86_400.0
"""No load takes that long; a staging folder of that age is a killed worker's."""
_POLL_S = 0.05
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Copy:
    """A folder that stays as it is until `CopyStore.release`."""

    path: Path
    lock: int
    """A descriptor with the shared lock."""


class CopyStore:
    """The copies below DYN_LORA_PATH. Thread-safe; other processes use the same folder."""

    def __init__(self, root: Path) -> None:
        self._folder = root / _FOLDER

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty folder on the copies' own file system, removed at the end."""
        self._folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self._folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def install(self, staged: Path, deadline: Deadline) -> Copy:
        """Takes a staged adapter, and holds its copy. Raises UnavailableError if an older copy of the same contents is damaged."""
        digest = _digest(staged)
        path = self._folder / digest
        lock = self._lock(digest, fcntl.LOCK_SH, deadline)
        try:
            with suppress(OSError):  # there already; whatever else it is shows next
                staged.rename(path)
            _verify(path, digest)
        except BaseException:
            os.close(lock)
            raise
        return Copy(path, lock)

    def release(self, copy: Copy) -> None:
        """Gives a copy back; the last worker of the host that does so removes it."""
        os.close(copy.lock)
        self._remove_if_unused(copy.path)

    def sweep(self) -> int:
        """Removes what killed workers left behind; returns how many copies that were."""
        if not self._folder.is_dir():
            return 0
        old = time.time() - _STALE_S
        for staging in self._folder.glob(f"{_STAGING}*"):
            with suppress(OSError):
                if staging.stat().st_mtime < old:
                    shutil.rmtree(staging, ignore_errors=True)
        copies = [path for path in self._folder.iterdir() if path.is_dir() and not path.name.startswith(_STAGING)]
        return sum(self._remove_if_unused(path) for path in copies)

    def _remove_if_unused(self, path: Path) -> bool:
        lock = self._try_lock(path.name, fcntl.LOCK_EX)
        if lock is None:
            return False
        try:
            shutil.rmtree(path, ignore_errors=True)
            self._lock_path(path.name).unlink(missing_ok=True)
        finally:
            os.close(lock)
        return True

    def _lock(self, digest: str, how: int, deadline: Deadline) -> int:
        while (lock := self._try_lock(digest, how)) is None:
            deadline.pause(_POLL_S)
        return lock

    def _try_lock(self, digest: str, how: int) -> int | None:
        """The lock, unless somebody else has it, or removed its file in the meantime."""
        path = self._lock_path(digest)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
            if os.fstat(lock).st_ino == path.stat().st_ino:
                return lock
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(lock)
        return None

    def _lock_path(self, digest: str) -> Path:
        return self._folder / f"{digest}{_LOCK}"


def _verify(path: Path, digest: str) -> None:
    if not path.is_dir() or _digest(path) != digest:
        raise UnavailableError(f"{path} is damaged: remove it, and load the adapter again")


def _digest(folder: Path) -> str:
    """Of both files; hex."""
    digest = hashlib.blake2b(digest_size=16)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with (folder / name).open("rb") as file:
            digest.update(f"{name} {os.fstat(file.fileno()).st_size}\n".encode())
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
