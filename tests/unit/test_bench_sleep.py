# SPDX-License-Identifier: Apache-2.0
"""The GPU run of sleep, over stand-in engines: it passes where all is well, and says what is not."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web
from benchmarks.gpu import sleep as bench

from fakes import WAIT_S
from sleepers import StubEngine, StubHost
from tandem_cli.serve.run_state import RunState
from tandem_protocol.admin_site import AdminSite
from tandem_worker.sleep import SleepCycle
from tandem_worker.sleep_admin import SleepRoutes
from tandem_worker.sleep_terms import Abilities
from tandem_worker.status import WorkerState

LEASE_S = 0.3


class PatientHost(StubHost):
    """Drains at once, whatever the bound."""

    async def drain(self, timeout_s: float) -> int:
        """Nothing is in flight."""
        self.state = WorkerState.DRAINING
        return 0


class StubFleet:
    """Three workers with admin ports and a front like Triton's, on an event loop in a thread."""

    def __init__(self, *, refusal: str = "") -> None:
        self.engines = {name: StubEngine() for name in ("vllm", "prefill", "decode")}
        self.hosts = {name: PatientHost() for name in self.engines}
        self.corrupt = ""
        """A path whose text changes after its worker has slept."""
        self.moved = 0.0
        self.ports: dict[str, int] = {}
        self._refusal = refusal
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "StubFleet":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(WAIT_S)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(WAIT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()

    @property
    def state(self) -> RunState:
        """As the launcher writes it down."""
        admin = {name: f"http://127.0.0.1:{self.ports[name]}" for name in self.engines}
        return RunState("run", 1, 0.0, self.ports["front"], 0, 0, models=(), admin_urls=admin, router_urls=())

    def used_mib(self) -> int:
        """Each engine that is awake takes 1000."""
        return sum(1000 for engine in self.engines.values() if not engine.away)

    async def _open(self) -> None:
        self._sites = {"front": AdminSite(self._front())}
        for name, engine in self.engines.items():
            engine.__post_init__()  # its events belong to this loop
            cycle = SleepCycle(self.hosts[name], engine, engine.verify, Abilities(self._refusal), name)
            self._sites[name] = AdminSite(self._admin(name, cycle))
        for name, site in self._sites.items():
            self.ports[name] = await site.start("127.0.0.1", 0, "")

    async def _close(self) -> None:
        for site in self._sites.values():
            await site.stop()

    def _admin(self, name: str, cycle: SleepCycle) -> web.Application:
        async def health(_: web.Request) -> web.Response:
            return web.json_response({"status": str(self.hosts[name].state)})

        async def metrics(_: web.Request) -> web.Response:
            return web.Response(text=f'{bench.BYTES_MOVED}{{engine="0"}} {self.moved}\n')

        app = web.Application()
        app.add_routes([*SleepRoutes(cycle, 1, 1.0).routes(), web.get("/health", health), web.get("/metrics", metrics)])
        return app

    def _front(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.post("/v2/models/prefill/infer", self._orphan), web.post("/v2/models/{model}/generate", self._generate)])
        return app

    async def _orphan(self, _: web.Request) -> web.Response:
        held = self.engines["prefill"].held
        held.clear()
        asyncio.get_running_loop().call_later(LEASE_S, held.set)
        return web.json_response({})

    async def _generate(self, request: web.Request) -> web.Response:
        model, body = request.match_info["model"], await request.json()
        needed = {"router": (), "disagg": ("prefill", "decode")}.get(model, (model,))
        if any(self.hosts[name].state is not WorkerState.READY for name in needed):
            return web.json_response({"error": "the worker is asleep: retry on another worker"}, status=503)
        self.moved += model == "disagg"
        slept = any("sleep1" in self.engines[name].calls for name in needed)
        return web.json_response({"text_output": f"{hash(body['text_input'])}{slept and model == self.corrupt}"})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds for engines that take no time."""
    monkeypatch.setattr(bench, "ROLLBACK_BOUND_S", LEASE_S / 10)


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubFleet]:
    """With sleep mode, and memory that can be seen."""
    with StubFleet() as running:
        monkeypatch.setattr(bench, "used_mib", running.used_mib)
        yield running


def test_a_healthy_fleet_passes(fleet: StubFleet) -> None:
    """Each worker at each level, a rollback, and traffic all the while."""
    report = bench.measure(bench.Bench(fleet.state), (1, 2))
    assert report["passed"], report
    assert [(cycle["worker"], cycle["level"]) for cycle in report["cycles"]] == [
        (worker, level) for worker in ("vllm", "decode", "prefill") for level in (1, 2)]
    assert {cycle["used_mib"] for cycle in report["cycles"]} == {(3000, 2000, 3000)}
    assert (report["rollback"]["code"], report["rollback"]["status_after"]) == (503, "ready")
    assert report["router"]["requests"] >= 6
    assert report["router"]["failed"] == 0


def test_a_wrong_text_fails(fleet: StubFleet) -> None:
    """Though everything else is well."""
    fleet.corrupt = "disagg"
    report = bench.measure(bench.Bench(fleet.state), (1, 2))
    assert not report["passed"]
    assert {cycle["worker"] for cycle in report["cycles"] if not cycle["same_text"]} == {"decode", "prefill"}


def test_a_sleep_that_fails_is_told(fleet: StubFleet) -> None:
    """With what was measured before."""
    fleet.engines["decode"].broken = {"sleep2"}
    report: dict[str, Any] = bench.measure(bench.Bench(fleet.state), (1, 2))
    assert not report["passed"]
    assert "sleep2 broke; it serves again" in report["error"]
    assert len(report["cycles"]) == 3


def test_without_sleep_mode_the_pause_is_measured() -> None:
    """And the other levels must be refused."""
    with StubFleet(refusal="no sleep mode") as running:
        report = bench.measure(bench.Bench(running.state), (0,))
    assert report["passed"], report
    assert report["unsupported_codes"] == [501, 501]
