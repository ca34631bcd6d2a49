# SPDX-License-Identifier: Apache-2.0
"""Every connector does the same: what is asked for, once, within its bounds; what it can't do it says, and leaves the fleet."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker.errors
import pytest

from tandem_planner.connectors import Bounds, Connector
from tandem_planner.connectors.docker import DockerConnector
from tandem_planner.connectors.draining import Drainer, sum_of
from tandem_planner.connectors.triton import TritonConnector
from tandem_planner.connectors.triton_server import TritonServer
from tandem_planner.terms import Pool
from tandem_protocol.errors import ConfigError, TandemError, UnavailableError
from tandem_protocol.roles import Role
from tandem_protocol.workers import WorkerState
from triton_double import TritonDouble, Worker

BOUNDS = Bounds(call_s=5, scale_s=10, check_s=0.01, drain_s=5)
WAIT_S = 20.0
ROLE = Role.DECODE


@dataclass
class FakeContainer:
    """As docker's, in memory."""

    name: str
    labels: dict[str, str]
    status: str = "created"
    health: str = ""
    stops: list[int] = field(default_factory=list)

    @property
    def id(self) -> str:
        """Its name will do."""
        return self.name

    @property
    def attrs(self) -> dict[str, Any]:
        """The part of `inspect` that is looked at."""
        return {"State": {"Status": self.status, **({"Health": {"Status": self.health}} if self.health else {})}}

    def start(self) -> None:
        """Runs."""
        self.status = "running"

    def stop(self, timeout: int) -> None:
        """Down."""
        self.stops.append(timeout)
        self.status = "exited"


@dataclass
class FakeEngine:
    """As docker's client."""

    all: list[FakeContainer]
    failure: str = ""

    @property
    def containers(self) -> "FakeEngine":
        """The collection is the client itself."""
        return self

    def list(self, *, all: bool, filters: Mapping[str, Any]) -> list[FakeContainer]:  # noqa: A002 - docker's name
        """By labels, as the Engine filters."""
        if self.failure:
            raise docker.errors.APIError(self.failure)
        wanted = [label.partition("=") for label in filters["label"]]
        return [one for one in self.all if all and _has(one.labels, wanted)]

    def get(self, container: str) -> FakeContainer:
        """By id."""
        return next(one for one in self.all if one.id == container)

    def close(self) -> None:
        """Nothing."""


def _has(labels: Mapping[str, str], wanted: list[tuple[str, str, str]]) -> bool:
    return all(key in labels and (not equals or labels[key] == value) for key, equals, value in wanted)


@dataclass
class Subject:
    """A connector over two decode workers, one of which runs."""

    connector: Connector
    running: Callable[[], int]
    """Workers that run, as whoever runs them says."""


@asynccontextmanager
async def triton_subject() -> AsyncIterator[Subject]:
    double = TritonDouble({"decode_0": Worker("READY", WorkerState.READY), "decode_1": Worker()}, ROLE)
    await double.start()
    yield Subject(triton_over(double), lambda: sum(one.state == "READY" for one in double.workers.values()))
    await double.stop()


def triton_over(double: TritonDouble, bounds: Bounds = BOUNDS) -> TritonConnector:
    """The connector of a double."""
    drainer = Drainer(bounds.drain_s, bounds.call_s, check_s=0.01, lease_s=bounds.drain_s)
    return TritonConnector(TritonServer(double.url, bounds), double.records, {double.role: ("decode*", "prefill*")}, drainer, bounds)


@asynccontextmanager
async def docker_subject() -> AsyncIterator[Subject]:
    engine = FakeEngine([container("d0", "running"), container("d1"), container("foreign", fleet="other")])
    yield Subject(docker_over(engine), lambda: sum(one.status == "running" for one in engine.all))


def container(name: str, status: str = "created", fleet: str = "tandem", role: str = ROLE) -> FakeContainer:
    """A container of the fleet."""
    return FakeContainer(name, {"tandem.dev/fleet": fleet, "tandem.dev/role": role}, status)


