# SPDX-License-Identifier: Apache-2.0
"""The consolidator against the rule in plain sets: any events, and streams that drop, double, swap and restart on both sides."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from consolidators import CLEARED, Consumer, Model, named, payload, removed, stored
from tandem_kvbm.consolidator.history import Dump, History, frames, make_dump
from tandem_kvbm.consolidator.lane import Lane
from tandem_kvbm.consolidator.state_file import load_lane, save_lane
from tandem_kvbm.consolidator.table import FLAGS, ROOTED
from tandem_kvbm.consolidator.tracker import Tracker
from tandem_protocol.event_link import DUMP_TOPIC
from tandem_protocol.event_sequence import Sequence
from tandem_protocol.event_sequence_terms import Limits, Position
from tandem_protocol.kv_events import Tier

_LIMITS = Limits(reply_s=1.0, backoff_s=0.1, check_s=5.0, remembered=4, held_frames=16)
_RANKS = {"engine": 0, "tiers": 0}
_PARENT = {block: None if block % 5 == 0 else block - 1 for block in range(20)}
"""Four sequences of five blocks: parents are a matter of the hash, as they are in an engine."""

_blocks = st.integers(0, 19)
_fields = st.fixed_dictionaries({"group_idx": st.sampled_from([0, 1])}, optional={"ownership": st.sampled_from(["a", "b"])})
_mediums = st.sampled_from(["GPU", "CPU", "STORAGE"])


@st.composite
def _stores(draw: st.DrawFn) -> dict[str, Any]:
    first = draw(_blocks)
    last = draw(st.integers(first, first - first % 5 + 4))
    return stored(list(range(first, last + 1)), _PARENT[first], draw(_mediums), **draw(_fields))


_events = st.one_of(
    _stores(), _stores(), st.builds(lambda block, medium, more: named([block], medium, **more), _blocks, _mediums, _fields),
    st.builds(lambda blocks, medium, more: removed(blocks, medium, **more), st.lists(_blocks, min_size=1, max_size=4), _mediums, _fields),
    st.builds(lambda blocks, medium: removed(blocks, medium), st.lists(_blocks, min_size=1, max_size=4), _mediums), st.just(CLEARED),
)


@st.composite
def _runs(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Events in a row that differ only in their blocks, in any order, some of them twice: what tiers send, and is done at once."""
    medium, more = draw(_mediums), draw(_fields)
    firsts = draw(st.lists(_blocks, min_size=2, max_size=8))
    sizes = [draw(st.integers(1, 2)) if first % 5 < 4 else 1 for first in firsts]
    return [stored(list(range(first, first + size)), _PARENT[first], medium, **more) for first, size in zip(firsts, sizes, strict=True)]


_batches = st.one_of(st.lists(_events, min_size=1, max_size=4), _runs(), st.builds(list.__add__, _runs(), _runs()))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["engine", "tiers"]), _batches), max_size=30), st.integers(0, 30))
def test_consumers_hold_what_the_rule_says(batches: list[tuple[str, list[dict[str, Any]]]], forgotten: int) -> None:
    """At every step, also when a publisher starts over; and a dump makes the same of nothing."""
    tracker, model, consumer = Tracker(_RANKS), Model(), Consumer()
    for number, (source, events) in enumerate(batches):
        changes = tracker.forget(source, 0.0) if number == forgotten else []
        model.drop(source) if number == forgotten else None
        changes += tracker.apply(source, payload(*events), 0.0)
        for event in events:
            model.apply(source, event)
        for change in changes:
            consumer.apply(change.payload())
        tracker.lanes[0].check_integrity()
        assert consumer.held == model.held()
    late = Consumer()
    for raw in frames([(0, tracker.lanes[0].content)], 0.0, 4):
        late.apply(raw)
    assert late.held == consumer.held


