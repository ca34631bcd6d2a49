# SPDX-License-Identifier: Apache-2.0
"""Files in /dev/shm: which ones a process has mapped, and removing those that nobody maps any more."""

import contextlib
import logging
import time
from collections.abc import Iterable
from pathlib import Path

log = logging.getLogger(__name__)

SHM = Path("/dev/shm")  # noqa: S108 - this is where POSIX shared memory lives on Linux
HOST_TIERS = "vllm_offload_*.mmap"
"""Host memory of KV tiers: gigabytes that stay behind when an engine and its guard are killed together."""
STARTING_S = 600.0
"""A younger file may be of an engine that has made it and not mapped it yet, or that can't be seen from this container."""


def mapped_files(pids: Iterable[int], proc: Path = Path("/proc")) -> set[Path]:
    """Files in /dev/shm that these processes map now; processes that are gone or foreign map nothing."""
    inodes: set[int] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            inodes.update(_parse_maps((proc / str(pid) / "maps").read_text(errors="replace")))
    return {path for path in SHM.iterdir() if _inode(path) in inodes} if inodes else set()


def _parse_maps(text: str) -> set[int]:
    """Inodes in /dev/shm in the text of /proc/PID/maps.

    Not paths: glibc makes a semaphore under a temporary name and links the real one to it, so that its creator seems to map
    a deleted file.
    """
    lines = (line.split(maxsplit=5) for line in text.splitlines())
    return {int(fields[4]) for fields in lines if len(fields) == 6 and fields[5].startswith(f"{SHM}/")}


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def sweep_host_tiers(shm: Path = SHM, proc: Path = Path("/proc")) -> list[Path]:
    """Removes host tiers that nobody has mapped for a while; returns them. Engines that have theirs mapped lose nothing by it."""
    stale = [path for path in shm.glob(HOST_TIERS) if _age_s(path) > STARTING_S]
    return remove_unmapped(stale, proc)


def _age_s(path: Path) -> float:
    """Seconds since the file changed; 0 if it is gone."""
    try:
        return time.time() - path.stat().st_ctime
    except OSError:
        return 0.0


def remove_unmapped(files: Iterable[Path], proc: Path = Path("/proc")) -> list[Path]:
    """Unlinks those of `files` that no living process maps; returns what was removed."""
    living = (int(entry.name) for entry in proc.iterdir() if entry.name.isdigit())
    in_use = mapped_files(living, proc)
    removed = []
    for path in sorted(set(files) - in_use):
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as exc:
            log.warning("shm.unlink_failed path=%s error=%s", path, exc)
            continue
        removed.append(path)
    return removed
