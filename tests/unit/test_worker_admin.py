# SPDX-License-Identifier: Apache-2.0
"""The admin server, over a fake engine host."""

import socket
from collections.abc import AsyncIterator

import pytest
from aiohttp import ClientSession

from fakes import FakeHost
from tandem_protocol.errors import ConfigError
from tandem_worker.admin import AdminServer
from tandem_worker.status import WorkerState

DRAIN_TIMEOUT_S = 20.0


@pytest.fixture
def host() -> FakeHost:
    """A ready host with three requests, two of the same id."""
    return FakeHost(active=["a", "b", "a"])


@pytest.fixture
async def client(host: FakeHost) -> AsyncIterator[ClientSession]:
    """A client of the admin server of `host`, on any free port."""
    server = AdminServer(host, "decode", DRAIN_TIMEOUT_S)
    port = await server.start("127.0.0.1", 0)
    async with ClientSession(f"http://127.0.0.1:{port}") as session:
        yield session
    await server.stop()


@pytest.mark.parametrize(
    ("state", "live", "healthy"),
    [(WorkerState.STARTING, 200, 503), (WorkerState.READY, 200, 200), (WorkerState.DRAINING, 200, 503), (WorkerState.DEAD, 503, 503),
     (WorkerState.STOPPED, 503, 503), (WorkerState.HUNG, 503, 503), (WorkerState.UNWELL, 200, 503)],
)
async def test_codes_by_state(client: ClientSession, host: FakeHost, state: WorkerState, live: int, healthy: int) -> None:
    """Live means that a restart would not help; healthy, that it takes requests."""
    host.state = state
    async with client.get("/live") as answer:
        assert (answer.status, await answer.json()) == (live, {"status": state.value})
    async with client.get("/health") as answer:
        assert (answer.status, (await answer.json())["status"]) == (healthy, state.value)


async def test_health_tells_the_load(client: ClientSession) -> None:
    """The router reads it."""
    async with client.get("/health") as answer:
        assert await answer.json() == {
            "status": "ready", "model": "decode", "role": "decode", "active": 3, "running": 1, "waiting": 2, "kv_usage": 0.5,
            "step_s": 0.01,
        }


async def test_metrics_are_those_that_the_server_was_given(host: FakeHost) -> None:
    """LMCache's lie in files, for one."""
    server = AdminServer(host, "decode", DRAIN_TIMEOUT_S, metrics=lambda: b"\nlmcache:hits_total 1.0\n")
    port = await server.start("127.0.0.1", 0)
    async with ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as answer:
        assert (await answer.text()).endswith("\nlmcache:hits_total 1.0\n")
    await server.stop()


async def test_metrics_are_prometheus_text(client: ClientSession) -> None:
    """Of this process's registry, which vLLM writes to."""
    async with client.get("/metrics") as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert "# HELP " in await answer.text()


@pytest.mark.parametrize(("request_id", "aborted"), [("a", 2), ("b", 1), ("unknown", 0)])
async def test_abort_tells_how_many_were_in_flight(client: ClientSession, request_id: str, aborted: int) -> None:
    """Nothing to abort is no error: the request may have just finished."""
    async with client.post("/engine/abort", json={"request_id": request_id}) as answer:
        assert (answer.status, await answer.json()) == (200, {"aborted": aborted})


@pytest.mark.parametrize(
    ("body", "timeout_s"),
    [(b"", DRAIN_TIMEOUT_S), (b"{}", DRAIN_TIMEOUT_S), (b'{"timeout_s": 0}', 0.0), (b'{"timeout_s": 1.5}', 1.5)],
)
async def test_drain_takes_its_timeout_or_the_configured_one(client: ClientSession, host: FakeHost, body: bytes, timeout_s: float) -> None:
    """A body is optional."""
    async with client.post("/engine/drain", data=body) as answer:
        assert (answer.status, await answer.json()) == (200, {"aborted": 3})
    assert host.drained == [timeout_s]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [("abort", b"", "send {"), ("abort", b"{}", "send {"), ("abort", b'{"request_id": 3}', "send {"),
     ("abort", b'{"request_id": ""}', "send {"), ("abort", b"x", "the body is not JSON"),
     ("abort", b"[]", "the body must be a JSON object"), ("drain", b"{", "the body is not JSON"),
     ("drain", b'"20"', "the body must be a JSON object"), ("drain", b'{"timeout_s": "20"}', "timeout_s must be"),
     ("drain", b'{"timeout_s": true}', "timeout_s must be"), ("drain", b'{"timeout_s": -1}', "timeout_s must be"),
     ("drain", b'{"timeout_s": 1e9}', "timeout_s must be"), ("drain", b'{"timeout_s": NaN}', "timeout_s must be"),
     ("drain", b'{"timeout_s": null}', "timeout_s must be")],
)
async def test_bad_bodies_are_refused_with_the_fix(client: ClientSession, host: FakeHost, path: str, body: bytes, message: str) -> None:
    """400 and a JSON object with one sentence; nothing is done."""
    async with client.post(f"/engine/{path}", data=body) as answer:
        assert answer.status == 400
        assert answer.content_type == "application/json"
        assert (await answer.json())["error"].startswith(message)
    assert (len(host.active), host.drained) == (3, [])


@pytest.mark.parametrize(("method", "path", "code"), [("GET", "/engine/drain", 405), ("POST", "/health", 405), ("GET", "/nothing", 404)])
async def test_other_routes_are_refused(client: ClientSession, method: str, path: str, code: int) -> None:
    """What changes the worker is a POST."""
    async with client.request(method, path) as answer:
        assert answer.status == code


async def test_a_large_body_is_refused(client: ClientSession) -> None:
    """Nobody needs more than an id."""
    async with client.post("/engine/abort", data=b"x" * 100_000) as answer:
        assert answer.status == 413


async def test_a_taken_port_is_named_with_its_setting(host: FakeHost) -> None:
    """ConfigError, so that the load ends with one sentence."""
    server = AdminServer(host, "decode", DRAIN_TIMEOUT_S)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="set DYN_SYSTEM_PORT to a free one"):
            await server.start("127.0.0.1", taken.getsockname()[1])
    await server.stop()


async def test_stop_before_start_does_nothing(host: FakeHost) -> None:
    """A worker may fail before its admin server is up."""
    await AdminServer(host, "decode", DRAIN_TIMEOUT_S).stop()


async def test_kv_tiers_are_asked(client: ClientSession) -> None:
    """A status by GET, a reset of one tier by POST."""
    async with client.get("/kvbm") as answer:
        assert (answer.status, await answer.json()) == (200, {"command": "status", "tier": ""})
    async with client.post("/kvbm", json={"reset": "G3"}) as answer:
        assert (answer.status, await answer.json()) == (200, {"command": "reset", "tier": "G3"})


@pytest.mark.parametrize(("tier", "code", "message"),
                         [("G4", 404, "has no tier G4"), ("G2", 503, "did not answer"), ("G7", 400, "one of G1"), (None, 400, "one of G1")])
async def test_a_tier_that_can_not_be_reset_is_an_error(client: ClientSession, tier: str | None, code: int, message: str) -> None:
    """With the reason."""
    async with client.post("/kvbm", json={"reset": tier}) as answer:
        assert answer.status == code
        assert message in (await answer.json())["error"]
