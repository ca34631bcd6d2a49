# SPDX-License-Identifier: Apache-2.0
"""The pure gap logic, driven by a model of a publisher and of a network that does its worst."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_protocol.event_sequence import Sequence
from tandem_protocol.event_sequence_terms import Limits, Phase, Position, fingerprint

_LIMITS = Limits(held_frames=6, remembered=4)


@dataclass
class _Content:
    """A sink that keeps what was applied since it was last cleared; payloads in `unreadable` are refused."""

    applied: list[tuple[int, bytes]] = field(default_factory=list)
    clears: int = 0
    asked: int | None = None
    unreadable: set[bytes] = field(default_factory=set)

    def apply(self, seq: int, payload: bytes) -> bool:
        if payload in self.unreadable:
            return False
        self.applied.append((seq, payload))
        return True

    def clear(self) -> None:
        self.applied.clear()
        self.clears += 1

    def ask(self, start: int) -> None:
        self.asked = start


class _World:
    """A publisher as vLLM's, a network, and the sequence under test; time is a number."""

    def __init__(self, *, repairable: bool = True, buffer_steps: int = 10_000, resume: Position | None = None) -> None:
        self.sink = _Content()
        self.sequence = Sequence(self.sink, repairable=repairable, limits=_LIMITS, resume=resume)
        self.buffer_steps = buffer_steps
        self.epoch = 0
        self.published: list[tuple[int, bytes]] = []
        self.in_flight: list[tuple[int, bytes]] = []
        self.now = 0.0

    @property
    def buffer(self) -> list[tuple[int, bytes]]:
        return self.published[-self.buffer_steps :]

    def publish(self, count: int = 1) -> None:
        for _ in range(count):
            seq = len(self.published)
            self.published.append((seq, f"{self.epoch}:{seq}".encode()))
            self.in_flight.append(self.published[-1])

    def deliver(self, count: int = 1_000) -> None:
        for _ in range(min(count, len(self.in_flight))):
            self.sequence.live(*self.in_flight.pop(0), self.now)

    def drop(self) -> None:
        del self.in_flight[:1]

    def duplicate(self) -> None:
        self.in_flight[:0] = self.in_flight[:1]

    def reorder(self) -> None:
        self.in_flight[:2] = reversed(self.in_flight[:2])

    def answer(self, *, only: int | None = None) -> None:
        """Answers the open question, or only the first frames of it without the end."""
        asked, self.sink.asked = self.sink.asked, None
        if asked is None:
            return
        frames = [frame for frame in self.buffer if frame[0] >= asked]
        for frame in frames[:only]:
            if self.sink.asked is not None:  # a new question cuts the old answer off
                return
            self.sequence.replayed(*frame, self.now)
        if only is None and self.sink.asked is None:
            self.sequence.replay_ended(self.now)

    def answer_partly(self) -> None:
        self.answer(only=2)

    def lose_the_question(self) -> None:
        self.sink.asked = None

    def wait(self) -> None:
        self.now += 10.0
        self.sequence.tick(self.now)

    def part(self) -> None:
        self.in_flight.clear()
        self.sink.asked = None
        self.sequence.parted()

    def join(self) -> None:
        if self.sequence.phase is Phase.AWAY:
            self.sequence.joined(self.now)

    def restart(self) -> None:
        """The publisher dies and comes back; the connection breaks with it."""
        self.part()
        self.epoch += 1
        self.published.clear()
        self.join()

    def restart_unseen(self) -> None:
        """The same behind a proxy, whose connection stays."""
        self.epoch += 1
        self.published.clear()

    def repair(self) -> None:
        """A healthy network from now on."""
        self.join()
        self.deliver()
        for _ in range(40):
            self.wait()
            self.answer()


_OPERATIONS = ["publish", "publish", "publish", "deliver", "drop", "duplicate", "reorder", "answer", "answer", "answer_partly",
               "lose_the_question", "wait", "part", "join", "restart", "restart_unseen"]


def _perform(world: _World, operations: list[str]) -> None:
    for operation in operations:
        getattr(world, operation)()
        world.sequence.check_integrity()
        assert [seq for seq, _ in world.sink.applied] == sorted({seq for seq, _ in world.sink.applied})


