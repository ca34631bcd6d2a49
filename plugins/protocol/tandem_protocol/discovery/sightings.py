# SPDX-License-Identifier: Apache-2.0
"""Which leases of a store without expiry of its own run: pure, driven by what was seen of them and when.

Whether a lease ran out is told by our clock alone: how long ago *we* saw it renewed. Times that others wrote are never compared with it, so
clocks of pods may differ by hours. A lease that is seen for the first time runs, since its last renewal can't be dated: a dead worker's
is believed for one lease by whoever begins to look. And silence only counts while we listened: after the store was away, every
lease that ran then has one whole term again.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

SWEEP_AFTER_LEASES = 6
"""As in a folder: whoever looks for the reason of a death still finds the record for a minute."""


@dataclass(frozen=True)
class Lease:
    """One lease as the store shows it."""

    name: str
    uid: str
    """Another one for each object, also of the same name."""
    version: str
    """Changes with every write; only ever compared for equality."""
    duration_s: float
    record: bytes
    """What it keeps alive."""


@dataclass(frozen=True)
class Sighting:
    """A lease and when it was last seen to change."""

    lease: Lease
    seen_s: float
    """Of a monotonic clock."""
    ended: bool = False


class Sightings:
    """The leases of one collection. Used by one thread; every `now` is of one monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._known: dict[str, Sighting] = {}

    @property
    def running(self) -> dict[str, bytes]:
        """The records of those that did not run out, by name."""
        return {name: one.lease.record for name, one in self._known.items() if not one.ended}

    def listed(self, leases: Iterable[Lease], now: float) -> None:
        """The store was read whole. Only then a lease is judged: events may wait unread somewhere, a read can't be old."""
        self._known = {lease.name: self._judged(lease, now) for lease in leases}

    def _judged(self, lease: Lease, now: float) -> Sighting:
        known = self._known.get(lease.name)
        if known is None or (known.lease.uid, known.lease.version) != (lease.uid, lease.version):
            return Sighting(lease, now)
        return known if known.ended else replace(known, ended=now - known.seen_s > lease.duration_s)

    def changed(self, lease: Lease, now: float) -> bool:
        """It was written just now; whether that is more than one sign of life of a lease that runs."""
        known = self._known.get(lease.name)
        self._known[lease.name] = Sighting(lease, now)
        return known is None or known.ended or known.lease.record != lease.record

    def gone(self, name: str) -> None:
        """It was removed."""
        self._known.pop(name, None)

    def overdue(self, now: float) -> bool:
        """Whether a lease should have been renewed by now: a reason to read the store."""
        return any(not one.ended and now - one.seen_s > one.lease.duration_s for one in self._known.values())

    def excuse(self, now: float) -> None:
        """The store was away: nobody could renew."""
        self._known = {name: one if one.ended else replace(one, seen_s=now) for name, one in self._known.items()}

    def long_dead(self, now: float) -> tuple[Lease, ...]:
        """Those that ran out so long ago that they may be removed."""
        return tuple(one.lease for one in self._known.values()
                     if one.ended and now - one.seen_s > (1 + SWEEP_AFTER_LEASES) * one.lease.duration_s)
