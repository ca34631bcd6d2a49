# SPDX-License-Identifier: Apache-2.0
"""One publisher of KV events as the feed follows it: its sockets, its sequence, and its slot in the index.

`step` and `tick` belong to the feed's thread; `detach` and `state` may be called from any.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from tandem_protocol.errors import TandemError
from tandem_protocol.event_follower import Follower
from tandem_protocol.event_link import Link
from tandem_protocol.event_sequence import Sequence
from tandem_protocol.event_sequence_terms import Limits, Phase, Position
from tandem_protocol.kv_events import AllBlocksCleared, Event, EventBatch, Tier, decode
from tandem_protocol.workers import EventSource
from tandem_router.feed_snapshot import Place

_log = logging.getLogger(__name__)


class Index(Protocol):
    """What the feed needs of the index; `tandem_router.index.KvIndex` is one."""

    def apply(self, slot: int, event: Event) -> Any:
        """Takes one event of the worker and rank that `slot` stands for."""

    def clear(self, slot: int, tier: Tier) -> Any:
        """Forgets what `slot` holds in one tier."""

    def dump(self) -> bytes:
        """All that the index holds."""

    def load(self, raw: bytes) -> None:
        """Becomes what `dump` gave."""


class Observer(Protocol):
    """Is told what reaches the index; called by the feed's thread, so it has to be quick. The null object is `Silent`."""

    def applied(self, worker_id: str, dp_rank: int, batch: EventBatch) -> None:
        """The index has taken a batch."""

    def cleared(self, worker_id: str, dp_rank: int) -> None:
        """All blocks of this source were forgotten: a first join or a resync."""


class Silent:
    """An observer that does nothing."""

    def applied(self, worker_id: str, dp_rank: int, batch: EventBatch) -> None:
        """Nothing."""

    def cleared(self, worker_id: str, dp_rank: int) -> None:
        """Nothing."""


class SourceState(msgspec.Struct, frozen=True, kw_only=True):
    """One publisher, as metrics and `tandem status` show it; for the counters see `event_sequence_terms.Counts`."""

    worker_id: str
    dp_rank: int
    endpoint: str
    slot: int
    connected: bool
    synced: bool
    last_seq: int
    blocks: int
    """Stored and removed, over all batches."""
    lag_s: float
    """From publication to the index, of the last batch, by both hosts' clocks."""
    failures: int
    """Exceptions of the index or the observer; each is followed by a resync."""
    batches: int
    duplicates: int
    gaps: int
    replays: int
    unanswered: int
    resyncs: int
    restarts: int
    malformed: int
    overflows: int
    lost: int


class SourceFeed:
    """Follows one publisher. It is the sequence's sink: what the sequence decides is done here."""

    def __init__(
        self, worker_id: str, source: EventSource, slot: int, *, link: Link, index: Index, observer: Observer,
        wall: Callable[[], float], limits: Limits, resume: Position | None = None,
    ) -> None:
        """`wall`: seconds since the epoch, for the lag. `resume`: where the index's content of this slot ends."""
        self.worker_id = worker_id
        self.source = source
        self.slot = slot
        self.link = link
        self.sequence = Sequence(self, repairable=bool(source.replay_endpoint), limits=limits, resume=resume)
        self._follower = Follower(link, self.sequence, f"worker={worker_id} dp_rank={source.dp_rank}")
        self._index = index
        self._observer = observer
        self._wall = wall
        self._gate = threading.Lock()
        self._detached = False
        self._blocks = 0
        self._lag_s = 0.0

    def step(self, now: float) -> None:
        """Takes up to a burst of what arrived, without waiting. An exception of index or observer is counted, logged, and repaired."""
        self._follower.step(now)

    def tick(self, now: float) -> None:
        """Acts on deadlines."""
        self._follower.tick(now)

    def detach(self) -> None:
        """After this returns nothing more reaches the index from here. Waits for one batch at most."""
        with self._gate:
            self._detached = True

    def place(self) -> Place | None:
        """Where the index's content of this source ends; None if it must be replayed from the beginning anyway."""
        position = self.sequence.position
        if position is None:
            return None
        return Place(self.worker_id, self.source.endpoint, self.source.dp_rank, self.slot, position)

    def state(self) -> SourceState:
        """A copy of all figures; those of a moving source may be some frames apart."""
        return SourceState(
            worker_id=self.worker_id, dp_rank=self.source.dp_rank, endpoint=self.source.endpoint, slot=self.slot,
            connected=self.sequence.phase is not Phase.AWAY, synced=self.sequence.synced, last_seq=self.sequence.last_seq,
            blocks=self._blocks, lag_s=self._lag_s, failures=self._follower.failures, **vars(self.sequence.counts),
        )

    def apply(self, seq: int, payload: bytes) -> bool:
        """Decodes and applies one batch."""
        try:
            batch = decode(payload)
        except (msgspec.DecodeError, TandemError) as exc:
            _log.warning("feed.malformed worker=%s dp_rank=%d seq=%d: %s", self.worker_id, self.source.dp_rank, seq, exc)
            return False
        with self._gate:
            if not self._detached and self._concerns(batch):
                self._apply(batch)
        return True

    def clear(self) -> None:
        """Forgets the slot."""
        with self._gate:
            if not self._detached:
                for tier in Tier:
                    self._index.clear(self.slot, tier)
                self._observer.cleared(self.worker_id, self.source.dp_rank)

    def ask(self, start: int) -> None:
        """Asks the publisher for a replay."""
        self.link.ask(start)

    def _concerns(self, batch: EventBatch) -> bool:
        """A merged stream carries every rank's batches; one without a rank is everybody's."""
        return not self.source.merged or batch.dp_rank in (None, self.source.dp_rank)

    def _apply(self, batch: EventBatch) -> None:
        for event in batch.events:
            self._index.apply(self.slot, event)
            self._blocks += 0 if isinstance(event, AllBlocksCleared) else len(event.hashes)
        self._lag_s = self._wall() - batch.timestamp_s
        self._observer.applied(self.worker_id, self.source.dp_rank, batch)