def docker_over(engine: FakeEngine) -> DockerConnector:
    """The connector of an engine."""
    return DockerConnector(engine, "tandem", Drainer(5, 5, check_s=0.01), BOUNDS)


SUBJECTS = {"triton": triton_subject, "docker": docker_subject}


@pytest.fixture(params=SUBJECTS)
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    """Each in turn."""
    async with SUBJECTS[request.param]() as made:
        yield made
        await made.connector.close()
        await made.connector.close()  # repeating it does nothing


async def test_a_pool_grows_and_shrinks(subject: Subject) -> None:
    """And is settled when `scale` returns."""
    assert await subject.connector.pools() == {ROLE: Pool(1, 1)}
    await subject.connector.scale(ROLE, 2)
    assert (await subject.connector.pools(), subject.running()) == ({ROLE: Pool(2, 2)}, 2)
    await subject.connector.scale(ROLE, 2)
    assert subject.running() == 2
    await subject.connector.scale(ROLE, 0)
    assert (await subject.connector.pools(), subject.running()) == ({ROLE: Pool(0, 0)}, 0)


async def test_more_than_there_is_room_for_is_refused_and_changes_nothing(subject: Subject) -> None:
    with pytest.raises(UnavailableError, match=r"3 decode workers are wanted and .* 2"):
        await subject.connector.scale(ROLE, 3)
    assert subject.running() == 1


# --- triton -------------------------------------------------------------------------------------------------------------


async def test_a_worker_that_goes_is_drained_until_nobody_needs_it() -> None:
    """The last by name; requests first, and a prefill worker's KV."""
    double = TritonDouble({f"prefill_{n}": Worker("READY", WorkerState.READY, running=3, kv_use=0.5) for n in (2, 10)}, Role.PREFILL)
    await double.start()
    connector = triton_over(double)
    await connector.scale(Role.PREFILL, 1)
    assert double.happened == ["drain prefill_10", "unload prefill_10 running=0 kv=0"]
    await connector.close()
    await double.stop()


async def test_a_drain_that_was_left_half_done_is_finished() -> None:
    """A draining worker counts as there until it is unloaded, so that the pool is not settled before."""
    double = TritonDouble({"decode_0": Worker("READY", WorkerState.READY), "decode_1": Worker("READY", WorkerState.DRAINING)}, ROLE)
    await double.start()
    connector = triton_over(double)
    assert await connector.pools() == {ROLE: Pool(ready=2, wanted=1)}
    await connector.scale(ROLE, 1)
    assert double.happened == ["drain decode_1", "unload decode_1 running=0 kv=0"]
    await connector.scale(ROLE, 2)  # the model can be loaded again
    assert double.happened[-1] == "load decode_1"
    await connector.close()
    await double.stop()


async def test_no_ready_worker_goes_while_its_successor_only_starts() -> None:
    """A loaded model that isn't in discovery takes no requests yet."""
    double = TritonDouble({"decode_0": Worker("READY", WorkerState.READY), "decode_1": Worker("READY")}, ROLE)
    await double.start()
    connector = triton_over(double)
    scaling = asyncio.create_task(connector.scale(ROLE, 1))
    for _ in range(3):
        assert (await connector.pools())[ROLE] == Pool(ready=1, wanted=2)
    assert double.happened == []
    double.workers["decode_1"].record = WorkerState.READY
    async with asyncio.timeout(WAIT_S):
        await scaling
    assert double.happened == ["drain decode_1", "unload decode_1 running=0 kv=0"]
    await connector.close()
    await double.stop()


