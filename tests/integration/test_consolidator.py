# SPDX-License-Identifier: Apache-2.0
"""The consolidator between vLLM's own publishers and the router's own feed, over real sockets."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zmq
from benchmarks import consolidator as benchmark
from vllm.distributed import kv_events as vllm_events

from expositions import TOOL, Exposition
from tandem_kvbm.consolidator import __main__ as consolidator
from tandem_kvbm.consolidator.config import ConsolidatorSettings, load_settings
from tandem_kvbm.consolidator.plan import Plan
from tandem_kvbm.consolidator.pump import Pump
from tandem_protocol.blocks import hash_blocks
from tandem_protocol.errors import ConfigError
from tandem_protocol.event_sequence_terms import Limits
from tandem_protocol.kv_events import Tier
from tandem_protocol.workers import EventSource
from tandem_router.feed import EventFeed
from tandem_router.feed_source import SourceState
from tandem_router.index import KvIndex, warm_up

_WAIT_S = 60.0
_BLOCK = 4
_LIMITS = Limits(reply_s=0.5, backoff_s=0.02, backoff_limit_s=0.2, check_s=0.3)
_CHAINS, _LENGTH = 6, 12


def _tokens(chain: int, block: int) -> list[int]:
    return [chain * 1000 + block * _BLOCK + at for at in range(_BLOCK)]


def _hash(chain: int, block: int) -> int:
    return (chain + 1) * 1_000_003 + block


def _free_ports(count: int) -> list[int]:
    """Each with the port 1000 above it free as well."""
    found: list[int] = []
    while len(found) < count:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = int(one.getsockname()[1])
        if port + 1000 < 65536 and _is_free(port + 1000) and port not in found and port + 1000 not in found:
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def _until(reached: Callable[[], bool], timeout_s: float = _WAIT_S) -> bool:
    deadline, ticker = time.monotonic() + timeout_s, zmq.Poller()
    while not reached():
        if time.monotonic() > deadline:
            return False
        ticker.poll(10)
    return True


class _Engine:
    """One rank's publisher, vLLM's own class, and random events of a GPU cache and a CPU tier."""

    def __init__(self, port: int, rank: int = 0, seed: int = 1, buffer_steps: int = 10_000) -> None:
        self._random = random.Random(seed)
        self._arguments = (rank, f"tcp://*:{port - rank}", f"tcp://*:{port - rank + 1000}", buffer_steps)
        self._rank = rank
        self.gpu: set[tuple[int, int]] = set()
        self.cpu: set[tuple[int, int]] = set()
        self.batches = 0
        self._publisher = vllm_events.ZmqEventPublisher(*self._arguments)

    def publish(self, batches: int) -> None:
        for _ in range(batches):
            events = [event for _ in range(self._random.randint(1, 4)) for event in self._step()]
            self._publisher.publish(vllm_events.KVEventBatch(ts=time.time(), events=events))
            self.batches += 1

    def stop(self) -> None:
        self._publisher.shutdown()

    def restart(self) -> None:
        """Another process in the same place: numbers start again, nothing is held."""
        self.stop()
        self.gpu.clear()
        self.cpu.clear()
        self.batches = 0
        ports = (int(endpoint.rpartition(":")[2]) + self._rank for endpoint in self._arguments[1:3])
        assert all(_until(lambda port=port: _is_free(port)) for port in ports)  # type: ignore[misc]
        self._publisher = vllm_events.ZmqEventPublisher(*self._arguments)

    def held(self) -> dict[Tier, set[tuple[int, int]]]:
        return {Tier.GPU: self.gpu, Tier.CPU: self.cpu}

    def _step(self) -> list[vllm_events.KVCacheEvent]:
        """A prefix gets longer, is offloaded, or loses its end: as engines do, so that every block held has its parents in some tier."""
        chain, kind = self._random.randrange(_CHAINS), self._random.random()
        gpu = sorted(block for one, block in self.gpu if one == chain)
        cpu = sorted(block for one, block in self.cpu if one == chain)
        if kind < 0.45:
            first = gpu[-1] + 1 if gpu else 0
            return [self._store(self.gpu, "GPU", chain, range(first, min(_LENGTH, first + self._random.randint(1, 4))))]
        if kind < 0.7 and len(gpu) > len(cpu):
            return [self._store(self.cpu, "CPU", chain, reversed_one) for reversed_one in
                    [range(block, block + 1) for block in reversed(gpu[len(cpu) :])]]  # children first
        where, medium, held = (self.gpu, "GPU", gpu) if kind < 0.9 else (self.cpu, "CPU", cpu)
        gone = held[len(held) // 2 :]
        where -= {(chain, block) for block in gone}
        return [vllm_events.BlockRemoved(block_hashes=[_hash(chain, block)], medium=medium) for block in gone]

    def _store(self, where: set[tuple[int, int]], medium: str, chain: int, run: range) -> vllm_events.BlockStored:
        where |= {(chain, block) for block in run}
        return vllm_events.BlockStored(
            block_hashes=[_hash(chain, block) for block in run], parent_block_hash=_hash(chain, run.start - 1) if run.start else None,
            token_ids=[token for block in run for token in _tokens(chain, block)], block_size=_BLOCK, lora_id=None, medium=medium,
            lora_name=None, group_idx=0,
        )


class _Router:
    """The router's feed and index."""

    def __init__(self, *sources: EventSource) -> None:
        self.index = KvIndex()
        self.feed = EventFeed(self.index, limits=_LIMITS)
        self.feed.start()
        self.slots = {source.dp_rank: self.index.add_worker("worker", source.dp_rank) for source in sources}
        for source in sources:
            self.feed.add("worker", source, self.slots[source.dp_rank])

    @property
    def states(self) -> tuple[SourceState, ...]:
        return self.feed.state()

    def agrees(self, engines: "dict[int, _Engine]") -> bool:
        """Whether every prefix is known as the engines hold it, by tokens, and nothing else is."""
        return all(self._agrees_on(chain, rank, engine) for rank, engine in engines.items() for chain in range(_CHAINS)) and all(
            self.index.size(self.slots[rank]) == len(engine.gpu | engine.cpu) for rank, engine in engines.items())

    def _agrees_on(self, chain: int, rank: int, engine: "_Engine") -> bool:
        tokens = [token for block in range(_LENGTH) for token in _tokens(chain, block)]
        found = self.index.match(hash_blocks(np.array(tokens, np.int32), _BLOCK)).blocks[:, self.slots[rank]].tolist()
        wanted = [0, 0, 0]
        for block in range(_LENGTH):
            tier = next((tier for tier, held in engine.held().items() if (chain, block) in held), None)
            if tier is None:
                break
            wanted[tier] += 1
        return bool(found == wanted)


