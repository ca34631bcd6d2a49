# SPDX-License-Identifier: Apache-2.0
"""When an engine hangs, and what looks like it but is not."""

import asyncio

import pytest

from fakes import WAIT_S
from tandem_worker.heartbeat import HangWatch, Heartbeat, Pulse
from tandem_worker.load import EngineLoad

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


@pytest.mark.usefixtures("fast")
async def test_the_watch_tells_once_and_survives_a_failed_look() -> None:
    """A process that vanishes under its eyes must not end it."""
    load, told, looks = EngineLoad(in_engine=2), asyncio.Queue[str](), 0

    def engine_cpu_s() -> float:
        nonlocal looks
        looks += 1
        if looks == 2:
            raise RuntimeError("vanished")
        return 0.0

    watch = HangWatch(Heartbeat(0.05, STEP_S), load, engine_cpu_s, told.put)
    await asyncio.wait_for(watch.run(), WAIT_S)
    assert "2 requests in it" in told.get_nowait()
    assert looks > 2
    assert told.empty()


async def test_processor_time_is_only_read_of_an_engine_that_stands_still() -> None:
    """Reading it costs milliseconds on a host with many processes."""
    load, looks = EngineLoad(in_engine=1), 0

    def engine_cpu_s() -> float:
        nonlocal looks
        looks += 1
        return 0.0

    async def on_hang(reason: str) -> None:
        raise AssertionError(reason)

    watch = HangWatch(Heartbeat(HANG_S, STEP_S), load, engine_cpu_s, on_hang)
    for _ in range(3):
        load.record(None, 1)
        assert await watch.look() is None
    assert looks == 0
    assert await watch.look() is None
    assert looks == 1