@given(st.lists(st.sampled_from(_OPERATIONS), max_size=80))
def test_any_disorder_followed_by_repair_ends_with_each_frame_once_and_in_order(operations: list[str]) -> None:
    """Nothing missed, nothing doubled, nothing of an earlier publisher left, whatever the network did."""
    world = _World()
    _perform(world, ["join", *operations])
    world.repair()
    assert world.sequence.phase is Phase.LIVE
    assert world.sink.applied == world.published


@given(st.lists(st.sampled_from(_OPERATIONS), max_size=80), st.integers(1, 6))
def test_with_a_short_replay_buffer_at_least_what_it_holds_is_applied_last(operations: list[str], buffer_steps: int) -> None:
    """What is gone for good costs a resync, and no more than that."""
    world = _World(buffer_steps=buffer_steps)
    _perform(world, ["join", *operations])
    world.repair()
    assert world.sequence.phase is Phase.LIVE
    assert world.sink.applied[-buffer_steps:] == world.buffer
    assert world.sink.applied == world.published[len(world.published) - len(world.sink.applied) :]


@given(st.lists(st.sampled_from([op for op in _OPERATIONS if "restart" not in op]), max_size=60))
def test_without_a_replay_endpoint_what_is_applied_is_an_unbroken_run(operations: list[str]) -> None:
    """After a loss only what followed it counts."""
    world = _World(repairable=False)
    _perform(world, ["join", *operations])
    seqs = [seq for seq, _ in world.sink.applied]
    assert seqs == list(range(seqs[0], seqs[-1] + 1)) if seqs else True
    assert world.sink.asked is None


def _synced(frames: int) -> _World:
    world = _World()
    world.join()
    world.publish(frames)
    world.deliver()
    world.answer()
    assert world.sequence.phase is Phase.LIVE
    return world


def test_a_late_joiner_gets_what_was_published_before_and_holds_what_comes_meanwhile() -> None:
    """Subscribe, replay from 0, then the frames that arrived during the replay."""
    world = _World()
    world.publish(5)
    world.in_flight.clear()
    world.join()
    world.publish(2)
    world.deliver()
    assert world.sink.applied == []
    assert not world.sequence.synced
    world.answer()
    assert world.sink.applied == world.published
    assert world.sequence.synced
    assert world.sequence.counts.resyncs == 0


def test_a_gap_is_repaired_by_a_replay_and_clears_nothing() -> None:
    """One gap, one replay, no resync."""
    world = _synced(5)
    clears = world.sink.clears
    world.publish(3)
    world.drop()
    world.deliver()
    world.answer()
    assert world.sink.applied == world.published
    assert world.sink.clears == clears
    assert (world.sequence.counts.gaps, world.sequence.counts.resyncs, world.sequence.counts.lost) == (1, 0, 0)


def test_an_idle_check_finds_a_lost_tail() -> None:
    """No later frame shows the gap; silence does."""
    world = _synced(2)
    world.publish()
    world.drop()
    world.wait()
    assert world.sequence.synced
    world.answer()
    assert world.sink.applied == world.published


def test_a_restarted_publisher_that_continues_our_numbers_is_found_out() -> None:
    """The new publisher's first frames got lost, so that its next one fits; the idle check compares contents."""
    world = _synced(3)
    world.restart_unseen()
    world.publish(4)
    del world.in_flight[:3]
    world.deliver()
    world.wait()
    world.answer()
    world.answer()
    assert world.sink.applied == world.published
    assert (world.sequence.counts.restarts, world.sequence.counts.resyncs) == (1, 1)


def test_a_frame_that_only_the_publisher_has_never_got_is_skipped_with_a_clear() -> None:
    """vLLM burns a number if a batch can't be encoded: a hole that no replay fills."""
    world = _synced(3)
    world.publish(3)
    del world.published[3]
    world.drop()
    world.deliver()
    world.repair()
    assert world.sequence.phase is Phase.LIVE
    assert world.sink.applied == world.published[3:]
    assert world.sequence.counts.lost == 1