async def test_a_model_that_can_not_be_loaded_is_passed_over_and_one_that_sleeps_left_alone() -> None:
    """The next spare one serves; a sleeper is neither a worker nor spare."""
    double = TritonDouble({"decode_0": Worker("READY", WorkerState.READY), "decode_1": Worker(broken=True),
                           "decode_2": Worker("READY", WorkerState.ASLEEP), "decode_3": Worker()}, ROLE)
    await double.start()
    connector = triton_over(double)
    assert await connector.pools() == {ROLE: Pool(1, 1)}
    await connector.scale(ROLE, 2)
    assert double.happened == ["load decode_3"]
    with pytest.raises(UnavailableError, match=r"no model could be loaded: .*it is broken"):
        await connector.scale(ROLE, 3)
    assert await connector.pools() == {ROLE: Pool(2, 2)}
    await connector.close()
    await double.stop()


@pytest.mark.parametrize("how", ["load", "stuck", "silent", "gone"])
async def test_what_triton_does_not_do_becomes_a_sentence_in_time(how: str) -> None:
    """A refused load, an unload that hangs, a worker that never registers, a server that is away."""
    double = TritonDouble({"decode_0": Worker("READY", WorkerState.READY, stuck=True), "decode_1": Worker(registers=False)}, ROLE)
    await double.start()
    connector = triton_over(double, Bounds(call_s=0.5, scale_s=0.5, check_s=0.01, drain_s=0.2))
    double.refuses = "out of memory" if how == "load" else ""
    if how == "gone":
        await double.stop()
    count, sentence = {"load": (2, "out of memory"), "stuck": (0, "not within|still UNLOADING"), "silent": (2, "starting: decode_1"),
                       "gone": (2, "can't be asked")}[how]
    with pytest.raises(UnavailableError, match=sentence):
        async with asyncio.timeout(WAIT_S):
            await connector.scale(ROLE, count)
    await connector.close()
    await double.stop()


async def test_a_worker_that_can_not_be_told_is_not_ended() -> None:
    double = TritonDouble({"decode_0": Worker("READY", WorkerState.READY)}, ROLE)
    await double.start()
    drainer = Drainer(0.2, 0.2)
    (record,) = await double.records()
    await double.stop()
    with pytest.raises(UnavailableError, match="could not be drained"):
        await drainer.drain(record)
    await drainer.close()


def test_samples_of_one_worker_behind_a_shared_port() -> None:
    text = 'a{model_name="m_0"} 1\na{model_name="m_1"} 2\nb{x="y"} 4\n# a{model_name="m_0"} 8\n'
    assert (sum_of(text, ("a",), "m_1"), sum_of(text, ("a",), "served"), sum_of(text, ("b",), "m_1")) == (2, 3, 4)


# --- docker -------------------------------------------------------------------------------------------------------------


async def test_a_container_counts_when_it_is_well() -> None:
    """With a health check only then."""
    engine = FakeEngine([container("d0", "running")])
    engine.all[0].health = "starting"
    connector = docker_over(engine)
    assert await connector.pools() == {ROLE: Pool(ready=0, wanted=1)}
    scaling = asyncio.create_task(connector.scale(ROLE, 1))
    await connector.pools()
    assert not scaling.done()
    engine.all[0].health = "healthy"
    async with asyncio.timeout(WAIT_S):
        await scaling
    await connector.scale(ROLE, 0)
    assert engine.all[0].stops == [5]
    await connector.close()


async def test_what_docker_does_not_do_becomes_a_sentence() -> None:
    engine = FakeEngine([container("d0", role="nonsense")])
    connector = docker_over(engine)
    with pytest.raises(ConfigError, match=r"container d0 has the label tandem\.dev/role='nonsense'"):
        await connector.pools()
    engine.failure = "the daemon is away"
    with pytest.raises(TandemError, match="the daemon is away"):
        await connector.pools()
    await connector.close()


def test_no_other_module_knows_the_clients() -> None:
    """Each heavy client has one edge."""
    folder = Path(__import__("tandem_planner.connectors").__path__[0])
    texts = {path.name: path.read_text() for path in folder.rglob("*.py")}
    for client, edge in (("kubernetes", "kubernetes_api.py"), ("docker", "docker.py"), ("etcd3gw", "virtual.py")):
        users = [name for name, text in texts.items() if f"\nfrom {client}" in text or f"\nimport {client}" in text]
        assert users == [edge]
