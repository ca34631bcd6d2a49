# SPDX-License-Identifier: Apache-2.0
"""Which folder is this engine's: `<folder>/tandem-kv/<model and layout>/<seat>`, held by a lock on a file in it.

Several engines of one host may be given the same folder. Each takes the lowest seat that nobody holds, so a restarted engine sits down
where it sat before and finds its blocks. The kernel drops the lock with the process. A shared folder is one seat for all, and
whoever holds its lock is the one who evicts.
"""

import errno
import fcntl
import logging
import os
from contextlib import suppress
from pathlib import Path

from tandem_kvbm.layout import Layout
from tandem_protocol.errors import ConfigError

log = logging.getLogger(__name__)
ROOT = "tandem-kv"
"""Of all engines in a folder."""
SHARED = "shared"
_LOCK = "lock"
LAYOUT = "layout.json"
_MOST_SEATS = 256


class Seat:
    """A folder, and whether it is ours alone to evict in. `leave` gives it back."""

    def __init__(self, folder: Path, lock_fd: int | None) -> None:
        self.folder, self._lock_fd = folder, lock_fd
        status = folder.stat()
        self._identity = (status.st_dev, status.st_ino)

    @property
    def is_owner(self) -> bool:
        """Whether we hold the lock."""
        return self._lock_fd is not None

    def is_there(self) -> bool:
        """Whether the folder is still the one that we opened: a mount that went away leaves another one, or none."""
        try:
            status = self.folder.stat()
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._identity

    def try_to_own(self) -> bool:
        """Takes the lock of a shared seat if its holder has gone."""
        if self._lock_fd is None:
            self._lock_fd = _lock(self.folder)
        return self.is_owner

    def leave(self) -> None:
        """A second call does nothing."""
        if self._lock_fd is not None:
            with suppress(OSError):
                os.utime(self._lock_fd)  # when it was last used, for sweeps
            os.close(self._lock_fd)
            self._lock_fd = None


def take_seat(folder: str, layout: Layout, *, shared: bool, first: int = 0) -> Seat:
    """The shared seat, or the first free one from number `first` on. Raises ConfigError if the folder can't be used."""
    home = Path(folder) / ROOT / layout.folder
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not shared and home.stat().st_uid != os.geteuid():
            raise ConfigError(f"disk tier: {home} belongs to another user; set DYN_KVBM_DISK_CACHE_DIR to a folder of yours")
        (home / LAYOUT).write_text(layout.as_json())
        seat = sit(home / SHARED) if shared else _first_free(home, first)
    except OSError as exc:
        raise ConfigError(f"disk tier: can't write to {home}: {exc.strerror}; set DYN_KVBM_DISK_CACHE_DIR to another folder") from exc
    _tell_of_others(home)
    return seat


def _first_free(home: Path, first: int) -> Seat:
    for number in range(_MOST_SEATS):
        seat = sit(home / f"seat-{(first + number) % _MOST_SEATS}")
        if seat.is_owner:
            return seat
    raise ConfigError(f"disk tier: all {_MOST_SEATS} seats of {home} are taken; give some engines another DYN_KVBM_DISK_CACHE_DIR")


def sit(folder: Path) -> Seat:
    """The seat with its lock, if that is free. Raises OSError."""
    for last in (False, True):
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            return Seat(folder, _lock(folder))
        except FileNotFoundError:  # swept in this moment
            if last:
                raise
    raise AssertionError("unreachable")


def _lock(folder: Path) -> int | None:
    fd = os.open(folder / _LOCK, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_ino != (folder / _LOCK).stat().st_ino:
            raise FileNotFoundError(errno.ENOENT, "the folder was removed and made anew", str(folder))
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        os.close(fd)
        raise
    os.utime(fd)
    return fd


def _tell_of_others(home: Path) -> None:
    """Blocks of another model or vLLM stay where they are, outside this quota: somebody has to know."""
    others = sorted(path.name for path in home.parent.iterdir() if path != home)
    if others:
        log.info("kvbm.disk_other_layouts folder=%s count=%d first=%s", home.parent, len(others), others[0])
