# SPDX-License-Identifier: Apache-2.0
"""What to do with the numbered frames of one publisher, so that each is applied once and in order, or the index starts over.

Pure: frames, ends of replays and times go in; calls of a `Sink` come out. No sockets, no clock, no thread: whoever drives it
calls it from one thread. Three things make it hold:

- **Frames held, not lost.** While a replay runs, live frames wait in a bounded table and are merged by number afterwards. If the
  table overflows, the newest go, and show up as the next gap: the publisher still has them.
- **Identity by content.** A restarted publisher counts from 0 again and may happen to continue our numbers, so the fingerprints of
  the last frames are kept, every replay starts a little before the missing frame, and what is repeated has to be the same.
- **Resync** when our place can't be found again: the sink is cleared, and all that the publisher still holds is replayed.

                 ┌──────────────── parted ─────────────────┐
                 ▼                                         │
    AWAY ── joined ──▶ ASKING ── replay complete ──▶ LIVE ─┤
                        ▲ │ no answer, holes left     │    │
                        │ ▼                           │ gap, doubt, idle check
                       RESTING ◀─ backoff             └──▶ ASKING
"""

from tandem_protocol.event_sequence_terms import Counts, Limits, Phase, Position, Sink, fingerprint


class Sequence:
    """The state of one publisher's stream. `now` is any clock in seconds that doesn't run backwards."""

    def __init__(self, sink: Sink, *, repairable: bool, limits: Limits | None = None, resume: Position | None = None) -> None:
        """`repairable`: the publisher has a replay endpoint. `resume`: what the sink already holds ends there."""
        self.counts = Counts()
        self.phase = Phase.AWAY
        self._sink = sink
        self._repairable = repairable
        self._limits = limits or Limits()
        self._next: int | None = None if resume is None else resume.next_seq
        self._recent: dict[int, int] = {} if resume is None else {resume.next_seq - 1: resume.fingerprint}
        self._held: dict[int, bytes] = {}
        self._verified = False
        """The replay in flight repeated a frame that we know, or began from nothing."""
        self._suspect = True
        """There is evidence of trouble; an idle check has none."""
        self._doubtful = False
        """While a replay ran, an old number came with new content."""
        self._attempts = 0
        self._asked_next: int | None = None
        self._answered_next = 0
        """One more than the highest number in the answer so far."""
        self._stuck_at: int | None = None
        self._due_s = 0.0

    @property
    def synced(self) -> bool:
        """Whether all that is known to be published is applied."""
        return self.phase is Phase.LIVE or (self.phase is not Phase.AWAY and not self._suspect)

    @property
    def last_seq(self) -> int:
        """Number of the last batch applied or skipped; -1 if there is none."""
        return -1 if self._next is None else self._next - 1

    @property
    def position(self) -> Position | None:
        """Where the sink's content ends; None if that is nowhere in particular."""
        known = None if self._next is None else self._recent.get(self._next - 1)
        return None if self._next is None or known is None else Position(self._next, known)

    def joined(self, now: float) -> None:
        """The subscription stands: what is published from now on will come as live frames."""
        self._suspect = True
        self._attempts = 0
        if not self._repairable:
            self._start_blind(now)
        elif self._recent:
            self._ask(now)
        else:
            self._start_over(now)

    def parted(self) -> None:
        """The connection broke. Nothing that came over it and was held counts any more: it will be replayed."""
        self.phase = Phase.AWAY
        self._held.clear()

    def broken(self) -> None:
        """The sink failed in the middle of something: what it holds is worth nothing, and the next `joined` starts over."""
        self.parted()
        self.counts.resyncs += 1
        self._next = None
        self._recent.clear()

    def live(self, seq: int, payload: bytes, now: float) -> None:
        """A frame off the subscription."""
        if self.phase is not Phase.LIVE:
            self._hold(seq, payload)
        elif self._next is None or seq == self._next:
            self._due_s = now + self._limits.check_s
            self._take_live(seq, payload, now)
        elif seq > self._next:
            self._meet_gap(seq, payload, now)
        else:
            self._meet_past(seq, payload, now)

    def replayed(self, seq: int, payload: bytes, now: float, *, whole: bool = False) -> None:
        """A frame that answers the last question; `whole`: what came before it is contained in the answer."""
        if self.phase is not Phase.ASKING:
            return
        self._due_s = now + self._limits.reply_s
        self._answered_next = max(self._answered_next, seq + 1)
        if self._next is None:
            self.counts.lost += 0 if whole else seq
            self._take_replayed(seq, payload)
        elif seq < self._next:
            self._compare(seq, payload, now)
        elif not self._verified:
            self.resync(now)  # it no longer holds the frames that we know
        elif seq == self._next:
            self._take_replayed(seq, payload)
        else:
            self._put_aside(seq, payload)

    def replay_ended(self, now: float) -> None:
        """The last question is answered in full."""
        if self.phase is not Phase.ASKING:
            return
        if not self._verified or self._answered_next < (self._asked_next or 0):
            self.counts.restarts += 1  # a publisher always holds its last frame, and this one's numbers end before ours
            self.resync(now)
            return
        if self._next is None and (0 in self._held or not self._held):
            self._next = 0
        if self._merge(now):
            self._conclude(now)

    def tick(self, now: float) -> None:
        """Acts on deadlines; call it a few times per second."""
        if now < self._due_s or self.phase is Phase.AWAY:
            return
        if self.phase is Phase.RESTING:
            self._ask(now)
        elif self.phase is Phase.ASKING:
            self._meet_silence(now)
        elif self._repairable:
            self._suspect = False
            self._ask(now)

    def unreadable(self, now: float) -> None:
        """A frame came that has no number: nobody knows what is missing now."""
        self.counts.malformed += 1
        if self.phase is Phase.LIVE:
            self.resync(now)
        else:
            self._doubtful = True

    def resync(self, now: float) -> None:
        """Forgets all, then takes all that the publisher still holds."""
        self.counts.resyncs += 1
        self._suspect = True
        self._attempts = 0
        if not self._repairable:
            self._start_blind(now)
        else:
            self._start_over(now)

    def check_integrity(self) -> None:
        """Raises AssertionError if the state contradicts itself."""
        expected = self._next
        if any(expected is None or seq >= expected for seq in self._recent):
            raise AssertionError(f"remembers frames that were not taken: {sorted(self._recent)}, next {expected}")
        if len(self._held) > self._limits.held_frames or len(self._recent) > self._limits.remembered:
            raise AssertionError("a bound is broken")
        if self.phase is Phase.LIVE and self._held:
            raise AssertionError(f"live with frames held: {sorted(self._held)}")

    def _meet_gap(self, seq: int, payload: bytes, now: float) -> None:
        self.counts.gaps += 1
        if self._repairable:
            self._suspect = True
            self._put_aside(seq, payload)
            self._ask(now)
        else:
            self.counts.lost += seq - (self._next or 0)
            self.resync(now)
            self._take_live(seq, payload, now)

    def _meet_past(self, seq: int, payload: bytes, now: float) -> None:
        if self._is_known(seq, payload):
            self.counts.duplicates += 1
        elif self._repairable:
            self._suspect = True
            self._ask(now)
        else:
            self.counts.restarts += 1
            self.resync(now)
            self._take_live(seq, payload, now)

    def _is_known(self, seq: int, payload: bytes) -> bool:
        return self._recent.get(seq) == fingerprint(payload)

    def _compare(self, seq: int, payload: bytes, now: float) -> None:
        if seq not in self._recent:
            return
        if self._is_known(seq, payload):
            self._verified = True
        else:
            self.counts.restarts += 1
            self.resync(now)

    def _meet_silence(self, now: float) -> None:
        self.counts.unanswered += 1
        if not self._verified or self._merge(now):
            self._try_again(now)

    def _hold(self, seq: int, payload: bytes) -> None:
        if self._next is None or seq >= self._next:
            self._put_aside(seq, payload)
        elif self._is_known(seq, payload):
            self.counts.duplicates += 1
        else:
            self._doubtful = True

    def _put_aside(self, seq: int, payload: bytes) -> None:
        if seq in self._held:
            self.counts.duplicates += 1
            self._doubtful |= self._held[seq] != payload
        elif len(self._held) < self._limits.held_frames:
            self._held[seq] = payload
        else:
            self.counts.overflows += 1

    def _merge(self, now: float) -> bool:
        """Takes what is held and follows on; what lies behind is dropped. False if that led to a resync."""
        while self._next is not None and self._next in self._held:
            if not self._take_live(self._next, self._held.pop(self._next), now):
                return False
        if self._next is not None:
            self._drop_held_before(self._next)
        return True

    def _drop_held_before(self, start: int) -> None:
        stale = [seq for seq in self._held if seq < start]
        self.counts.duplicates += len(stale)
        for seq in stale:
            del self._held[seq]

    def _take_live(self, seq: int, payload: bytes, now: float) -> bool:
        applied = self._apply(seq, payload)
        if not applied:
            self.resync(now)
        return applied

    def _take_replayed(self, seq: int, payload: bytes) -> None:
        """What the publisher itself can't give in a readable form is gone, and with it what went before."""
        if not self._apply(seq, payload):
            self.counts.lost += 1
            self.counts.resyncs += 1
            self._sink.clear()

    def _apply(self, seq: int, payload: bytes) -> bool:
        applied = self._sink.apply(seq, payload)
        self._next = seq + 1
        self._recent[seq] = fingerprint(payload)
        if len(self._recent) > self._limits.remembered:
            del self._recent[next(iter(self._recent))]
        self.counts.batches += applied
        self.counts.malformed += not applied
        return applied

    def _conclude(self, now: float) -> None:
        if self._held or self._doubtful:
            self._try_again(now)
        else:
            self._settle(now)

    def _settle(self, now: float) -> None:
        self.phase = Phase.LIVE
        self._suspect = False
        self._attempts = 0
        self._due_s = now + self._limits.check_s

    def _try_again(self, now: float) -> None:
        """After an incomplete replay: at once if it brought something, later if not, and something else after some attempts."""
        if self._next != self._asked_next:
            self._attempts = 0
            self._ask(now)
        elif self._attempts + 1 < self._limits.attempts:
            self._attempts += 1
            self._rest(now)
        else:
            self._give_up(now)

    def _rest(self, now: float) -> None:
        self.phase = Phase.RESTING
        self._due_s = now + min(self._limits.backoff_s * 2.0**self._attempts, self._limits.backoff_limit_s)

    def _give_up(self, now: float) -> None:
        """Nobody answered an idle check: go on. Stuck for the first time: resync. Stuck there again: skip what nobody has."""
        if not (self._suspect or self._held or self._doubtful):
            self._settle(now)
        elif self._recent and self._stuck_at != self._next:
            self._stuck_at = self._next
            self.resync(now)
        elif self._held:
            self._skip(now)
        else:
            self._rest(now)

    def _skip(self, now: float) -> None:
        first = min(self._held)
        self.counts.lost += first - (self._next or 0)
        self.counts.resyncs += 1
        self._forget(keep_held=True)
        self._next = first
        self._doubtful = False
        if self._merge(now):
            self._conclude(now)

    def _start_over(self, now: float) -> None:
        self._forget()
        self._ask(now)

    def _start_blind(self, now: float) -> None:
        """Without a replay endpoint all that can be had is what comes from now on."""
        waiting = sorted(self._held.items())
        self._forget()
        self._settle(now)
        for seq, payload in waiting:
            self.live(seq, payload, now)

    def _forget(self, *, keep_held: bool = False) -> None:
        self._sink.clear()
        self._next = None
        self._recent.clear()
        if not keep_held:
            self._held.clear()

    def _ask(self, now: float) -> None:
        if not self._recent:
            self._next = None
        self.phase = Phase.ASKING
        self._verified = not self._recent
        self._doubtful = False
        self._asked_next = self._next
        self._answered_next = 0
        self._due_s = now + self._limits.reply_s
        self.counts.replays += 1
        self._sink.ask(min(self._recent, default=0))
