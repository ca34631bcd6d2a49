# SPDX-License-Identifier: Apache-2.0
"""What a watcher of a distant store believes: pure, driven by reads that succeeded or failed.

A store that is down must not look like a fleet that is down. While it is away the view stays. When it comes back,
perhaps empty, workers that are missing in it get one lease of grace to register again.
"""

import logging
from typing import Generic

from tandem_protocol.discovery.interface import Counts, R, Snapshot

log = logging.getLogger(__name__)


class View(Generic[R]):
    """The believed fleet. Used by one thread."""

    def __init__(self, counts: Counts, grace_s: float) -> None:
        self._counts = counts
        self._grace_s = grace_s
        self._records: dict[str, R] = {}
        self._graced_until: dict[str, float] = {}
        self._revision = 0
        self._away = False

    def lost(self, reason: str) -> Snapshot[R]:
        """The store can't be reached: nothing changes but `current`."""
        if not self._away:
            self._away = True
            self._counts.losses += 1
            log.warning("discovery.lost error=%s: keeping the last view of %d workers", reason, len(self._records))
        return self._snapshot()

    def listed(self, found: dict[str, R], revision: int, now: float) -> Snapshot[R]:
        """The store was read at `revision`; `now` is of a monotonic clock, in seconds.

        A revision that went backwards is another store under the same address: as if it had been away.
        """
        if self._away or revision < self._revision:
            self._welcome(found, now)
        self._away, self._revision = False, revision
        self._graced_until = {name: until for name, until in self._graced_until.items() if name not in found and until > now}
        self._records = {**{name: self._records[name] for name in self._graced_until}, **found}
        return self._snapshot()

    def _welcome(self, found: dict[str, R], now: float) -> None:
        missing = [name for name in self._records if name not in found]
        for name in missing:
            if name not in self._graced_until:
                self._graced_until[name] = now + self._grace_s
                self._counts.graced += 1
        log.info("discovery.back workers=%d missing=%d grace_s=%g", len(found), len(missing), self._grace_s)

    def _snapshot(self) -> Snapshot[R]:
        return Snapshot(records=tuple(self._records[name] for name in sorted(self._records)), current=not self._away)
