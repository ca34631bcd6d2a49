# SPDX-License-Identifier: Apache-2.0
"""Takes what arrives over the link to one publisher of KV events into its sequence. Driven by one thread, which polls the link."""

import logging

from tandem_protocol.event_link import Change, Link, parse_live, parse_replayed
from tandem_protocol.event_sequence import Sequence

_log = logging.getLogger(__name__)
_BURST = 256
"""Frames of one publisher per wake-up, so that none keeps the others waiting."""
_REPAIR_PAUSE_S = 1.0


class Follower:
    """Follows one publisher. An exception of the sequence's sink is counted, logged, and repaired by starting over."""

    def __init__(self, link: Link, sequence: Sequence, label: str) -> None:
        """`label` names the publisher in the log."""
        self.failures = 0
        """Exceptions of the sink; each is followed by a resync."""
        self._link = link
        self._sequence = sequence
        self._label = label
        self._reopen_s: float | None = None

    def step(self, now: float) -> None:
        """Takes up to a burst of what arrived, without waiting."""
        try:
            self._step(now)
        except Exception:
            self._fail(now)

    def tick(self, now: float) -> None:
        """Acts on deadlines."""
        try:
            if self._reopen_s is not None and now >= self._reopen_s:
                self._reopen_s = None
                self._link.reopen()
            self._sequence.tick(now)
        except Exception:
            self._fail(now)

    def _step(self, now: float) -> None:
        received = self._link.live(_BURST)
        # Only now: whatever came over a connection that broke before this moment must not pass for the next one's.
        for change in self._link.changes():
            if change is Change.PARTED:
                received = []
                self._sequence.parted()
            else:
                self._sequence.joined(now)
        for parts in received:
            self._take_live(parts, now)
        for _ in range(_BURST):
            if not self._take_replayed(now):
                break

    def _take_live(self, parts: list[bytes], now: float) -> None:
        frame = parse_live(parts)
        if frame is None or frame.seq is None:
            self._sequence.unreadable(now)
        else:
            self._sequence.live(frame.seq, frame.payload, now)

    def _take_replayed(self, now: float) -> bool:
        parts = self._link.replayed()
        if parts is None:
            return False
        frame = parse_replayed(parts)
        if frame is None:
            self._sequence.unreadable(now)
        elif frame.seq is None:
            self._link.answered()
            self._sequence.replay_ended(now)
        else:
            self._sequence.replayed(frame.seq, frame.payload, now, whole=frame.whole)
        return True

    def _fail(self, now: float) -> None:
        self.failures += 1
        _log.exception("feed.failed %s: it starts over", self._label)
        self._sequence.broken()
        self._reopen_s = now + _REPAIR_PAUSE_S
