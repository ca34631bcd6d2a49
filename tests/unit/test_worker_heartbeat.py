# SPDX-License-Identifier: Apache-2.0
"""When an engine hangs, and what looks like it but is not."""

import asyncio
from functools import partial

import pytest

from fakes import WAIT_S
from tandem_worker.heartbeat import HangWatch, Heartbeat, Pulse
from tandem_worker.load import EngineLoads

HANG_S, STEP_S = 30.0, 300.0


class Engine:
    """An engine under a heartbeat: each call lets a second pass, or another time, and looks once."""

    def __init__(self) -> None:
        self.heartbeat = Heartbeat(HANG_S, STEP_S)
        self.now, self.steps, self.in_engine, self.cpu_s = 1000.0, 0, 1, 0.0
        self.look(0.0)

    def look(self, seconds: float = 1.0, *, steps: int = 0, cores: float = 0.0) -> str | None:
        """One look after so many seconds, in which it did so many steps and used so many cores."""
        self.now += seconds
        self.steps += steps
        self.cpu_s += cores * seconds
        return self.heartbeat.look(Pulse(self.now, self.steps, self.in_engine, self.cpu_s))

    def hangs_after(self, seconds: int, cores: float = 0.0) -> int | None:
        """The second at which it is said to hang, if within so many."""
        return next((second for second in range(1, seconds + 1) if self.look(cores=cores)), None)


def test_work_without_steps_or_computation_is_a_hang() -> None:
    """At the timeout, and with a sentence that names it."""
    engine = Engine()
    assert engine.hangs_after(60) == HANG_S
    assert "1 requests in it, and for 31 s neither a step nor computation (TANDEM_HANG_TIMEOUT_S)" in str(engine.look())


def test_an_idle_engine_never_hangs() -> None:
    """Without requests there is nothing to step for."""
    engine = Engine()
    engine.in_engine = 0
    assert engine.hangs_after(1000) is None


def test_a_step_in_time_ends_the_suspicion() -> None:
    """The count starts anew."""
    engine = Engine()
    assert engine.hangs_after(29) is None
    assert engine.look(steps=1) is None
    assert engine.hangs_after(29) is None


def test_a_long_step_that_computes_is_slow_but_no_hang() -> None:
    """A long prompt on few cores, up to the bound of a step."""
    assert Engine().hangs_after(1000, cores=0.5) == STEP_S


def test_waiting_processes_do_not_count_as_computing() -> None:
    """Those of a resting CPU engine use a few percent of a core."""
    assert Engine().hangs_after(60, cores=0.05) == HANG_S


def test_clients_who_give_up_and_retry_do_not_hide_a_hang() -> None:
    """Time without work only pauses the count."""
    engine = Engine()
    for _ in range(3):
        assert engine.hangs_after(9) is None
        engine.in_engine = 0
        assert engine.hangs_after(100) is None
        engine.in_engine = 1
    assert engine.hangs_after(60) == 3


