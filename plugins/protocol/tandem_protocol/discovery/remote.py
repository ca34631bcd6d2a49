# SPDX-License-Identifier: Apache-2.0
"""What all stores that are reached over a network have in common: one thread for calls, one that watches, and records as bytes.

What differs by store is its client, the registration and the watch that are made, and what its failures mean.
"""

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

import msgspec

from tandem_protocol.discovery.feed import Feed
from tandem_protocol.discovery.interface import Discovery, R, Registration, Snapshot
from tandem_protocol.discovery.leased import C, LeasedRegistration
from tandem_protocol.errors import UnavailableError
from tandem_protocol.records import Record

log = logging.getLogger(__name__)
CALL_TIMEOUT_S = 8.0
"""Of a whole turn on the calls' thread, which may be several requests and a wait for its turn."""
T = TypeVar("T")
Publish = Callable[[Snapshot[R]], object]


class WatchThread(ABC, Generic[R]):
    """Reads the store until it is stopped."""

    def __init__(self, publish: Publish[R]) -> None:
        self._publish = publish
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tandem-discovery-watch", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; blocks for the time of a request at most."""
        self._stopping.set()
        self._interrupt()
        self._thread.join(CALL_TIMEOUT_S)

    def _send(self, snapshot: Snapshot[R]) -> None:
        with suppress(RuntimeError):  # the loop was closed without closing us
            self._publish(snapshot)

    @abstractmethod
    def _run(self) -> None:
        """Until `_stopping` is set."""

    @abstractmethod
    def _interrupt(self) -> None:
        """Ends a read that the thread waits in; called by another one."""


class RemoteDiscovery(Discovery[R], Generic[R, C]):
    """Records in such a store."""

    _lost: tuple[type[Exception], ...] = (TimeoutError,)
    """What the store's client raises, besides UnavailableError, when the store is away."""

    def __init__(self, client: C, kind: type[Record]) -> None:
        """`client` is used on the calls' thread only."""
        super().__init__()
        self._client = client
        self._decoder: msgspec.json.Decoder[R] = msgspec.json.Decoder(kind)
        self._calls = ThreadPoolExecutor(1, thread_name_prefix="tandem-discovery")
        self._feed: Feed[R] = Feed()
        self._bad: dict[str, bytes] = {}
        self._watch: WatchThread[R] | None = None
        self._registrations: list[LeasedRegistration[R, C]] = []

    async def register(self, record: R) -> Registration[R]:
        """Writes the record under a lease; a task of this loop keeps it alive from then on."""
        registration = self._new_registration(record)
        await self.call(registration.write)
        self.counts.registrations += 1
        registration.start()
        self._registrations.append(registration)
        return registration

    def watch(self) -> AsyncGenerator[Snapshot[R], None]:
        """By the store's own watch, and by whole reads now and then."""
        if self._watch is None:
            loop = asyncio.get_running_loop()
            self._watch = self._new_watch(lambda snapshot: loop.call_soon_threadsafe(self._feed.publish, snapshot))
            self._watch.start()
        return self._feed.follow()

    async def list(self) -> tuple[R, ...]:
        """One read, without the grace that watches grant."""
        records = self.decode(await self.call(self._read))
        return tuple(records[name] for name in sorted(records))

    async def close(self) -> None:
        """Ends the watch and the own leases."""
        for registration in self._registrations:
            await registration.close()
        if self._watch is not None:
            await asyncio.to_thread(self._watch.stop)
        self._feed.close()
        self._calls.shutdown(wait=False, cancel_futures=True)

    async def call(self, step: Callable[[C], T]) -> T:
        """Runs a step on the calls' thread. Raises UnavailableError if the store does not do it in time."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await asyncio.get_running_loop().run_in_executor(self._calls, step, self._client)
        except UnavailableError:
            raise
        except self._lost as exc:
            raise self._away(exc) from exc

    def decode(self, values: Mapping[str, bytes]) -> dict[str, R]:
        """Id -> record; what is no record is counted and left out."""
        records = {}
        for name, value in values.items():
            try:
                record = self._decoder.decode(value)
            except msgspec.DecodeError as exc:
                self._note_bad(name, value, exc)
            else:
                records[record.id] = record
        return records

    def _note_bad(self, name: str, value: bytes, exc: msgspec.DecodeError) -> None:
        """Once per value: everything is read again and again."""
        if self._bad.get(name) != value:
            self._bad[name] = value
            self.counts.bad_records += 1
            log.warning("discovery.bad_record entry=%s error=%s: left out, remove it or update whoever wrote it", name, exc)

    @abstractmethod
    def _away(self, exc: Exception) -> UnavailableError:
        """What such a failure means, and what to do."""

    @abstractmethod
    def _new_registration(self, record: R) -> LeasedRegistration[R, C]:
        """Not written yet."""

    @abstractmethod
    def _new_watch(self, publish: Publish[R]) -> WatchThread[R]:
        """Not started yet."""

    @abstractmethod
    def _read(self, client: C) -> Mapping[str, bytes]:
        """All entries of the collection."""