def test_a_frame_broken_on_its_way_is_replayed() -> None:
    """Malformed once, then as it should be."""
    world = _synced(3)
    world.sequence.live(3, b"not this", world.now)  # stands for a broken copy
    world = _synced(3)
    world.sink.unreadable.add(b"broken")
    world.publish()
    world.in_flight[0] = (3, b"broken")
    world.deliver()
    world.answer()
    assert world.sink.applied == world.published
    assert (world.sequence.counts.malformed, world.sequence.counts.resyncs) == (1, 1)


def test_a_frame_malformed_at_its_origin_costs_what_was_before_it_and_no_endless_resync() -> None:
    """Its own copy in the replay buffer is as bad."""
    world = _synced(3)
    world.publish(3)
    world.sink.unreadable.add(world.published[3][1])
    world.deliver()
    world.repair()
    assert world.sink.applied == world.published[4:]
    assert world.sequence.counts.lost == 1
    assert world.sequence.counts.malformed == 2


def test_a_frame_without_a_number_leads_to_a_resync() -> None:
    """Nobody knows what it was."""
    world = _synced(3)
    world.sequence.unreadable(world.now)
    world.answer()
    assert world.sink.applied == world.published
    assert (world.sequence.counts.malformed, world.sequence.counts.resyncs) == (1, 1)


def test_an_idle_check_that_nobody_answers_changes_nothing() -> None:
    """A dead replay endpoint alone is no evidence of loss."""
    world = _synced(3)
    clears = world.sink.clears
    for _ in range(12):
        world.wait()
    assert world.sequence.synced
    assert world.sink.clears == clears
    assert world.sequence.counts.unanswered > 0


def test_a_publisher_that_never_answers_is_followed_without_its_past() -> None:
    """After the attempts, what comes live is better than nothing."""
    world = _World()
    world.publish(4)
    world.in_flight.clear()
    world.join()
    world.publish(2)
    world.deliver()
    for _ in range(20):
        world.lose_the_question()
        world.wait()
    assert world.sink.applied == world.published[4:]
    assert world.sequence.counts.lost == 4


def test_frames_beyond_the_bound_are_let_go_and_replayed_later() -> None:
    """A full table costs another replay, not a cleared slot."""
    world = _World()
    world.join()
    world.publish(10)
    world.deliver()
    assert world.sequence.counts.overflows == 4
    world.in_flight.clear()
    world.answer()
    world.wait()
    world.answer()
    assert world.sink.applied == world.published
    assert world.sequence.counts.resyncs == 0


def test_a_restored_place_replays_only_the_tail() -> None:
    """The snapshot holds the first three."""
    world = _World(resume=Position(3, fingerprint(b"0:2")))
    world.publish(5)
    world.in_flight.clear()
    world.join()
    world.answer()
    assert world.sink.applied == world.published[3:]
    assert world.sink.clears == 0


@pytest.mark.parametrize("published", [1, 3, 8])
def test_a_restored_place_in_another_publishers_stream_is_dropped(published: int) -> None:
    """Whether its numbers are below ours or its content differs."""
    world = _World(resume=Position(3, fingerprint(b"something else")))
    world.publish(published)
    world.in_flight.clear()
    world.join()
    world.repair()
    assert world.sink.applied == world.published
    assert world.sequence.counts.restarts == 1


def test_after_a_failure_of_the_sink_the_next_join_starts_over() -> None:
    """Half an applied batch is worth nothing."""
    world = _synced(3)
    world.sequence.broken()
    assert world.sequence.position is None
    world.join()
    world.answer()
    assert world.sink.applied == world.published


@pytest.mark.parametrize(("whole", "lost"), [(True, 0), (False, 7)])
def test_an_answer_that_is_a_dump_has_lost_nothing(whole: bool, lost: int) -> None:
    """Its numbers begin late, but it holds all that came before."""
    world = _World()
    world.join()
    world.in_flight.clear()
    world.sequence.replayed(7, b"0:7", 0.0, whole=whole)
    assert world.sequence.counts.lost == lost
    assert world.sink.applied == [(7, b"0:7")]
