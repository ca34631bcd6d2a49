# SPDX-License-Identifier: Apache-2.0
"""The engine host tells discovery of its state; the engine is a stand-in, the event loop and its threads are real."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from fakes import WAIT_S
from tandem_worker.config import WorkerSettings
from tandem_worker.host import EngineHost
from tandem_worker.load import EngineLoads
from tandem_worker.status import WorkerState


class RecordingPresence:
    """Remembers what the host told it."""

    status = "registered"

    def __init__(self) -> None:
        self.told: list[str] = []
        self.dead = threading.Event()

    def follow(self, state: WorkerState) -> None:
        """Any thread."""
        self.told.append(state.value)
        if state is WorkerState.DEAD:
            self.dead.set()

    async def settle(self, state: WorkerState, timeout_s: float) -> bool:
        """Discovery is quick here."""
        self.told.append(f"settled {state.value}")
        return True

    async def leave(self) -> None:
        """On the event loop."""
        self.told.append("left")


@pytest.fixture
def engine() -> Any:
    """A living engine without requests."""
    return SimpleNamespace(errored=False, shutdown=lambda timeout: None)


@pytest.fixture
def host(engine: Any) -> Iterator[EngineHost]:
    """A started host."""
    generator: Any = SimpleNamespace(engine=engine, loads=EngineLoads())
    started = EngineHost(generator, WorkerSettings(drain_timeout_s=1), lambda: None)
    started.start()
    yield started
    if started.state is not WorkerState.STOPPED:
        started.shutdown()


def announce(host: EngineHost) -> RecordingPresence:
    """A presence that follows the host."""
    presence = RecordingPresence()

    async def on_loop() -> None:
        host.announce(presence)

    host.run(on_loop()).result(WAIT_S)
    return presence


def test_shutting_down_drains_first_and_leaves_last(host: EngineHost) -> None:
    """A router must see the drain before the worker is gone."""
    presence = announce(host)
    assert host.status().registration == "registered"
    host.shutdown()
    assert presence.told == ["ready", "draining", "stopped", "left"]


def test_the_death_of_the_engine_is_told(host: EngineHost, engine: Any) -> None:
    """By the watch over an idle engine."""
    presence = announce(host)
    engine.errored = True
    assert presence.dead.wait(WAIT_S)
    assert presence.told == ["ready", "dead"]


def test_draining_is_told_at_once(host: EngineHost) -> None:
    """While requests in flight still finish."""
    presence = announce(host)
    assert host.run(host.drain(1)).result(WAIT_S) == 0
    assert presence.told == ["ready", "draining"]


def test_a_presence_that_fails_to_leave_does_not_stop_the_shutdown(host: EngineHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine must go whatever discovery does."""
    presence = announce(host)

    async def fail() -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(presence, "leave", fail)
    host.shutdown()
    assert host.state is WorkerState.STOPPED


def test_an_unwell_worker_is_not_placed_until_it_is_well(host: EngineHost) -> None:
    """As its canary says; a worker that drains is not made ready again by it."""
    presence = announce(host)
    for reason in ("late", "later", None):
        host._loop.call_soon_threadsafe(host.judge, reason)
        assert host.run(_status(host)).result(WAIT_S) == ("unwell" if reason else "ready", reason)
    host.run(host.drain(1)).result(WAIT_S)
    host._loop.call_soon_threadsafe(host.judge, "late")
    assert host.run(_status(host)).result(WAIT_S) == ("draining", None)
    assert presence.told == ["ready", "unwell", "ready", "draining"]


async def _status(host: EngineHost) -> tuple[str, str | None]:
    return host.status().state.value, host.status().reason


def test_a_worker_retires_before_it_refuses(host: EngineHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers know of the drain while requests that are on their way are still taken."""
    monkeypatch.setattr("tandem_worker.host._SEEN_S", 0.0)
    presence = announce(host)
    host.run(host.retire()).result(WAIT_S)
    assert (host.state, presence.told) == (WorkerState.READY, ["ready", "draining", "settled draining"])


def test_a_sleeping_worker_is_told_and_sends_itself_nothing(host: EngineHost, engine: Any) -> None:
    """No canary may wait in a paused engine, and what waits there is no hang; a lost engine is not woken."""
    presence = announce(host)

    async def enter(state: WorkerState) -> tuple[bool, bool]:
        return host.enter(state, "level 1"), host.generator.loads.asleep

    assert host.run(enter(WorkerState.ASLEEP)).result(WAIT_S) == (True, True)
    assert (host.idle_s(), host.status().reason) == (0.0, "level 1")
    assert host.run(host.drain(1)).result(WAIT_S) == 0
    assert host.state is WorkerState.ASLEEP
    assert host.run(enter(WorkerState.READY)).result(WAIT_S) == (True, False)
    host.run(enter(WorkerState.ASLEEP)).result(WAIT_S)
    engine.errored = True
    assert presence.dead.wait(WAIT_S)
    assert host.run(enter(WorkerState.READY)).result(WAIT_S)[0] is False
    assert presence.told == ["ready", "asleep", "ready", "asleep", "dead"]
