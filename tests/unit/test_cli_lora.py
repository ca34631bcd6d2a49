# SPDX-License-Identifier: Apache-2.0
"""`tandem lora` over real admin routes and a discovery folder."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from discovery_contract import worker
from tandem_cli.lora import request_of
from tandem_cli.main import main
from tandem_protocol.admin_site import AdminSite
from tandem_protocol.discovery import open_discovery

Asked = list[tuple[str, str, Any]]


@pytest.fixture
def asked() -> Asked:
    """Method, path and body of each request that arrived."""
    return []


@pytest.fixture
async def discovery(asked: Asked, tmp_path: Path) -> AsyncIterator[str]:
    """Two workers: `good` does everything, `bad` refuses everything; and one without an admin server."""

    def application(status: int, answer: dict[str, Any]) -> web.Application:
        async def handle(request: web.Request) -> web.Response:
            asked.append((request.method, request.raw_path, await request.json() if request.can_read_body else None))
            return web.json_response(answer, status=status)

        app = web.Application()
        app.router.add_route("*", "/{any:.*}", handle)
        return app

    done = {"status": "success", "message": "done", "loras": {"fr": 7}, "sources": {"fr": "file:///fr"}, "count": 1}
    refused = {"status": "error", "message": "no room"}
    sites = [AdminSite(application(200, done)), AdminSite(application(400, refused))]
    ports = [await site.start("127.0.0.1", 0, "none") for site in sites]
    url = f"file:{tmp_path / 'discovery'}"
    store = open_discovery(url)
    for name, admin_url in (("good", f"http://127.0.0.1:{ports[0]}"), ("bad", f"http://127.0.0.1:{ports[1]}"), ("mute", "")):
        await store.register(worker(id=name, admin_url=admin_url))
    yield url
    await store.close()
    for site in sites:
        await site.stop()


@pytest.mark.parametrize(
    ("action", "expected"),
    [(["load", "fr", "file:///fr"], ("POST", "/v1/loras", {"lora_name": "fr", "source": {"uri": "file:///fr"}})),
     (["unload", "org/fr"], ("DELETE", "/v1/loras/org/fr", None)), (["list"], ("GET", "/v1/loras", None))],
)
async def test_every_worker_is_asked(discovery: str, asked: Asked, capsys: pytest.CaptureFixture[str], action: list[str],
                                     expected: tuple[str, str, Any]) -> None:
    """And one that refuses makes the command fail, after the answers of all."""
    assert await asyncio.to_thread(main, ["lora", *action, "--discovery", discovery, "--json"]) == 1
    assert asked == [expected] * 2
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert {(one["worker"], one["ok"], one["message"]) for one in told["workers"]} == {("good", True, "done"), ("bad", False, "no room")}
    assert f"1 of 2 workers did not {action[0]}: bad" in printed.err


async def test_the_list_for_people(discovery: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Adapters below their worker, with number and source."""
    await asyncio.to_thread(main, ["lora", "list", "--discovery", discovery])
    assert set(capsys.readouterr().out.splitlines()) == {"good: 1 adapters", "  fr (7) from file:///fr", "bad: FAILED: no room"}


async def test_a_worker_that_is_away_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its address."""
    url = f"file:{tmp_path}"
    store = open_discovery(url)
    await store.register(worker(admin_url="http://127.0.0.1:1"))
    assert await asyncio.to_thread(main, ["lora", "list", "--discovery", url]) == 1
    assert "http://127.0.0.1:1 does not answer" in capsys.readouterr().out
    await store.close()


async def test_nobody_to_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Is an error, not a success."""
    assert await asyncio.to_thread(main, ["lora", "unload", "fr", "--discovery", f"file:{tmp_path}"]) == 1
    assert "no worker with an admin server" in capsys.readouterr().err


def test_names_are_quoted() -> None:
    """As far as they can be odd at all."""
    assert request_of("unload", {"name": "a?b"})[1] == "/v1/loras/a%3Fb"