class _Stage:
    """Makes everything, and ends it."""

    def __init__(self, path: Path, ranks: int = 1) -> None:
        self.port, self.engine_port = _free_ports(2)
        self.ranks = ranks
        self.state = path / "state"
        self._ends: list[Callable[[], None]] = []

    @property
    def settings(self) -> ConsolidatorSettings:
        return load_settings({}, {
            "TANDEM_CONSOLIDATOR_PORT": str(self.port), "TANDEM_CONSOLIDATOR_HOST": "127.0.0.1", "TANDEM_CONSOLIDATOR_BUFFER_STEPS": "100",
            "TANDEM_CONSOLIDATOR_ENGINE": f"tcp://127.0.0.1:{self.engine_port}", "TANDEM_CONSOLIDATOR_RANKS": str(self.ranks),
            "TANDEM_CONSOLIDATOR_ENGINE_REPLAY": f"tcp://127.0.0.1:{self.engine_port + 1000}", "TANDEM_CONSOLIDATOR_STATE": str(self.state),
        })

    @property
    def plan(self) -> Plan:
        return replace(self.settings.plan(), sequence=_LIMITS)

    def source(self, rank: int = 0) -> EventSource:
        return EventSource(dp_rank=rank, endpoint=f"tcp://127.0.0.1:{self.port}", replay_endpoint=f"tcp://127.0.0.1:{self.port + 1000}",
                           merged=self.ranks > 1)

    def engine(self, rank: int = 0, **arguments: Any) -> _Engine:
        engine = _Engine(self.engine_port + rank, rank, seed=rank + 1, **arguments)
        self._ends.append(engine.stop)
        return engine

    def pump(self, plan: Plan | None = None) -> Pump:
        assert _until(lambda: _is_free(self.port) and _is_free(self.port + 1000))
        pump = Pump(plan or self.plan)
        self._ends.append(pump.close)
        pump.start()
        return pump

    def router(self) -> _Router:
        router = _Router(*(self.source(rank) for rank in range(self.ranks)))
        self._ends.append(router.feed.close)
        return router

    def end(self) -> None:
        for end in reversed(self._ends):
            end()


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """On a clean checkout compiling takes longer than a test waits for anything."""
    warm_up()
    consolidator.warm_up()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[_Stage]:
    made = _Stage(tmp_path)
    yield made
    made.end()


