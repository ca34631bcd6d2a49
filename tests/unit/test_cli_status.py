# SPDX-License-Identifier: Apache-2.0
"""`tandem status`: rows from Triton and from the workers' admin servers."""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from fake_triton import FakeModel, FakeTriton
from tandem_cli import status
from tandem_cli.status import COLUMNS, Health, ModelStatus, collect, collect_routing, parse_health, plain_table
from tandem_cli.status_fleet import RouterFleet, parse_fleet
from tandem_protocol.errors import UnavailableError

BODY: dict[str, Any] = {
    "status": "ready", "model": "decode", "role": "decode", "active": 3, "running": 2, "waiting": 1, "kv_usage": 0.256, "step_s": 0.01,
}
WORKER = {"role": "decode", "worker_index": "0"}
LOAD = {"active_requests": 2, "active_prefill_tokens": 130.0, "active_blocks": 17.5, "total_blocks": 1000, "index_blocks": 640}
PLACE = {"grpc_url": "h:8001", "triton_model": "vllm", "admin_url": "http://h:8081"}
FLEET: dict[str, Any] = {
    "router": "host-1", "ready": True, "model": "m", "active": 2, "replicas": [],
    "workers": [{"id": "w0", "role": "aggregated", "state": "ready", "placed": True, "reason": "", **PLACE, **LOAD},
                {"id": "w1", "role": "aggregated", "state": "draining", "placed": False, "reason": "it is draining", **PLACE, **LOAD}],
}