class _Publisher:
    """A numbered stream with its replay buffer; a restart begins again at 0 with nothing."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []

    def answer(self, start: int) -> Iterator[tuple[int, bytes, bool]]:
        return ((seq, raw, False) for seq, raw in enumerate(self.payloads) if seq >= start)


class _Published:
    """What the consolidator publishes, with a buffer so short that late joiners need dumps."""

    def __init__(self, tracker: Tracker) -> None:
        self.history = History(3)
        self._tracker = tracker

    def answer(self, start: int) -> Iterator[tuple[int, bytes, bool]]:
        dump: Dump | None = None
        if self.history.needs_dump(start, None):
            dump = make_dump(self.history.end, [(0, self._tracker.lanes[0].content)], 0.0)
        return ((frame.seq, frame.payload, frame.topic == DUMP_TOPIC) for frame in self.history.answer(start, dump))


class _Leg:
    """A network between a publisher and the sequence of whoever follows it; itself the sequence's sink."""

    def __init__(self, resume: Position | None = None) -> None:
        self.in_flight: list[tuple[int, bytes]] = []
        self.question: int | None = None
        self.sequence = Sequence(self, repairable=True, limits=_LIMITS, resume=resume)

    def apply(self, seq: int, payload: bytes) -> bool:
        raise NotImplementedError

    def clear(self) -> None:
        raise NotImplementedError

    def ask(self, start: int) -> None:
        self.question = start

    def spoil(self, fault: str) -> None:
        """What a network does to the frames in flight."""
        if fault == "drop":
            del self.in_flight[:1]
        elif fault == "double":
            self.in_flight[:0] = self.in_flight[:1]
        elif fault == "swap":
            self.in_flight[:2] = reversed(self.in_flight[:2])

    def deliver(self, now: float) -> None:
        while self.in_flight:
            self.sequence.live(*self.in_flight.pop(0), now)

    def answer(self, publisher: "_Publisher | _Published", now: float) -> None:
        while self.question is not None:
            start, self.question = self.question, None
            for seq, raw, whole in publisher.answer(start):
                self.sequence.replayed(seq, raw, now, whole=whole)
                if self.question is not None:
                    break
            else:
                self.sequence.replay_ended(now)


class _Inward(_Leg):
    """From one publisher into the consolidator."""

    def __init__(self, world: "_World", source: str, resume: Position | None = None) -> None:
        super().__init__(resume)
        self._world = world
        self._source = source

    def apply(self, seq: int, payload: bytes) -> bool:
        self._world.publish(self._world.tracker.apply(self._source, payload, 0.0))
        return True

    def clear(self) -> None:
        self._world.publish(self._world.tracker.forget(self._source, 0.0))


class _Outward(_Leg):
    """From the consolidator into a router."""

    def __init__(self) -> None:
        super().__init__()
        self.consumer = Consumer()

    def apply(self, seq: int, payload: bytes) -> bool:
        self.consumer.apply(payload)
        return True

    def clear(self) -> None:
        self.consumer.held.clear()


