# SPDX-License-Identifier: Apache-2.0
"""Checks before an engine sets up its tiers: each failure is one sentence that says what is short and what to do."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tandem_protocol.errors import ConfigError

GIB = 1 << 30
SHM = Path("/dev/shm")  # noqa: S108 - this is where POSIX shared memory lives on Linux


def check_host_memory(needed_bytes: int, shm: Path = SHM) -> None:
    """Whether /dev/shm has room for the host tier. Raises ConfigError.

    Filling a tmpfs beyond its end kills the process by SIGBUS, without a word.
    """
    free = shutil.disk_usage(shm).free
    if needed_bytes > free:
        raise ConfigError(f"the host tier needs {_gib(needed_bytes)} of {shm} and {_gib(free)} are free: lower DYN_KVBM_CPU_CACHE_GB "
                          "(or its override in blocks), or give the container a larger --shm-size")


def check_disk(folder: Path, needed_bytes: int, held_bytes: int = 0) -> None:
    """Whether the disk tier's parent folder is there, writable, and has room for the quota less what the tier holds already.

    Raises ConfigError. A quota is a promise to stay below it, so a smaller disk would be a wrong one.
    """
    if not folder.is_dir():
        raise ConfigError(f"the disk tier's folder {folder} does not exist: create it, or set DYN_KVBM_DISK_CACHE_DIR")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"the disk tier can't write to {folder}: change its permissions, or set DYN_KVBM_DISK_CACHE_DIR")
    free = shutil.disk_usage(folder).free + held_bytes
    if needed_bytes > free:
        raise ConfigError(f"the disk tier may take {_gib(needed_bytes)} and {folder} has {_gib(free)} left: lower DYN_KVBM_DISK_CACHE_GB "
                          "(or its override in blocks), or set DYN_KVBM_DISK_CACHE_DIR")


def folder_bytes(folder: Path, prefix: str) -> int:
    """Size of the files below those subfolders of `folder` whose name starts with `prefix`."""
    total = 0
    for path in (path for top in folder.glob(f"{prefix}*") for path in top.rglob("*")):
        with suppress(OSError):  # another engine has just evicted it
            total += path.stat().st_size if path.is_file() else 0
    return total


@contextmanager
def bounded(what: str, timeout_s: float, expire: Callable[[str], None]) -> Iterator[None]:
    """Calls `expire` with a sentence, on a thread of its own, when the body takes longer than `timeout_s`.

    Mapping, populating and pinning memory can't be interrupted, so all that a deadline can do is end the process.
    """
    sentence = f"{what} took longer than {timeout_s:g} s: lower the tier's size, or raise DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS"
    timer = threading.Timer(timeout_s, expire, [sentence])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f} GiB"
