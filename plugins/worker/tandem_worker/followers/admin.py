# SPDX-License-Identifier: Apache-2.0
"""The admin server of a follower: `/live`, `/health` and `/metrics`, as a worker's; it takes no requests, so there is nothing else."""

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web

from tandem_protocol.admin_site import METRICS_TYPE, AdminSite


class FollowerAdmin:
    """Serves the admin routes of one follower."""

    def __init__(self, status: Callable[[], dict[str, Any]], metrics: Callable[[], bytes]) -> None:
        """`status`: with the key `status`, which is `following` while the leader holds it. `metrics` is called in a thread."""
        self._status = status
        self._metrics = metrics
        app = web.Application()
        app.add_routes([web.get("/live", self._live), web.get("/health", self._health), web.get("/metrics", self._text)])
        self._site = AdminSite(app)

    async def start(self, address: str, port: int) -> int:
        """Listens; returns the port. Raises ConfigError when it is taken."""
        return await self._site.start(address, port, "set DYN_SYSTEM_PORT to a free one")

    async def stop(self) -> None:
        """Closes the server."""
        await self._site.stop()

    async def _live(self, _: web.Request) -> web.Response:
        return web.json_response({"status": self._status()["status"]})

    async def _health(self, _: web.Request) -> web.Response:
        status = self._status()
        return web.json_response(status, status=200 if status["status"] == "following" else 503)

    async def _text(self, _: web.Request) -> web.Response:
        return web.Response(body=await asyncio.to_thread(self._metrics), headers={"Content-Type": METRICS_TYPE})
