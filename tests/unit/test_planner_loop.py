# SPDX-License-Identifier: Apache-2.0
"""The loop's iteration: whatever fails, the fleet stays as it is and it is counted."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tandem_planner.admin import AdminServer
from tandem_planner.connectors.dry_run import DryRunConnector
from tandem_planner.connectors.interface import Connector
from tandem_planner.loop import Parts, PlannerLoop
from tandem_planner.metrics import PlannerMetrics
from tandem_planner.observe import Observer
from tandem_planner.prometheus import Sample
from tandem_planner.queries import TrafficQueries
from tandem_planner.rhythm import Rhythm, next_adjustment
from tandem_planner.scaling import Scaler
from tandem_planner.state_file import SavedState, read_state, write_state
from tandem_planner.terms import Decision, Observation, Pool, Term
from tandem_protocol.errors import ConfigError, UnavailableError
from tandem_protocol.roles import Role

WAIT_S = 20.0
RHYTHM = Rhythm(start_delay_s=0, load_s=1, adjustment_s=100, step_s=20, retry_s=30)


@dataclass
class Clock:
    """Seconds, set by hand."""

    now: float = 1000.0

    def __call__(self) -> float:
        """The time."""
        return self.now


@dataclass
class FakeConnector(Connector):
    """A fleet in memory, whose changes end when the test says so."""

    fleet: dict[Role, Pool] = field(default_factory=lambda: {Role.DECODE: Pool(1, 1)})
    failure: str = ""
    lost: str = ""
    asked: list[int] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False

    async def pools(self) -> Mapping[Role, Pool]:
        """As it stands."""
        if self.lost:
            raise UnavailableError(self.lost)
        return dict(self.fleet)

    async def scale(self, role: Role, count: int) -> None:
        """Waits for the gate."""
        self.asked.append(count)
        self.fleet[role] = Pool(self.fleet[role].ready, count)
        await self.gate.wait()
        if self.failure:
            self.fleet[role] = Pool(self.fleet[role].ready, self.fleet[role].ready)
            raise UnavailableError(self.failure)
        self.fleet[role] = Pool(count, count)

    async def close(self) -> None:
        """Once."""
        self.closed = True


class FakeBrain:
    """Wants what the test says."""

    def __init__(self, wanted: int = 1) -> None:
        self.wanted = wanted
        self.failure: Exception | None = None
        self.seen: list[Observation] = []

    def decide(self, observation: Observation) -> Decision:
        """The same for every pool."""
        self.seen.append(observation)
        if self.failure is not None:
            raise self.failure
        target = dict.fromkeys(observation.pools, self.wanted)
        return Decision(observation.at_s, target, "as told", (Term("told", self.wanted, "by the test", Role.DECODE),))

    def save(self) -> bytes:
        """Something of its own."""
        return b"learned"


class FakeProm:
    """2 for every query, or a failure."""

    failure = ""

    async def query(self, expression: str) -> tuple[Sample, ...]:
        """One series."""
        if self.failure:
            raise UnavailableError(self.failure)
        return (Sample({}, 2.0),)

    async def close(self) -> None:
        """Nothing."""


@dataclass
class Rig:
    """A loop and what it is made of."""

    connector: FakeConnector = field(default_factory=FakeConnector)
    brain: FakeBrain = field(default_factory=FakeBrain)
    prometheus: FakeProm = field(default_factory=FakeProm)
    metrics: PlannerMetrics = field(default_factory=PlannerMetrics)
    clock: Clock = field(default_factory=Clock)
    state: Path | None = None

    def loop(self, saved: SavedState | None = None, rhythm: Rhythm = RHYTHM, connector: Connector | None = None) -> PlannerLoop:
        observer = Observer(self.prometheus, TrafficQueries(), _nobody, 30, self.clock)
        parts = Parts(self.brain, observer, connector or self.connector, self.metrics, {Role.DECODE: 2}, self.state)
        return PlannerLoop(parts, rhythm, saved, self.clock, self.clock)

    def metric(self, name: str) -> float:
        """A sample by name and labels, 0 where there is none."""
        lines = self.metrics.exposition().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name} "))


async def _nobody() -> tuple[Any, ...]:
    return ()


async def until(condition: Callable[[], bool]) -> None:
    """Lets other tasks run until it holds."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - other tasks only need their turn
            await asyncio.sleep(0)


