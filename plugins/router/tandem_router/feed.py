# SPDX-License-Identifier: Apache-2.0
"""The feed of KV events: all publishers' frames into the index, nothing missed, nothing doubled, every loss counted.

One thread per router process polls all sockets, decodes and applies; the compiled parts of both release the GIL, so the event loop
goes on. `add`, `remove`, `state`, `wait_synced`, `save` and `close` may be called from any thread; the last three may wait, each with
a deadline, so an event loop calls them through `asyncio.to_thread`.
"""

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from tandem_protocol.errors import ConfigError, UnavailableError
from tandem_protocol.event_link import Link
from tandem_protocol.event_sequence_terms import Limits, Position
from tandem_protocol.workers import EventSource
from tandem_router.feed_snapshot import Place, Snapshot, read_snapshot, write_snapshot
from tandem_router.feed_source import Index, Observer, Silent, SourceFeed, SourceState

_log = logging.getLogger(__name__)
_TICK_S = 0.05
"""How late a deadline may be noticed."""
_MAX_SOCKETS = 1 << 15
"""ZMQ's own 1,023 end at some 250 ranks: each takes four."""
_CLOSE_S = 5.0
_PAUSE_S = 10.0
"""How long `save` waits for the thread to come to the end of a round."""


class EventFeed:
    """Follows every publisher that was added. Resource handling: `close` ends the thread and frees all sockets."""

    def __init__(
        self, index: Index, *, observer: Observer | None = None, clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time, limits: Limits | None = None,
    ) -> None:
        """`clock`: monotonic seconds, for deadlines. `wall`: seconds since the epoch, as publishers stamp batches."""
        self._index = index
        self._observer = observer or Silent()
        self._clock = clock
        self._wall = wall
        self._limits = limits or Limits()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._places: dict[tuple[str, str, int], Place] = {}
        self._guard = threading.Lock()
        """Over the sources, the retired ones and `_closing`."""
        self._sources: tuple[SourceFeed, ...] = ()
        self._retired: list[SourceFeed] = []
        self._closing = False
        self._ended = threading.Event()
        self._round = threading.Lock()
        """Held while frames are being applied: between rounds index and positions agree."""
        self._synced_changed = threading.Condition()
        self._synced: frozenset[SourceFeed] = frozenset()
        self._poller = zmq.Poller()
        self._watched: tuple[tuple[SourceFeed, int], ...] | None = None
        self._next_tick_s = 0.0
        self._thread = threading.Thread(target=self._run, name="tandem-kv-feed", daemon=True)

    def start(self) -> None:
        """Starts the thread; sources may be added before and after."""
        self._thread.start()

    def add(self, worker_id: str, source: EventSource, slot: int) -> None:
        """Follows one more publisher; its blocks go to the index's `slot`, which is cleared first unless a snapshot covers it.

        Raises ConfigError for an endpoint of the wrong form or a source that is there already, UnavailableError after `close`.
        """
        with self._guard:
            if self._closing:
                raise UnavailableError("the feed of KV events is closed: start another one")
            if any(known.worker_id == worker_id and known.source.dp_rank == source.dp_rank for known in self._sources):
                raise ConfigError(f"worker {worker_id} rank {source.dp_rank} is followed already: remove the worker first")
            self._sources = (*self._sources, self._make(worker_id, source, slot))
        self._ring()

    def remove(self, worker_id: str) -> None:
        """Stops following all ranks of a worker, or forgets what a snapshot said of it; do it before the index forgets the worker.

        Afterwards nothing more reaches its slots.
        """
        with self._guard:
            leaving = [source for source in self._sources if source.worker_id == worker_id]
            self._sources = tuple(source for source in self._sources if source.worker_id != worker_id)
            self._retired.extend(leaving)
            self._places = {key: place for key, place in self._places.items() if place.worker_id != worker_id}
        for source in leaving:
            source.detach()
        self._ring()

    def state(self) -> tuple[SourceState, ...]:
        """One entry per source, in the order they were added."""
        return tuple(source.state() for source in self._sources)

    def wait_synced(self, worker_id: str, timeout_s: float) -> bool:
        """Waits until all that the worker's publishers are known to have published is applied; False if that took too long."""
        with self._synced_changed:
            return self._synced_changed.wait_for(lambda: self._is_synced(worker_id), timeout_s)

    def save(self, path: Path) -> None:
        """Writes the index and the places in all streams, so that a restarted router replays only what came after.

        Raises OSError if it can't be written, UnavailableError if the feed is too busy to pause.
        """
        if not self._round.acquire(timeout=_PAUSE_S):
            raise UnavailableError(f"the feed of KV events didn't pause within {_PAUSE_S:.0f} s: save the snapshot later")
        try:
            places = tuple(place for source in self._sources if (place := source.place()) is not None)
            dump = self._index.dump()
        finally:
            self._round.release()
        write_snapshot(path, Snapshot(dump, places))

    def restore(self, path: Path) -> frozenset[str]:
        """Loads what `save` wrote; call it before anything is added. Returns the ids of the workers in it: remove those that are gone.

        A source whose publisher turns out to be another one is cleared and replayed. Raises OSError if `path` can't be read,
        ConfigError if it isn't a snapshot.
        """
        if self._sources:
            raise ConfigError("a snapshot is restored into an empty feed: call restore before add")
        snapshot = read_snapshot(path)
        self._index.load(snapshot.index)
        self._places = {(place.worker_id, place.endpoint, place.dp_rank): place for place in snapshot.places}
        return frozenset(place.worker_id for place in snapshot.places)

    def close(self) -> None:
        """Ends the thread and frees the sockets, within 5 s; may be called twice."""
        with self._guard:
            if self._closing:
                return
            self._closing = True
        self._ended.set()
        self._ring()
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            _log.error("feed.stuck: its thread didn't end within %.0f s and is left behind", _CLOSE_S)
            return
        for source in (*self._sources, *self._retired):
            source.link.close()
        self._context.destroy(0)
        os.close(self._bell)

    def _make(self, worker_id: str, source: EventSource, slot: int) -> SourceFeed:
        return SourceFeed(
            worker_id, source, slot, link=Link(self._context, source), index=self._index, observer=self._observer, wall=self._wall,
            limits=self._limits, resume=self._take_place(worker_id, source, slot),
        )

    def _take_place(self, worker_id: str, source: EventSource, slot: int) -> Position | None:
        place = self._places.pop((worker_id, source.endpoint, source.dp_rank), None)
        return place.position if place is not None and place.slot == slot else None

    def _is_synced(self, worker_id: str) -> bool:
        sources = [source for source in self._sources if source.worker_id == worker_id]
        return bool(sources) and self._synced.issuperset(sources)

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # closed meanwhile
            os.eventfd_write(self._bell, 1)

    def _run(self) -> None:
        while not self._closing:
            try:
                self._turn(self._poll())
            except Exception:
                _log.exception("feed.round_failed: it goes on")
                self._watched = None
                self._ended.wait(_TICK_S)

    def _poll(self) -> list[SourceFeed]:
        """Waits for frames, at most until the next tick; returns the sources that have some."""
        watched = tuple((source, source.link.version) for source in self._sources)
        if watched != self._watched:
            self._watch(watched)
        wait_s = max(0.0, self._next_tick_s - self._clock())
        # Rounded up: rounded down, the last millisecond before each tick is spent polling without a wait.
        ready = {socket for socket, _ in self._poller.poll(math.ceil(min(wait_s, _TICK_S) * 1000))}
        if self._bell in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._bell)
        return [source for source, _ in watched if not ready.isdisjoint(source.link.sockets())]

    def _watch(self, watched: tuple[tuple[SourceFeed, int], ...]) -> None:
        self._poller = zmq.Poller()
        self._poller.register(self._bell, zmq.POLLIN)
        for source, _ in watched:
            for socket in source.link.sockets():
                self._poller.register(socket, zmq.POLLIN)
        self._watched = watched

    def _turn(self, ready: list[SourceFeed]) -> None:
        """One round: what arrived, what is due, who left."""
        now = self._clock()
        with self._round:
            for source in ready:
                source.step(now)
            if now >= self._next_tick_s:
                self._next_tick_s = now + _TICK_S
                for source in self._sources:
                    source.tick(now)
        self._close_retired()
        self._tell_synced()

    def _close_retired(self) -> None:
        with self._guard:
            leaving, self._retired = self._retired, []
        for source in leaving:
            source.link.close()

    def _tell_synced(self) -> None:
        synced = frozenset(source for source in self._sources if source.sequence.synced)
        if synced != self._synced:
            with self._synced_changed:
                self._synced = synced
                self._synced_changed.notify_all()