class _World:
    """Two publishers, a consolidator, a router."""

    def __init__(self) -> None:
        self.now = 0.0
        self.stamp = 0.0
        self.publishers = {source: _Publisher() for source in _RANKS}
        self.order: list[tuple[str, dict[str, Any]]] = []
        self.tracker = Tracker(_RANKS)
        self.published = _Published(self.tracker)
        self.outward = _Outward()
        self.inward = {source: _Inward(self, source) for source in _RANKS}
        for leg in (*self.inward.values(), self.outward):
            leg.sequence.joined(self.now)

    def publish(self, changes: list[Any]) -> None:
        for change in changes:
            self._send(change.payload())

    def emit(self, source: str, events: list[dict[str, Any]]) -> None:
        """A publisher publishes."""
        self.stamp += 1
        publisher = self.publishers[source]
        publisher.payloads.append(payload(*events, at_s=self.stamp))
        self.order += [(source, event) for event in events]
        self.inward[source].in_flight.append((len(publisher.payloads) - 1, publisher.payloads[-1]))

    def restart_publisher(self, source: str) -> None:
        """Another process in the same place, with nothing."""
        self.publishers[source].payloads.clear()
        self.order = [entry for entry in self.order if entry[0] != source]
        self._reconnect(self.inward[source])

    def restart_consolidator(self, *, saved: bool) -> None:
        """Another process, with the state of the last one or without."""
        lane = self.tracker.lanes[0]
        lanes = {0: Lane(None, load_lane(save_lane(lane.content, lane.places)), list(lane.places))} if saved else {}
        self.tracker = Tracker(_RANKS, None, lanes)
        self.published = _Published(self.tracker)
        self._reconnect(self.outward)
        for raw in frames([(0, self.tracker.lanes[0].content)], self.stamp + 0.5):
            self._send(raw)
        places = {source: leg.sequence.position for source, leg in self.inward.items()}
        self.inward = {source: _Inward(self, source, places[source] if saved else None) for source in _RANKS}
        for leg in self.inward.values():
            leg.sequence.joined(self.now)

    def run(self) -> None:
        """Everything arrives and everything asked for is answered."""
        for source, leg in self.inward.items():
            leg.deliver(self.now)
            leg.answer(self.publishers[source], self.now)
        self.outward.deliver(self.now)
        self.outward.answer(self.published, self.now)

    def repair(self) -> None:
        """Time goes by, without further faults."""
        for _ in range(12):
            self.now += 6.0
            self.run()
            for leg in (*self.inward.values(), self.outward):
                leg.sequence.tick(self.now)
        self.run()

    def claimed(self) -> dict[Any, int]:
        """Who holds what, by what each publisher has published; between publishers there is no order."""
        model = Model()
        for source, event in self.order:
            model.apply(source, event)
        return dict(model.claims)

    def _send(self, raw: bytes) -> None:
        self.outward.in_flight.append((self.published.history.add(raw), raw))

    def _reconnect(self, leg: _Leg) -> None:
        leg.sequence.parted()
        leg.in_flight.clear()
        leg.sequence.joined(self.now)


_actions = st.one_of(
    st.tuples(st.just("emit"), st.sampled_from(["engine", "tiers"]), _batches),
    st.tuples(st.just("emit"), st.sampled_from(["engine", "tiers"]), _batches),
    st.tuples(st.just("fault"), st.sampled_from(["engine", "tiers", "router"]), st.sampled_from(["drop", "double", "swap"])),
    st.tuples(st.just("run"), st.none(), st.none()),
    st.tuples(st.just("restart"), st.sampled_from(["engine", "tiers", "consolidator", "saved consolidator", "router"]), st.none()),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_actions, max_size=40))
def test_after_any_faults_nothing_is_lost_and_the_router_holds_what_is_published(actions: list[tuple[str, Any, Any]]) -> None:
    """Frames lost, doubled and swapped on either side, and restarts of publishers, consolidator (with its state and without) and router.

    Every claim of every publisher counts, none is left over. Which blocks wait for a parent is for the test above: it depends on the
    order between publishers, which nobody knows.
    """
    world = _World()
    for what, whom, how in actions:
        if what == "emit":
            world.emit(whom, how)
        elif what == "fault":
            (world.outward if whom == "router" else world.inward[whom]).spoil(how)
        elif what == "run":
            world.run()
        elif whom in _RANKS:
            world.restart_publisher(whom)
        elif whom == "router":
            world.outward = _Outward()
            world.outward.sequence.joined(world.now)
        else:
            world.restart_consolidator(saved=whom == "saved consolidator")
    world.repair()
    lane = world.tracker.lanes[0]
    lane.check_integrity()
    assert _claims(lane) == world.claimed()
    assert world.outward.consumer.held.keys() == _published(lane)


def _claims(lane: Lane) -> dict[Any, int]:
    table = lane.content.table
    return {(place.source, place.owner.name, place.unit.tier, place.unit.group, int(table.hashes[slot])): int(table.counts[slot, column])
            for column, place in enumerate(lane.places) for slot in np.flatnonzero(table.counts[:, column])}


def _published(lane: Lane) -> set[tuple[Tier, int, int]]:
    table = lane.content.table
    return {(unit.tier, unit.group, int(table.hashes[slot])) for column, unit in enumerate(lane.content.units)
            for slot in np.flatnonzero((table.tally[:, column] > 0) & (table.facts[:, FLAGS] & ROOTED != 0))}