def _caught_up(pump: Pump, *engines: _Engine) -> bool:
    sources = pump.report().sources
    return all(source.synced and source.last_seq == engine.batches - 1 for source, engine in zip(sources, engines, strict=True))


def test_the_router_learns_what_the_engine_holds(stage: _Stage) -> None:
    """In each tier, whether it was there from the start or joined when the buffer had forgotten it: then by a dump, without a loss."""
    engine, pump, early = stage.engine(), stage.pump(), stage.router()
    for _ in range(30):
        engine.publish(20)
        assert _until(lambda: _caught_up(pump, engine))
    assert pump.published > 200
    late = stage.router()
    assert _until(lambda: early.agrees({0: engine}))
    assert _until(lambda: late.agrees({0: engine}))
    for router in (early, late):
        router.index.check_integrity()
        assert router.index.stats().orphans == 0
        assert router.states[0].lost == 0
    assert pump.report().dumps > 0


@pytest.mark.slow
def test_many_late_joiners_share_dumps(stage: _Stage) -> None:
    """And go on with the stream."""
    engine, pump = stage.engine(), stage.pump()
    for _ in range(10):
        engine.publish(30)
        assert _until(lambda: _caught_up(pump, engine))
    routers = [stage.router() for _ in range(5)]
    engine.publish(5)
    assert all(_until(lambda router=router: router.agrees({0: engine})) for router in routers)  # type: ignore[misc]
    assert pump.report().dumps <= 5


def test_a_restart_loses_nothing_that_the_engine_has_forgotten(stage: _Stage) -> None:
    """The engine's buffer holds five steps; what was before them comes from the state on disk, what came meanwhile from the engine."""
    engine, router = stage.engine(buffer_steps=5), stage.router()
    pump = stage.pump()
    for batches in (1, *[20] * 10):  # of what comes before the subscription stands the engine could repeat five steps only
        engine.publish(batches)
        assert _until(lambda: _caught_up(pump, engine))
    assert pump.report().sources[0].counts["lost"] == 0
    pump.close()
    engine.publish(4)
    pump = stage.pump()
    assert _until(lambda: _caught_up(pump, engine))
    assert _until(lambda: router.agrees({0: engine}))
    assert [pump.report().sources[0].counts[count] for count in ("resyncs", "lost")] == [0, 0]


def test_a_restart_without_its_state_knows_what_the_engine_repeats(stage: _Stage) -> None:
    """All of it here; and a damaged file is no reason not to start."""
    engine, router = stage.engine(), stage.router()
    pump = stage.pump()
    engine.publish(50)
    assert _until(lambda: _caught_up(pump, engine))
    pump.close()
    stage.state.write_bytes(b"damaged")
    engine.publish(10)
    pump = stage.pump()
    assert _until(lambda: _caught_up(pump, engine))
    assert _until(lambda: router.agrees({0: engine}))


def test_a_restarted_engine_holds_nothing(stage: _Stage) -> None:
    """And what it held before is taken back."""
    engine, router, pump = stage.engine(), stage.router(), stage.pump()
    engine.publish(60)
    assert _until(lambda: _caught_up(pump, engine))
    engine.restart()
    engine.publish(10)
    assert _until(lambda: _caught_up(pump, engine))
    assert _until(lambda: router.agrees({0: engine}))


def test_ranks_share_one_stream(tmp_path: Path) -> None:
    """The router keeps them apart."""
    stage = _Stage(tmp_path, ranks=2)
    try:
        engines = {rank: stage.engine(rank) for rank in range(2)}
        pump, router = stage.pump(), stage.router()
        for engine in engines.values():
            engine.publish(80)
        assert _until(lambda: _caught_up(pump, *engines.values()))
        assert _until(lambda: router.agrees(engines))
        late = stage.router()
        assert _until(lambda: late.agrees(engines))
    finally:
        stage.end()


