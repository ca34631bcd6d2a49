# SPDX-License-Identifier: Apache-2.0
"""What one router knows of another's books: a state, and the numbered changes since. Pure: it is told what came and says what to do.

The subscription stands before the state is asked for, so every change after the state is on its way here. A number that is
missing, a subscription that was made anew, or changes that pile up while a state is due: the state is asked for again. What is
known stays until then, since loads that are a moment old are better than none.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tandem_router.book_events import Add, BookEvent

_ANSWER_S = 1.0
"""A state that has not come by then is asked for again."""
_MAX_PENDING = 4096
"""Batches that may wait for a state."""


class Sink(Protocol):
    """What the stream acts on."""

    def ask(self, number: int) -> None:
        """Asks the other router for its state; the answer carries the number."""

    def replace(self, requests: Sequence[Add]) -> None:
        """Forgets all requests of the other router and books these."""

    def apply(self, events: Sequence[BookEvent]) -> None:
        """Books changes."""


@dataclass
class StreamCounts:
    """What happened since the other router was found; for metrics."""

    batches: int = 0
    """Applied."""
    lost: int = 0
    """Numbers that never came."""
    dropped: int = 0
    """Batches that found no room while a state was due."""
    resyncs: int = 0
    """States asked for again after a loss or a broken connection."""
    unanswered: int = 0


class ReplicaStream:
    """The changes of one router. `now` is of a monotonic clock, in seconds."""

    def __init__(self, sink: Sink) -> None:
        self.counts = StreamCounts()
        self._sink = sink
        self._last: int | None = None
        """Number of the batch that the books are at; None before the first state."""
        self._number = 0
        self._asked_s: float | None = None
        self._pending: deque[tuple[int, Sequence[BookEvent]]] = deque()

    @property
    def synced(self) -> bool:
        """Whether the books follow the other router's."""
        return self._last is not None and self._asked_s is None

    def joined(self, now: float) -> None:
        """The subscription stands, for the first time or again."""
        if self._last is not None:
            self.counts.resyncs += 1
        self._ask(now)

    def batch(self, seq: int, events: Sequence[BookEvent], now: float) -> None:
        """Changes, or none: then it is a sign of life that tells the last number."""
        if self._last is None and self._asked_s is None:
            return  # not greeted yet: the state will hold it
        if self._asked_s is not None:
            self._keep(seq, events)
        elif not self._take(seq, events):
            self._lose(seq - bool(events), now)

    def state(self, number: int, seq: int, requests: Sequence[Add], now: float) -> None:
        """The other router's requests as of batch `seq`; an answer to an earlier question is nothing."""
        if self._asked_s is None or number != self._number:
            return
        self._sink.replace(requests)
        self._last, self._asked_s = seq, None
        pending, self._pending = self._pending, deque()
        for later, events in pending:
            self.batch(later, events, now)

    def tick(self, now: float) -> None:
        """Asks again for an answer that is overdue."""
        if self._asked_s is not None and now - self._asked_s >= _ANSWER_S:
            self.counts.unanswered += 1
            self._ask(now)

    def _take(self, seq: int, events: Sequence[BookEvent]) -> bool:
        """False if something is missing before it."""
        assert self._last is not None
        if not events:
            return seq <= self._last
        if seq == self._last + 1:
            self._sink.apply(events)
            self._last = seq
            self.counts.batches += 1
        return seq <= self._last

    def _lose(self, until: int, now: float) -> None:
        assert self._last is not None
        self.counts.lost += until - self._last
        self.counts.resyncs += 1
        self._ask(now)

    def _ask(self, now: float) -> None:
        self._number += 1
        self._asked_s = now
        self._sink.ask(self._number)

    def _keep(self, seq: int, events: Sequence[BookEvent]) -> None:
        if len(self._pending) >= _MAX_PENDING:
            self._pending.popleft()  # the gap shows when the state is there
            self.counts.dropped += 1
        self._pending.append((seq, events))
