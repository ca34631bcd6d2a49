# SPDX-License-Identifier: Apache-2.0
"""One publisher that the consolidator follows: its link, its sequence, its name in the tracker. Everything runs in the pump's thread."""

import logging
from collections.abc import Callable

import msgspec

from tandem_kvbm.consolidator.plan import Publisher
from tandem_kvbm.consolidator.tracker import Change, Tracker
from tandem_protocol.errors import TandemError
from tandem_protocol.event_follower import Follower
from tandem_protocol.event_link import Link
from tandem_protocol.event_sequence import Sequence
from tandem_protocol.event_sequence_terms import Limits, Phase, Position
from tandem_protocol.workers import EventSource

_log = logging.getLogger(__name__)


class Intake:
    """The sink of one publisher's sequence: what arrives in order goes to the tracker, and what comes of it is published."""

    def __init__(
        self, publisher: Publisher, link: Link, tracker: Tracker, publish: Callable[[Change], None], *, clock: Callable[[], float],
        wall: Callable[[], float], limits: Limits, resume: Position | None,
    ) -> None:
        self.publisher = publisher
        self.link = link
        self.sequence = Sequence(self, repairable=bool(publisher.replay_endpoint), limits=limits, resume=resume)
        self._follower = Follower(link, self.sequence, f"publisher={publisher.name}")
        self._tracker = tracker
        self._publish = publish
        self._clock = clock
        self._wall = wall

    @property
    def connected(self) -> bool:
        """Whether the subscription stands."""
        return self.sequence.phase is not Phase.AWAY

    @property
    def failures(self) -> int:
        """Exceptions in the tracker; each was followed by a resync."""
        return self._follower.failures

    def step(self, now: float) -> None:
        """Takes what arrived."""
        self._follower.step(now)

    def tick(self, now: float) -> None:
        """Acts on deadlines."""
        self._follower.tick(now)

    def apply(self, seq: int, payload: bytes) -> bool:
        """One batch, in order; False if it can't be read."""
        try:
            changes = self._tracker.apply(self.publisher.name, payload, self._clock())
        except (msgspec.DecodeError, TandemError) as exc:
            _log.warning("consolidator.malformed publisher=%s seq=%d: %s", self.publisher.name, seq, exc)
            return False
        for change in changes:
            self._publish(change)
        return True

    def clear(self) -> None:
        """Nothing of this publisher counts any more."""
        for change in self._tracker.forget(self.publisher.name, self._wall()):
            self._publish(change)

    def ask(self, start: int) -> None:
        """Asks for a replay."""
        self.link.ask(start)


def make_link(context: object, publisher: Publisher) -> Link:
    """Raises ConfigError for an endpoint of the wrong form."""
    source = EventSource(dp_rank=max(publisher.rank, 0), endpoint=publisher.endpoint, replay_endpoint=publisher.replay_endpoint)
    return Link(context, source)  # type: ignore[arg-type]