def test_our_own_lateness_is_not_the_engines() -> None:
    """A stub that was stopped for an hour counts two seconds of it."""
    engine = Engine()
    assert engine.look(3600) is None
    assert engine.hangs_after(60) == HANG_S - 2


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks follow each other at once."""
    monkeypatch.setattr("tandem_worker.heartbeat.INTERVAL_S", 0.0)


def loads_of(*in_engine: int) -> EngineLoads:
    """One rank with so many requests for each number."""
    loads = EngineLoads()
    for rank, requests in enumerate(in_engine):
        loads.of(rank).in_engine = requests
    return loads


async def _unexpected(reason: str) -> None:
    raise AssertionError(reason)


@pytest.mark.usefixtures("fast")
async def test_the_watch_tells_once_and_survives_a_failed_look() -> None:
    """A process that vanishes under its eyes must not end it."""
    told, looks = asyncio.Queue[str](), 0

    def engine_cpu_s(_: int | None) -> float:
        nonlocal looks
        looks += 1
        if looks == 2:
            raise RuntimeError("vanished")
        return 0.0

    watch = HangWatch(partial(Heartbeat, 0.05, STEP_S), loads_of(2), engine_cpu_s, told.put)
    await asyncio.wait_for(watch.run(), WAIT_S)
    assert told.get_nowait().startswith("the engine hangs: 2 requests in it")
    assert looks > 2
    assert told.empty()


async def test_processor_time_is_only_read_of_an_engine_that_stands_still() -> None:
    """Reading it costs milliseconds on a host with many processes."""
    loads, asked = loads_of(1), list[int | None]()

    def engine_cpu_s(rank: int | None) -> float:
        asked.append(rank)
        return 0.0

    watch = HangWatch(partial(Heartbeat, HANG_S, STEP_S), loads, engine_cpu_s, _unexpected)
    for _ in range(3):
        loads.of(0).record(None, 1)
        assert await watch.look() is None
    assert asked == []
    assert await watch.look() is None
    assert asked == [None]


@pytest.mark.usefixtures("fast")
async def test_the_steps_and_computation_of_one_rank_do_not_hide_the_silence_of_another() -> None:
    """Each is judged by its own, and named."""
    loads, told = loads_of(1, 3), asyncio.Queue[str]()

    def engine_cpu_s(rank: int | None) -> float:
        assert rank == 1, "rank 0 steps"
        return 0.0

    watch = HangWatch(partial(Heartbeat, 0.05, STEP_S), loads, engine_cpu_s, told.put)
    watching = asyncio.create_task(watch.run())
    while not watching.done():
        loads.of(0).record(None, 1)
        await asyncio.sleep(0)
    assert told.get_nowait().startswith("data-parallel rank 1 of the engine hangs: 3 requests in it")


async def test_an_engine_that_sleeps_is_not_asked() -> None:
    """Its work waits because it was told to."""
    loads, asked = loads_of(1, 1), list[int | None]()

    def engine_cpu_s(rank: int | None) -> float:
        asked.append(rank)
        return 0.0

    loads.asleep = True
    watch = HangWatch(partial(Heartbeat, HANG_S, STEP_S), loads, engine_cpu_s, _unexpected)
    assert [await watch.look() for _ in range(3)] == [None] * 3
    assert asked == []
    loads.asleep = False
    await watch.look()
    assert asked == [0, 1]


def test_work_that_was_taken_back_in_mid_silence_leaves_a_doubt() -> None:
    """Until a step clears it; work that is taken back from an engine that steps leaves none."""
    heartbeat = Heartbeat(HANG_S, STEP_S)
    pulses = [Pulse(0, 1, 1, 0), Pulse(1, 2, 1, 0), Pulse(2, 2, 0, 0), Pulse(3, 2, 1, 0), Pulse(4, 2, 0, 0), Pulse(5, 3, 0, 0)]
    doubts = []
    for pulse in pulses:
        heartbeat.look(pulse)
        doubts.append(heartbeat.in_doubt)
    assert doubts == [False, False, False, False, True, False]


@pytest.mark.usefixtures("fast")
async def test_an_engine_in_doubt_is_asked_and_its_hang_is_seen() -> None:
    """Clients left, so that there is no work to tell by; the probe is work, and is not sent twice."""
    loads, told, probes = loads_of(1), asyncio.Queue[str](), 0

    async def probe() -> None:
        nonlocal probes
        probes += 1
        loads.of(0).in_engine += 1
        await asyncio.Event().wait()

    watch = HangWatch(partial(Heartbeat, 0.05, STEP_S), loads, lambda _: 0.0, told.put, probe)
    assert [await watch.look(), await watch.look()] == [None, None]
    loads.of(0).in_engine = 0
    await asyncio.wait_for(watch.run(), WAIT_S)
    assert told.get_nowait().startswith("the engine hangs: 1 requests in it")
    assert probes == 1


async def test_an_engine_in_doubt_that_answers_is_left_alone() -> None:
    """One probe, also if that fails as soon as it is sent: the next look asks again."""
    loads, probes = loads_of(1), 0

    async def probe() -> None:
        nonlocal probes
        probes += 1
        if probes == 1:
            raise RuntimeError("refused")
        loads.of(0).record(None, 1)

    watch = HangWatch(partial(Heartbeat, HANG_S, STEP_S), loads, lambda _: 0.0, _unexpected, probe)
    for in_engine in (1, 1, 0, 0, 0, 0, 0):
        loads.of(0).in_engine = in_engine
        assert await watch.look() is None
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert probes == 2
