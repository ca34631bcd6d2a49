# SPDX-License-Identifier: Apache-2.0
"""Warm restarts: the index and its places in the workers' event streams are kept in a file, and a router begins with that.

Only what was published since is replayed. Where a publisher no longer has that, or is another one, its slot is cleared and
filled anew, so an old file costs time but never a wrong index. `save` may be called from any thread.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tandem_protocol.errors import ConfigError, TandemError
from tandem_router.feed import EventFeed
from tandem_router.index import KvIndex

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WarmIndex:
    """An index with its feed."""

    index: KvIndex
    feed: EventFeed
    remembered: frozenset[str] = frozenset()
    """Workers that the index knows before discovery was asked: those that are gone must be removed."""
    outcome: str = "absent"
    """What became of the file: restored, refused or absent."""


def open_index(path: Path | None) -> WarmIndex:
    """Begins with what the file holds, or empty. A file that can't be used is left alone and costs only the warmth."""
    index = KvIndex()
    feed = EventFeed(index)
    if path is None or not path.exists():
        return WarmIndex(index, feed)
    try:
        remembered = feed.restore(path)
    except (OSError, TandemError) as exc:
        log.warning("snapshot.refused file=%s error=%s: the index fills from events", path, exc)
        feed.close()
        index = KvIndex()  # the other one may be filled in part
        return WarmIndex(index, EventFeed(index), outcome="refused")
    log.info("snapshot.restored file=%s workers=%d", path, len(remembered))
    return WarmIndex(index, feed, remembered, "restored")


def snapshot_path(folder: str, instance: int) -> Path | None:
    """The file of one instance in the folder, which is made; None for no folder. Raises ConfigError."""
    if not folder:
        return None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"the snapshot folder {folder} can't be made ({exc}): set TANDEM_ROUTER_SNAPSHOT_FOLDER to one that can") from exc
    return Path(folder) / f"router-{instance}.index"


class Snapshots:
    """Saves the index again and again."""

    def __init__(self, feed: EventFeed | None, path: Path | None, note: Callable[[str], None]) -> None:
        """`note` is told the outcome of every save: saved or failed. Without feed or path nothing is ever saved."""
        self._feed, self._path, self._note = feed, path, note
        self._one = threading.Lock()

    def save(self) -> None:
        """Replaces the file. A failure is logged and counted: the router serves without."""
        if self._feed is None or self._path is None:
            return
        try:
            with self._one:
                self._feed.save(self._path)
        except (OSError, TandemError) as exc:
            log.warning("snapshot.failed file=%s error=%s", self._path, exc)
            self._note("failed")
        else:
            self._note("saved")

    async def keep(self, interval_s: float) -> None:
        """Saves until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            await asyncio.to_thread(self.save)
