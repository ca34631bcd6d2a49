# SPDX-License-Identifier: Apache-2.0
"""The feed against vLLM's own publisher over real sockets: chaos, restarts, late joiners, overruns, snapshots."""

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from vllm.distributed import kv_events as vllm_events

from tandem_protocol.errors import ConfigError
from tandem_protocol.event_sequence_terms import Limits
from tandem_protocol.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch, Tier, decode
from tandem_protocol.workers import EventSource
from tandem_router.feed import EventFeed
from tandem_router.feed_source import SourceState
from tandem_router.index import KvIndex, warm_up

_WAIT_S = 30.0
_BLOCK = 4
_WORKER = "worker-1"
_LIMITS = Limits(reply_s=0.5, backoff_s=0.02, backoff_limit_s=0.2, check_s=0.3)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """On a clean checkout compiling takes longer than a test waits for anything."""
    warm_up()


class _NaiveIndex:
    """What a slot holds, as plain sets: the truth to compare with."""

    def __init__(self) -> None:
        self.held: set[tuple[int, str, int]] = set()
        self.events = 0

    def apply(self, slot: int, event: Event) -> None:
        self.events += 1
        if isinstance(event, AllBlocksCleared):
            self.clear(slot, Tier.GPU)
            return
        keys = {(slot, event.tier.name, int(block)) for block in event.hashes}
        if isinstance(event, BlockStored):
            self.held |= keys
        elif isinstance(event, BlockRemoved):
            self.held -= keys

    def clear(self, slot: int, tier: Tier) -> None:
        self.held = {entry for entry in self.held if entry[:2] != (slot, tier.name)}

    def dump(self) -> bytes:
        return msgspec.msgpack.encode(sorted(self.held))

    def load(self, raw: bytes) -> None:
        self.held = set(msgspec.msgpack.decode(raw, type=list[tuple[int, str, int]]))


class _Engine:
    """An engine's publisher of KV events: vLLM's class at a fixed address, and everything that it has published."""

    def __init__(self, port: int, replay_port: int | None, seed: int, buffer_steps: int = 10_000) -> None:
        self._random = random.Random(seed)
        self._ports = port, replay_port
        self._buffer_steps = buffer_steps
        self._encoder = msgspec.msgpack.Encoder()
        self.payloads: list[bytes] = []
        self._live: list[int] = []
        self._publisher = self._start()

    def publish(self, batches: int) -> None:
        """Random stores, removals and, seldom, clears."""
        for _ in range(batches):
            batch = vllm_events.KVEventBatch(ts=time.time(), events=[self._event() for _ in range(self._random.randint(1, 4))])
            self._publisher.publish(batch)
            self.payloads.append(self._encoder.encode(batch))

    def restart(self) -> None:
        """Another process in the same place: numbers start again, nothing is held."""
        self.stop()
        self.payloads.clear()
        self._live.clear()
        self._publisher = self._start()

    def stop(self) -> None:
        self._publisher.shutdown()

    def held(self, last: int | None = None) -> set[tuple[int, str, int]]:
        """The index that a clean dump gives, of all batches or the last ones."""
        index = _NaiveIndex()
        for payload in self.payloads if last is None else self.payloads[-last:]:
            for event in decode(payload).events:
                index.apply(0, event)
        return index.held

    def _start(self) -> vllm_events.ZmqEventPublisher:
        """The address is free only when ZMQ has closed the last publisher's sockets, in a thread of its own."""
        port, replay_port = self._ports
        for used in self._ports:
            _await_free(used)
        replay = None if replay_port is None else f"tcp://*:{replay_port}"
        return vllm_events.ZmqEventPublisher(0, f"tcp://*:{port}", replay, buffer_steps=self._buffer_steps)

    def _event(self) -> vllm_events.KVCacheEvent:
        kind = self._random.random()
        if kind < 0.01:
            self._live.clear()
            return vllm_events.AllBlocksCleared()
        if kind < 0.25 and self._live:
            return vllm_events.BlockRemoved(block_hashes=[self._live.pop(self._random.randrange(len(self._live)))], medium="GPU")
        parent = self._random.choice(self._live) if self._live and kind < 0.7 else None
        blocks = [self._random.getrandbits(63) for _ in range(self._random.randint(1, 8))]
        self._live += blocks
        tokens = [self._random.randrange(50_000) for _ in range(_BLOCK * len(blocks))]
        return vllm_events.BlockStored(
            block_hashes=blocks, parent_block_hash=parent, token_ids=tokens, block_size=_BLOCK, lora_id=None, medium="GPU", lora_name=None
        )


