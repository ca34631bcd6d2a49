# SPDX-License-Identifier: Apache-2.0
"""Folders that nobody has used for long: blocks of models, layouts and vLLM versions that were left behind, outside every quota.

A seat whose lock can be taken belongs to no running engine. Shared folders are left alone, since only one of their users holds the lock.
"""

import logging
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from tandem_kvbm.disk.seat import LAYOUT, SHARED, Seat, sit

log = logging.getLogger(__name__)
_GONE = ".gone-"


def sweep(root: Path, older_than_s: float, now_s: float) -> list[Path]:
    """Removes the seats below `root` that were last used more than `older_than_s` before `now_s` (epoch); returns them.

    What can't be removed is logged and left: it is not worth an engine's start.
    """
    gone = []
    for folder in sorted(root.glob("*/*")):
        try:
            if folder.name.startswith(_GONE):
                shutil.rmtree(folder)  # a sweep was killed
            elif folder.is_dir() and folder.name != SHARED and now_s - last_use_s(folder) > older_than_s and _remove(folder):
                gone.append(folder)
        except OSError as exc:
            log.warning("kvbm.disk_sweep_failed folder=%s error=%s", folder, exc)
    if gone:
        log.info("kvbm.disk_swept folders=%d first=%s", len(gone), gone[0])
    return gone


def last_use_s(folder: Path) -> float:
    """When a seat was last taken or left, or a block written, as lock and folders tell (epoch)."""
    return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))


def _remove(folder: Path) -> bool:
    """Under its lock, and by a new name first: whoever comes meanwhile finds a free place, never half a folder."""
    seat: Seat = sit(folder)
    try:
        if not seat.is_owner:
            return False
        away = folder.rename(folder.with_name(_GONE + uuid.uuid4().hex))
        shutil.rmtree(away)
    finally:
        seat.leave()
    if not any(path.is_dir() for path in folder.parent.iterdir()):
        with suppress(OSError):  # somebody sits down there in this moment
            (folder.parent / LAYOUT).unlink()
            folder.parent.rmdir()
    return True