@asynccontextmanager
async def admin_server(body: Any, code: int = 200) -> AsyncIterator[int]:
    """An admin server, of a worker or of a router, that answers with this; yields its port."""

    async def answer(_: web.Request) -> web.Response:
        return web.json_response(body, status=code)

    app = web.Application()
    app.add_routes([web.get("/health", answer), web.get("/fleet", answer)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def decode_row(body: Any, code: int = 200, index: int = 0) -> ModelStatus:
    """The row of one worker whose admin server answers so."""
    async with admin_server(body, code) as port:
        models = {"decode": FakeModel(parameters={**WORKER, "worker_index": str(index)})}
        async with FakeTriton(models) as server:
            (row,) = await collect(server.url, port - index)
    return row


async def test_worker_shows_its_load() -> None:
    """Counts and KV use come from the admin port, which is offset by the worker's index."""
    row = await decode_row(BODY, index=3)
    assert row.cells == ("decode", "worker", "decode", "ready", "2", "1", "26%")
    assert row.serves


async def test_draining_worker_is_loaded_but_does_not_serve() -> None:
    """An admin server that answers 503 still tells why."""
    row = await decode_row({**BODY, "status": "draining"}, code=503)
    assert row.cells[3] == "draining"
    assert not row.serves


async def test_admin_port_of_another_worker_is_not_believed() -> None:
    """With a wrong --admin-port another model's numbers would be shown."""
    row = await decode_row({**BODY, "model": "prefill"})
    assert row.health is None
    assert "belongs to model prefill" in str(row.reason)


@pytest.mark.parametrize("body", [{}, [], {**BODY, "running": None}, "x"])
async def test_other_programs_on_the_admin_port_are_told_apart(body: Any) -> None:
    """A body that no worker sends is a reason, not a crash."""
    row = await decode_row(body)
    assert "another program" in str(row.reason)
    assert row.serves


async def test_unreachable_admin_server_leaves_dashes() -> None:
    """From another host the admin port is closed: the model counts as Triton says, and the reason is kept."""
    async with admin_server(BODY) as port:
        pass
    async with FakeTriton({"decode": FakeModel(parameters=WORKER)}) as server:
        (row,) = await collect(server.url, port)
    assert row.cells == ("decode", "worker", "decode", "ready", "-", "-", "-")
    assert "does not answer" in str(row.reason)


async def test_kinds_are_told_apart() -> None:
    """Ensembles, other models and models that did not load need no admin server."""
    models = {
        "disagg": FakeModel(steps=("prefill", "decode")), "resnet": FakeModel(),
        "vllm": FakeModel(state="UNAVAILABLE", reason="no such model folder"),
    }
    async with FakeTriton(models) as server:
        rows = await collect(server.url, 1)
    assert [row.cells[:4] for row in rows] == [
        ("disagg", "ensemble", "-", "ready"), ("resnet", "model", "-", "ready"), ("vllm", "-", "-", "no (no such model folder)"),
    ]


async def test_json_is_one_object_with_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts read everything that the table leaves out."""
    async with FakeTriton({"disagg": FakeModel(steps=("decode",)), "vllm": FakeModel(state="LOADING")}) as server:
        code = await asyncio.to_thread(status.run, argparse.Namespace(url=server.url, admin_port=1, router_admin_port=1, json=True))
    shown = json.loads(capsys.readouterr().out)
    assert code == 0
    assert [(row["model"], row["serves"], row["reason"]) for row in shown["models"]] == [("disagg", True, None), ("vllm", False, "loading")]


@pytest.mark.parametrize("models", [{}, {"vllm": FakeModel(state="LOADING")}])
async def test_nothing_ready_is_an_error_after_the_table(models: dict[str, FakeModel], capsys: pytest.CaptureFixture[str]) -> None:
    """A script that waits for a server goes by the exit code; the table is there all the same."""
    async with FakeTriton(models) as server:
        with pytest.raises(UnavailableError, match="no model is ready"):
            await asyncio.to_thread(status.run, argparse.Namespace(url=server.url, admin_port=1, router_admin_port=1, json=False))
    assert capsys.readouterr().out.startswith("model")


def test_table_is_aligned() -> None:
    """Columns start at the same place in each line."""
    health = Health("ready", "vllm", "aggregated", 12, 10, 2, 1.0)
    rows = [ModelStatus("vllm", ready=True, kind="worker", role="aggregated", health=health), ModelStatus("a-long-name", ready=False)]
    assert plain_table(COLUMNS, [row.cells for row in rows]).splitlines() == [
        "model        kind    role        ready  running  waiting  KV use",
        "vllm         worker  aggregated  ready  10       2        100%",
        "a-long-name  -       -           no     -        -        -",
    ]


def test_terminal_gets_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At a terminal reasons with brackets are text, not markup."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    status._show([ModelStatus("vllm", ready=False, reason="[Errno 2] gone")])
    assert "no ([Errno 2] gone)" in capsys.readouterr().out


def test_health_ignores_fields_of_later_versions() -> None:
    """A newer worker may tell more."""
    assert parse_health(json.dumps({**BODY, "new": {}}).encode()) == Health("ready", "decode", "decode", 3, 2, 1, 0.256)


async def run_json(models: dict[str, FakeModel], router_port: int, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `--json` prints."""
    async with FakeTriton(models) as server:
        arguments = argparse.Namespace(url=server.url, admin_port=1, router_admin_port=router_port, json=True)
        await asyncio.to_thread(status.run, arguments)
    return dict(json.loads(capsys.readouterr().out))


async def test_the_fleet_of_a_router_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Whom it places on and whom not, with load and index."""
    async with admin_server(FLEET) as port, FakeTriton({"router": FakeModel()}) as server:
        arguments = argparse.Namespace(url=server.url, admin_port=1, router_admin_port=port, json=False)
        await asyncio.to_thread(status.run, arguments)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "",
        "router host-1 (ready) of m: 2 requests in flight, 1 of 2 workers placed",
        "worker  role        state     placed               requests  prefill tokens  KV blocks  index blocks  address",
        "w0      aggregated  ready     yes                  2         130             18/1000    640           h:8001 vllm",
        "w1      aggregated  draining  no (it is draining)  2         130             18/1000    640           h:8001 vllm",
    ]


async def test_json_has_the_fleet_of_the_router_or_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    """And null where the server has no router."""
    async with admin_server(FLEET) as port:
        shown = await run_json({"router": FakeModel()}, port, capsys)
    assert shown["router"]["reason"] is None
    assert [(worker["id"], worker["placed"], worker["index_blocks"]) for worker in shown["router"]["fleet"]["workers"]] == [
        ("w0", True, 640), ("w1", False, 640),
    ]
    unreachable = await run_json({"router": FakeModel()}, port, capsys)
    assert unreachable["router"]["fleet"] is None
    assert "does not answer" in unreachable["router"]["reason"]
    assert (await run_json({"resnet": FakeModel()}, port, capsys))["router"] is None


@pytest.mark.parametrize("body", [{}, [], {**FLEET, "workers": [{"id": "w0"}]}, BODY])
async def test_another_program_on_the_routers_admin_port_is_told_apart(body: Any) -> None:
    """A worker's admin server, for instance."""
    async with admin_server(body) as port:
        routing = await collect_routing("127.0.0.1", port)
    assert routing.fleet is None
    assert "another program" in str(routing.reason)


def test_a_fleet_with_replicas_and_fields_of_later_versions() -> None:
    """A newer router may tell more."""
    replica = {"id": "host-2", "synced": True, "requests": 4, "lost": 0}
    fleet = parse_fleet(json.dumps({**FLEET, "replicas": [replica], "new": 1}).encode())
    assert isinstance(fleet, RouterFleet)
    assert [(one.id, one.requests) for one in fleet.replicas] == [("host-2", 4)]
    assert fleet.title.endswith("other routers: 1")