def test_vllms_own_subscriber_protocol_is_spoken(stage: _Stage) -> None:
    """A question for a number in the buffer: topic, number, payload, and -1 at the end; the payload is vLLM's own struct."""
    import msgspec

    engine, pump = stage.engine(), stage.pump()
    engine.publish(20)
    assert _until(lambda: _caught_up(pump, engine))
    with zmq.Context() as context, context.socket(zmq.DEALER) as asking:
        asking.connect(f"tcp://127.0.0.1:{stage.port + 1000}")
        asking.send_multipart([b"", (3).to_bytes(8, "big")])
        answers = []
        while not answers or answers[-1][2] != (-1).to_bytes(8, "big", signed=True):
            assert asking.poll(int(_WAIT_S * 1000))
            answers.append(asking.recv_multipart())
    assert [int.from_bytes(parts[2], "big") for parts in answers[:-1]] == list(range(3, pump.published))
    batches = [msgspec.msgpack.decode(parts[3], type=vllm_events.KVEventBatch) for parts in answers[:-1]]
    assert all(batch.data_parallel_rank == 0 and batch.events for batch in batches)


def test_a_port_that_is_taken_is_said(stage: _Stage) -> None:
    """With the variable to change."""
    stage.pump()
    with pytest.raises(ConfigError, match="DYN_KVBM_LEADER_ZMQ_PUB_PORT"):
        Pump(stage.plan)


def test_a_process_that_is_killed_comes_back_and_ends_with_whom_it_is_beside(stage: _Stage) -> None:
    """Under its supervisor, with its figures; the router then knows what the engine holds. In the end nothing is left running."""
    engine, router, admin = stage.engine(), stage.router(), _free_ports(1)[0]
    beside = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    environment = {**os.environ, "TANDEM_CONSOLIDATOR_PORT": str(stage.port), "TANDEM_CONSOLIDATOR_ADMIN_PORT": str(admin),
                   "TANDEM_CONSOLIDATOR_ENGINE": f"tcp://127.0.0.1:{stage.engine_port}", "TANDEM_CONSOLIDATOR_STATE": str(stage.state),
                   "TANDEM_CONSOLIDATOR_ENGINE_REPLAY": f"tcp://127.0.0.1:{stage.engine_port + 1000}"}
    supervisor = subprocess.Popen([sys.executable, "-m", "tandem_kvbm.consolidator.supervisor", str(beside.pid)], env=environment)
    try:
        assert _until(lambda: _get(admin, "/health")[0] == 200)
        engine.publish(10)
        assert _until(lambda: json.loads(_get(admin, "/health")[1])["sources"][0]["last_seq"] == 9)
        told = Exposition(_get(admin, "/metrics")[1])
        assert told.samples['tandem_consolidator_feed_total{publisher="engine0",what="batches"}'] == 10
        assert (told.doubles, told.complaints() if TOOL else []) == ([], [])
        [victim] = psutil.Process(supervisor.pid).children()
        victim.kill()
        engine.publish(10)
        assert _until(lambda: victim.pid not in [child.pid for child in psutil.Process(supervisor.pid).children()])
        assert _until(lambda: _get(admin, "/live")[0] == 200)
        assert _until(lambda: router.agrees({0: engine}))
        [another] = psutil.Process(supervisor.pid).children()
        beside.communicate(timeout=_WAIT_S)
        assert supervisor.wait(_WAIT_S) == 0
        assert not another.is_running()
        assert stage.state.exists()
    finally:
        for one in (supervisor, beside):
            if psutil.pid_exists(one.pid):
                one.send_signal(signal.SIGKILL)
            one.wait(_WAIT_S)


@pytest.mark.slow
def test_the_benchmark_finds_both_sides_equal(capfd: pytest.CaptureFixture[str]) -> None:
    """A small run of it, with its figures."""
    assert benchmark.main(["--json", "--events", "5000", "--warm-events", "2000", "--rates", "2000,10000", "--seconds", "0.5"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["block_events_per_s"] > 0
    assert 0 < report["latency_p50_ms"] <= report["latency_p99_ms"]
    assert report["latency_load_block_events_per_s"] == 10_000


def test_a_wrong_setting_ends_the_process_with_the_reason() -> None:
    """Exit code 2."""
    environment = {**os.environ, "DYN_KVBM_LEADER_ZMQ_PUB_PORT": "65000"}
    ended = subprocess.run([sys.executable, "-m", "tandem_kvbm.consolidator"], env=environment, capture_output=True, text=True,
                           timeout=_WAIT_S, check=False)
    assert ended.returncode == 2
    assert "beyond 65535" in ended.stderr


def _get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.read().decode()
    except OSError:
        return 0, ""