async def test_a_decision_is_carried_out_once_while_the_loop_looks_on() -> None:
    rig = Rig(brain=FakeBrain(3))
    loop = rig.loop()
    assert (await loop.step()) is not None
    await until(lambda: rig.connector.asked == [3])
    await loop.step()  # the same is decided, and under way
    assert rig.brain.seen[-1].pools[Role.DECODE] == Pool(1, 3)
    assert loop.scaler.under_way == {Role.DECODE: 3}
    rig.connector.gate.set()
    await until(lambda: not loop.scaler.under_way)
    await loop.step()
    assert rig.connector.asked == [3]
    assert rig.metric('tandem_planner_changes_total{outcome="done",role="decode"}') == 1
    assert rig.metric('tandem_planner_workers{role="decode",what="ready"}') == 3
    assert rig.metric("tandem_planner_predicted_num_d") == 3
    assert rig.metric("tandem_planner_num_d_workers") == 3
    assert rig.metric('tandem_planner_term{role="decode",term="told"}') == 3
    await loop.close()
    assert rig.connector.closed


def test_dynamos_gauges_are_there_and_keep_the_last_plan() -> None:
    """A decision between two plans has no prediction."""
    metrics, now = PlannerMetrics(), 1.0
    planned = (Term("predicted_requests_per_s", 3, ""), Term("predicted_isl", 30, ""), Term("predicted_osl", 5, ""),
               Term("correction", 1.5, "", Role.PREFILL), Term("correction", 0.5, "", Role.DECODE))  # fmt: skip
    metrics.decided(Decision(now, {Role.PREFILL: 1, Role.DECODE: 2}, "", planned))
    metrics.decided(Decision(now, {Role.PREFILL: 1, Role.DECODE: 2}, ""))
    text = metrics.exposition().decode()
    for name, value in (("predicted_request_rate", 3), ("predicted_isl", 30), ("predicted_osl", 5), ("p_correction_factor", 1.5),
                        ("d_correction_factor", 0.5), ("predicted_num_p", 1), ("predicted_num_d", 2)):
        assert f"\ntandem_planner_{name} {float(value)}\n" in text
    assert "tandem_planner_term{" not in text


async def test_a_newer_decision_cancels_the_change_under_way() -> None:
    rig = Rig(brain=FakeBrain(3))
    loop = rig.loop()
    await loop.step()
    await until(lambda: rig.connector.asked == [3])
    rig.brain.wanted = 2
    await loop.step()
    await until(lambda: rig.connector.asked == [3, 2])
    assert rig.metric('tandem_planner_changes_total{outcome="cancelled",role="decode"}') == 1
    await loop.close()


async def test_a_change_under_way_is_what_is_wanted_though_nothing_shows_it() -> None:
    """Else the next decision would take it for undone, and cancel it."""

    class Slow(FakeConnector):
        async def pools(self) -> Mapping[Role, Pool]:
            return {Role.DECODE: Pool(1, 1)}

    rig = Rig(connector=Slow(), brain=FakeBrain(2))
    loop = rig.loop()
    await loop.step()
    await until(lambda: rig.connector.asked == [2])
    await loop.step()
    assert rig.brain.seen[-1].pools[Role.DECODE] == Pool(ready=1, wanted=2)
    assert rig.connector.asked == [2]
    await loop.close()


async def test_a_failed_change_leaves_the_fleet_and_is_tried_again_later() -> None:
    rig = Rig(brain=FakeBrain(3))
    rig.connector.failure = "no room"
    rig.connector.gate.set()
    loop = rig.loop()
    await loop.step()
    await until(lambda: not loop.scaler.under_way)
    assert rig.connector.fleet[Role.DECODE] == Pool(1, 1)
    await loop.step()
    assert rig.connector.asked == [3]  # not at once
    rig.clock.now += 31
    await loop.step()
    await until(lambda: rig.connector.asked == [3, 3])
    await until(lambda: rig.metric('tandem_planner_changes_total{outcome="failed",role="decode"}') == 2)
    await loop.close()


async def test_what_a_restart_left_half_done_is_finished() -> None:
    rig = Rig(brain=FakeBrain(2))
    rig.connector.fleet[Role.DECODE] = Pool(ready=3, wanted=2)  # one drains
    loop = rig.loop()
    await loop.step()
    await until(lambda: rig.connector.asked == [2])
    await loop.close()


@pytest.mark.parametrize("what", ["connector", "decision"])
async def test_what_can_not_be_read_or_decided_costs_the_iteration_only(what: str) -> None:
    rig = Rig()
    if what == "connector":
        rig.connector.lost = "the API server is away"
    else:
        rig.brain.failure = ValueError("a bug")
    loop = rig.loop()
    for _ in range(5):
        assert (await loop.step()) is None
    assert rig.connector.asked == []
    assert rig.metric(f'tandem_planner_failures_total{{what="{what}"}}') == 5
    assert not loop.well
    rig.connector.lost, rig.brain.failure = "", None
    assert (await loop.step()) is not None
    assert loop.well
    await loop.close()


