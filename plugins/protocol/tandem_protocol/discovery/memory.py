# SPDX-License-Identifier: Apache-2.0
"""Discovery within one process: the baseline, and the store for tests. `memory:NAME` opens share one store by name.

All users of one name live on one event loop; no lease is needed, since workers and watchers end together.
"""

from collections.abc import AsyncGenerator
from typing import Any, Generic

from tandem_protocol.discovery.feed import Feed
from tandem_protocol.discovery.interface import Discovery, R, Registration, Snapshot, check_same_worker
from tandem_protocol.records import Record


class MemoryStore(Generic[R]):
    """The records, and the feeds that want to know of changes."""

    def __init__(self) -> None:
        self._records: dict[str, R] = {}
        self._feeds: set[Feed[R]] = set()

    @property
    def records(self) -> tuple[R, ...]:
        """Ordered by id."""
        return tuple(self._records[name] for name in sorted(self._records))

    def put(self, record: R) -> None:
        """Adds or replaces."""
        self._records[record.id] = record
        self._publish()

    def remove(self, name: str) -> None:
        """Removes, if it is there."""
        self._records.pop(name, None)
        self._publish()

    def attach(self, feed: Feed[R]) -> None:
        """Publishes to `feed` from now on."""
        self._feeds.add(feed)
        feed.publish(Snapshot(records=self.records))

    def detach(self, feed: Feed[R]) -> None:
        """Ends that."""
        self._feeds.discard(feed)

    def _publish(self) -> None:
        snapshot = Snapshot(records=self.records)
        for feed in self._feeds:
            feed.publish(snapshot)


_STORES: dict[tuple[str, str], MemoryStore[Any]] = {}


def open_memory(name: str, kind: type[Record]) -> "MemoryDiscovery[Any]":
    """The store of this name and kind of record; made on first use, kept for the life of the process."""
    return MemoryDiscovery(_STORES.setdefault((name, kind.collection), MemoryStore()))


class MemoryDiscovery(Discovery[R]):
    """Records in a dict."""

    def __init__(self, store: MemoryStore[R] | None = None) -> None:
        super().__init__()
        self._store: MemoryStore[R] = store or MemoryStore()
        self._feed: Feed[R] = Feed()
        self._registrations: list[MemoryRegistration[R]] = []

    async def register(self, record: R) -> Registration[R]:
        """Never fails."""
        self._store.put(record)
        self.counts.registrations += 1
        registration = MemoryRegistration(self._store, record)
        self._registrations.append(registration)
        return registration

    def watch(self) -> AsyncGenerator[Snapshot[R], None]:
        """Every change is known at once."""
        self._store.attach(self._feed)
        return self._feed.follow()

    async def list(self) -> tuple[R, ...]:
        """Never fails."""
        return self._store.records

    async def close(self) -> None:
        """The store itself stays, for others of its name."""
        for registration in self._registrations:
            await registration.close()
        self._store.detach(self._feed)
        self._feed.close()


class MemoryRegistration(Registration[R]):
    """An entry of the dict."""

    def __init__(self, store: MemoryStore[R], record: R) -> None:
        self._store = store
        self._record = record
        self._held = True

    @property
    def record(self) -> R:
        """As last asked for."""
        return self._record

    @property
    def held(self) -> bool:
        """Until closed."""
        return self._held

    async def update(self, record: R) -> None:
        """Takes effect at once."""
        check_same_worker(self._record, record)
        self._record = record
        if self._held:
            self._store.put(record)

    async def close(self) -> None:
        """Takes effect at once."""
        if self._held:
            self._held = False
            self._store.remove(self._record.id)
