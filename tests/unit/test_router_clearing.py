# SPDX-License-Identifier: Apache-2.0
"""Clearing the caches of a fleet, over real HTTP to stand-in workers."""

from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from discovery_contract import worker
from tandem_protocol.admin_site import AdminSite
from tandem_router.clearing import Clearing, clear_fleet


@pytest.fixture
async def workers_port() -> AsyncIterator[int]:
    """Three workers at one port: idle, busy unless forced, and one that is no worker."""
    async def idle(_: web.Request) -> web.Response:
        return web.json_response({"status": "success", "message": "KV cache cleared"})

    async def busy(request: web.Request) -> web.Response:
        forced = (await request.json())["force"]
        message = "forced" if forced else "blocks are in use"
        return web.json_response({"status": "success" if forced else "error", "message": message}, status=200 if forced else 503)

    async def strange(_: web.Request) -> web.Response:
        return web.Response(text="<html>")

    app = web.Application()
    app.add_routes([web.post(f"/{handler.__name__}/clear_kv_blocks", handler) for handler in (idle, busy, strange)])
    site = AdminSite(app)
    yield await site.start("127.0.0.1", 0, "")
    await site.stop()


@pytest.mark.parametrize("force", [False, True])
async def test_every_worker_is_asked_and_told_of(workers_port: int, force: bool) -> None:
    """In their order; one that can't be asked does not keep the others from being cleared."""
    base = f"http://127.0.0.1:{workers_port}"
    urls = {"idle": f"{base}/idle", "busy": f"{base}/busy", "strange": f"{base}/strange", "gone": "http://127.0.0.1:9", "shy": ""}
    answers = await clear_fleet([worker(id=name, admin_url=url) for name, url in urls.items()], force=force)
    assert [(answer.worker, answer.cleared) for answer in answers] == [
        ("idle", True), ("busy", force), ("strange", False), ("gone", False), ("shy", False)]
    assert answers[0] == Clearing("idle", True, "KV cache cleared")
    assert answers[1].message == ("forced" if force else "blocks are in use")
    assert "does not answer" in answers[3].message
    assert "no admin port" in answers[4].message