async def test_without_prometheus_it_decides_on_what_is_left_and_asks_again_soon() -> None:
    rig = Rig()
    rig.prometheus.failure = "Prometheus is away"
    loop = rig.loop()
    rig.clock.now += 100  # the traffic is due
    await loop.step()
    assert rig.brain.seen[-1].traffic is None
    assert rig.brain.seen[-1].missing[0] == "Prometheus is away"
    assert rig.metric('tandem_planner_failures_total{what="observation"}') == 1
    rig.prometheus.failure = ""
    rig.clock.now += 1
    await loop.step()
    assert rig.brain.seen[-1].traffic is not None  # not an interval later
    assert rig.metric("tandem_planner_observed_request_rate") == pytest.approx(2 / 100)
    rig.clock.now += 1
    await loop.step()
    assert rig.brain.seen[-1].traffic is None
    await loop.close()


async def test_an_iteration_that_hangs_is_given_up() -> None:
    rig = Rig()

    class Hangs(FakeConnector):
        async def pools(self) -> Mapping[Role, Pool]:
            await asyncio.Event().wait()
            raise AssertionError

    loop = rig.loop(rhythm=Rhythm(0, 1, 100, step_s=0.05), connector=Hangs())
    assert (await loop.step()) is None
    assert rig.metric('tandem_planner_failures_total{what="observation"}') == 1
    await loop.close()


async def test_a_dry_run_scales_nothing() -> None:
    rig = Rig(brain=FakeBrain(5))
    loop = rig.loop(connector=DryRunConnector(rig.connector))
    await loop.step()
    await until(lambda: not loop.scaler.under_way)
    assert rig.connector.asked == []
    assert rig.metric('tandem_planner_workers{role="decode",what="target"}') == 5
    await loop.close()
    assert rig.connector.closed


async def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    """The next look at the traffic is due when it would have been, and GPU hours are counted on."""
    rig = Rig(state=tmp_path / "state")
    loop = rig.loop()
    rig.clock.now = 1100
    await loop.step()
    rig.clock.now = 1136
    await loop.step()
    assert rig.metric("tandem_planner_gpu_hours") == pytest.approx(2 * 36 / 3600)  # a worker of two GPUs
    await loop.close()
    saved = read_state(tmp_path / "state")
    assert saved is not None
    assert (saved.brain, saved.adjusted_at_s) == (b"learned", 1100)
    rig.clock.now = 1150
    restarted = rig.loop(saved)
    assert restarted.memory.adjust_at_s == 1200
    assert restarted.memory.gpu_hours == saved.gpu_hours
    await restarted.close()


@pytest.mark.parametrize(("last", "now", "due"), [(None, 50, 150), (0, 50, 100), (0, 500, 500), (90, 50, 150)])
def test_when_the_traffic_is_due(last: float | None, now: float, due: float) -> None:
    """After a start, a short and a long pause, and a clock that was set back."""
    assert next_adjustment(last, now, 100) == due


def test_a_state_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    assert read_state(path) is None
    path.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="is not a planner's state"):
        read_state(path)
    write_state(path, SavedState(1.0, b"", 2.0, format=99))
    with pytest.raises(ConfigError, match="format 99"):
        read_state(path)


async def test_a_state_that_can_not_be_written_is_counted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    rig = Rig(state=tmp_path / "file" / "state")
    loop = rig.loop()
    await loop.step()
    await loop.close()
    assert rig.metric('tandem_planner_failures_total{what="state"}') == 1


async def test_the_loop_ends_when_it_is_told_to() -> None:
    rig, stop = Rig(), asyncio.Event()
    loop = rig.loop()
    running = asyncio.create_task(loop.run(stop))
    await until(lambda: bool(rig.brain.seen))
    stop.set()
    async with asyncio.timeout(WAIT_S):
        await running
    await loop.close()


async def test_a_role_that_the_connector_does_not_know_is_left_out() -> None:
    connector = FakeConnector()
    scaler = Scaler(connector, 30, Clock(), lambda role, outcome: None)
    await scaler.follow({Role.PREFILL: 2}, connector.fleet)
    assert scaler.under_way == {}


async def test_the_admin_server_tells_health_and_the_last_decision() -> None:
    import aiohttp

    rig = Rig(brain=FakeBrain(1))
    loop = rig.loop()
    admin = AdminServer(loop, rig.metrics)
    url = f"http://127.0.0.1:{await admin.start('127.0.0.1', 0)}"
    async with aiohttp.ClientSession() as session:

        async def get(path: str) -> tuple[int, Any]:
            async with session.get(f"{url}{path}") as answer:
                return answer.status, await (answer.text() if path == "/metrics" else answer.json())

        assert (await get("/health"))[0] == 503
        await loop.step()
        assert await get("/live") == (200, {"status": "ready"})
        status, health = await get("/health")
        assert (status, health["status"]) == (200, "ready")
        _, shown = await get("/decision")
        assert shown["decision"]["target"] == {"decode": 1}
        assert shown["decision"]["terms"][0]["how"] == "by the test"
        assert "tandem_planner_looks_total 1.0" in (await get("/metrics"))[1]
    await admin.stop()
    await loop.close()