class _Chaos:
    """A man in the middle of the live stream who drops, doubles, swaps and spoils frames until he is told to behave."""

    def __init__(self, upstream: str, port: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._inward = self._context.socket(zmq.SUB)
        self._inward.subscribe(b"")
        self._inward.connect(upstream)
        self._outward = self._context.socket(zmq.PUB)
        self._outward.bind(f"tcp://127.0.0.1:{port}")
        self.calm = False
        self.misdeeds = 0
        self._held_back: list[bytes] | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        self._thread.join(_WAIT_S)
        self._context.destroy(0)

    def _run(self) -> None:
        while not self._closing:
            if self._inward.poll(20):
                self._pass_on(self._inward.recv_multipart())

    def _pass_on(self, parts: list[bytes]) -> None:
        fate = 1.0 if self.calm else self._random.random()
        self.misdeeds += fate < 0.4
        if fate < 0.1:
            return
        if fate < 0.2:
            self._outward.send_multipart(parts)
        elif fate < 0.35 and self._held_back is None:
            self._held_back = parts
            return
        elif fate < 0.36:
            parts = [parts[0], parts[1], parts[2][:-3]]
        elif fate < 0.37:
            parts = [b"no", b"number"]
        self._outward.send_multipart(parts)
        if self._held_back is not None:
            self._outward.send_multipart(self._held_back)
            self._held_back = None


class _Watch:
    """Wakes whoever waits for the index to become something."""

    def __init__(self) -> None:
        self._changed = threading.Condition()

    def applied(self, worker_id: str, dp_rank: int, batch: EventBatch) -> None:
        with self._changed:
            self._changed.notify_all()

    def cleared(self, worker_id: str, dp_rank: int) -> None:
        with self._changed:
            self._changed.notify_all()

    def until(self, reached: Callable[[], bool], timeout_s: float = _WAIT_S) -> bool:
        """Looks again at each change, and now and then without one: a sequence takes its step after the index has."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not reached():
                if time.monotonic() > deadline:
                    return False
                self._changed.wait(0.02)
        return True


class _Router:
    """A feed into a naive index that follows one engine."""

    def __init__(self, source: EventSource, snapshot: Path | None = None, limits: Limits = _LIMITS) -> None:
        self.index = _NaiveIndex()
        self.watch = _Watch()
        self.feed = EventFeed(self.index, observer=self.watch, limits=limits)
        self.restored = frozenset[str]() if snapshot is None else self.feed.restore(snapshot)
        self.feed.start()
        self.feed.add(_WORKER, source, 0)

    @property
    def state(self) -> SourceState:
        return self.feed.state()[0]

    def reaches(self, engine: _Engine) -> bool:
        """Waits until all of the engine's batches are in, and the index is the clean dump's."""
        expected = engine.held()
        return self.watch.until(lambda: self.state.last_seq == len(engine.payloads) - 1 and self.index.held == expected)


def _free_ports(count: int) -> list[int]:
    """Bound at once, so that they differ."""
    bound = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in bound]
    for one in bound:
        one.close()
    return ports


def _await_free(port: int | None) -> None:
    deadline = time.monotonic() + _WAIT_S
    while port is not None:
        try:
            socket.create_server(("", port)).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
        else:
            return


class _Stage:
    """Makes engines, middlemen and routers, and ends them."""

    def __init__(self) -> None:
        self.port, self.replay_port, self.middle_port = _free_ports(3)
        self._ends: list[Callable[[], None]] = []

    @property
    def source(self) -> EventSource:
        return EventSource(dp_rank=0, endpoint=f"tcp://127.0.0.1:{self.port}", replay_endpoint=f"tcp://127.0.0.1:{self.replay_port}")

    @property
    def troubled_source(self) -> EventSource:
        return msgspec.structs.replace(self.source, endpoint=f"tcp://127.0.0.1:{self.middle_port}")

    def engine(self, *, replay: bool = True, buffer_steps: int = 10_000, seed: int = 1) -> _Engine:
        engine = _Engine(self.port, self.replay_port if replay else None, seed, buffer_steps)
        self._ends.append(engine.stop)
        return engine

    def chaos(self, seed: int) -> _Chaos:
        chaos = _Chaos(f"tcp://127.0.0.1:{self.port}", self.middle_port, seed)
        self._ends.append(chaos.close)
        return chaos

    def router(self, source: EventSource, snapshot: Path | None = None, limits: Limits = _LIMITS) -> _Router:
        router = _Router(source, snapshot, limits)
        self._ends.append(router.feed.close)
        return router

    def close(self) -> None:
        for end in reversed(self._ends):
            end()


@pytest.fixture
def stage() -> Iterator[_Stage]:
    """Ports and an end for everything."""
    stage = _Stage()
    yield stage
    stage.close()


@pytest.mark.parametrize("seed", range(4))
def test_after_chaos_and_restarts_the_index_equals_a_clean_dump(stage: _Stage, seed: int) -> None:
    """A middleman drops, doubles, swaps and spoils live frames, the publisher restarts behind him, twice."""
    engine, chaos, router = stage.engine(seed=seed), stage.chaos(seed), stage.router(stage.troubled_source)
    for restart in range(3):
        if restart:
            engine.restart()
        for _ in range(5):
            engine.publish(80)
            assert router.feed.wait_synced(_WORKER, _WAIT_S)
        assert router.reaches(engine)
    state = router.state
    assert chaos.misdeeds > 0
    assert state.gaps + state.replays > 0, "frames were dropped; a feed that starts late repairs them by its first replay"
    assert state.restarts > 0
    assert state.duplicates > 0
    chaos.calm = True
    engine.publish(50)
    assert router.reaches(engine)


def test_a_late_joiner_has_the_whole_past(stage: _Stage) -> None:
    """Thousands of batches were published before it came, more while it joined."""
    engine = stage.engine()
    engine.publish(3_000)
    router = stage.router(stage.source)
    engine.publish(500)
    assert router.reaches(engine)
    assert router.feed.wait_synced(_WORKER, _WAIT_S)
    assert (router.state.lost, router.state.resyncs) == (0, 0)


def test_a_publisher_restarted_in_place_is_joined_anew(stage: _Stage) -> None:
    """The new one has published more than the old one by the time the feed is back."""
    engine, router = stage.engine(), stage.router(stage.source)
    engine.publish(20)
    assert router.reaches(engine)
    engine.restart()
    engine.publish(60)
    assert router.reaches(engine)
    assert router.state.restarts == 1


def test_an_overrun_replay_buffer_leads_to_what_the_publisher_still_holds(stage: _Stage) -> None:
    """A feed that was away too long starts over, and counts what is gone."""
    engine, router = stage.engine(buffer_steps=16), stage.router(stage.troubled_source)
    chaos = stage.chaos(1)
    chaos.calm = True
    engine.publish(10)
    assert router.reaches(engine)
    chaos.close()
    engine.publish(200)
    expected = engine.held(last=16)
    assert router.watch.until(lambda: router.state.last_seq == 9)
    stage.chaos(1).calm = True
    assert router.watch.until(lambda: router.index.held == expected)
    assert router.state.resyncs == 1
    assert router.state.lost == 210 - 16


def test_without_a_replay_endpoint_the_feed_follows_what_comes(stage: _Stage) -> None:
    """The past is not to be had; the present is."""
    engine = stage.engine(replay=False)
    router = stage.router(EventSource(dp_rank=0, endpoint=stage.source.endpoint))
    assert router.feed.wait_synced(_WORKER, _WAIT_S)
    while not router.watch.until(lambda: router.state.batches > 0, 0.1):
        engine.publish(1)
    engine.publish(100)
    assert router.watch.until(lambda: router.state.last_seq == len(engine.payloads) - 1)
    assert router.index.held == engine.held(last=router.state.batches)


def test_a_restored_router_replays_only_the_tail(stage: _Stage, tmp_path: Path) -> None:
    """What the snapshot holds isn't asked for again."""
    engine, first = stage.engine(), stage.router(stage.source)
    engine.publish(1_000)
    assert first.reaches(engine)
    first.feed.save(tmp_path / "snapshot")
    first.feed.close()
    engine.publish(50)
    second = stage.router(stage.source, tmp_path / "snapshot")
    assert second.restored == {_WORKER}
    assert second.reaches(engine)
    assert second.state.batches == 50
    assert second.state.resyncs == 0


def test_a_snapshot_of_a_publisher_that_restarted_is_dropped(stage: _Stage, tmp_path: Path) -> None:
    """Its numbers have grown beyond the snapshot's meanwhile; the contents differ."""
    engine, first = stage.engine(), stage.router(stage.source)
    engine.publish(30)
    assert first.reaches(engine)
    first.feed.save(tmp_path / "snapshot")
    first.feed.close()
    engine.restart()
    engine.publish(60)
    second = stage.router(stage.source, tmp_path / "snapshot")
    assert second.reaches(engine)
    assert second.state.restarts == 1


def test_a_file_that_is_no_snapshot_is_refused(stage: _Stage, tmp_path: Path) -> None:
    """With a sentence."""
    (tmp_path / "snapshot").write_bytes(b"\xc1nothing")
    feed = EventFeed(_NaiveIndex())
    with pytest.raises(ConfigError, match="not a snapshot"):
        feed.restore(tmp_path / "snapshot")
    feed.close()


def test_nothing_reaches_the_index_after_a_worker_was_removed(stage: _Stage) -> None:
    """Its slot may belong to another by then."""
    engine, router = stage.engine(), stage.router(stage.source)
    engine.publish(2_000)
    assert router.watch.until(lambda: router.index.events > 0)
    router.feed.remove(_WORKER)
    events = router.index.events
    engine.publish(10)
    assert not router.feed.wait_synced(_WORKER, 0.3)
    assert router.index.events == events
    assert router.feed.state() == ()


def test_a_failure_of_the_index_is_counted_and_repaired(stage: _Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread lives, the source starts over."""
    engine, router = stage.engine(), stage.router(stage.source)
    engine.publish(5)
    assert router.reaches(engine)
    apply = router.index.apply
    failures = iter([True])

    def fail_once(slot: int, event: Event) -> None:
        if next(failures, False):
            raise RuntimeError("out of order")
        apply(slot, event)

    monkeypatch.setattr(router.index, "apply", fail_once)
    engine.publish(5)
    assert router.reaches(engine)
    assert router.state.failures == 1


def test_the_real_index_agrees_with_a_fresh_one_after_chaos(stage: _Stage) -> None:
    """Same blocks, and no contradiction inside."""
    engine, chaos, index = stage.engine(), stage.chaos(7), KvIndex()
    slot = index.add_worker(_WORKER, 0)
    watch = _Watch()
    feed = EventFeed(index, observer=watch, limits=_LIMITS)
    feed.add(_WORKER, stage.troubled_source, slot)
    feed.start()
    engine.publish(300)
    engine.restart()
    engine.publish(300)
    fresh = KvIndex()
    fresh.add_worker(_WORKER, 0)
    for payload in engine.payloads:
        for event in decode(payload).events:
            fresh.apply(0, event)
    assert watch.until(lambda: feed.state()[0].last_seq == 299 and index.size(slot) == fresh.size(0))
    feed.close()
    assert chaos.misdeeds > 0
    index.check_integrity()


def test_the_real_index_is_restored_and_goes_on(stage: _Stage, tmp_path: Path) -> None:
    """Its dump and the feed's places fit together."""
    engine, first = stage.engine(), KvIndex()
    watch = _Watch()
    feed = EventFeed(first, observer=watch, limits=_LIMITS)
    feed.add(_WORKER, stage.source, first.add_worker(_WORKER, 0))
    feed.start()
    engine.publish(100)
    assert watch.until(lambda: feed.state()[0].last_seq == 99)
    feed.save(tmp_path / "snapshot")
    feed.close()
    second = KvIndex()
    feed = EventFeed(second, observer=watch, limits=_LIMITS)
    assert feed.restore(tmp_path / "snapshot") == {_WORKER}
    slot = second.add_worker(_WORKER, 0)
    assert second.size(slot) == first.size(0) > 0
    feed.add(_WORKER, stage.source, slot)
    feed.start()
    engine.publish(10)
    assert watch.until(lambda: feed.state()[0].last_seq == 109)
    assert feed.state()[0].batches == 10
    feed.close()
    second.check_integrity()


def test_an_endpoint_of_the_wrong_form_is_refused(stage: _Stage) -> None:
    """When it is added, not in a thread later."""
    feed = EventFeed(_NaiveIndex())
    with pytest.raises(ConfigError, match="can't be connected to"):
        feed.add(_WORKER, EventSource(dp_rank=0, endpoint="worker:5557"), 0)
    with pytest.raises(ConfigError, match="can't be connected to"):
        feed.add(_WORKER, EventSource(dp_rank=0, endpoint="tcp://127.0.0.1:1", replay_endpoint="nowhere"), 0)
    assert feed.state() == ()
    feed.close()
    feed.close()


def test_an_idle_feed_wakes_for_its_ticks_only() -> None:
    """It shares the interpreter with the token streams. Its clock is read once before and once in each round."""
    readings: list[float] = []
    enough = threading.Event()

    def clock() -> float:
        readings.append(time.monotonic())
        if readings[-1] - readings[0] > 1:
            enough.set()
        return readings[-1]

    feed = EventFeed(_NaiveIndex(), clock=clock)
    feed.start()
    try:
        assert enough.wait(_WAIT_S)
    finally:
        feed.close()
    assert len(readings) < 100, "20 ticks in a second"
