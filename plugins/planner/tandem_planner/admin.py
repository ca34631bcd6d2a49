# SPDX-License-Identifier: Apache-2.0
"""The planner's admin server: `/live`, `/health`, `/metrics`, and `/decision`, the last one term by term."""

from typing import Any

import msgspec
from aiohttp import web

from tandem_planner.loop import PlannerLoop
from tandem_planner.metrics import PlannerMetrics
from tandem_protocol.admin_site import METRICS_TYPE, AdminSite


class AdminServer:
    """Serves the figures of one loop. Runs on its event loop."""

    def __init__(self, loop: PlannerLoop, metrics: PlannerMetrics) -> None:
        self._loop = loop
        self._metrics_of = metrics
        app = web.Application()
        app.add_routes([
            web.get("/live", self._live), web.get("/health", self._health), web.get("/metrics", self._metrics),
            web.get("/decision", self._decision),
        ])
        self._site = AdminSite(app)

    async def start(self, address: str, port: int) -> int:
        """Listens; returns the port. Raises ConfigError when it is taken."""
        return await self._site.start(address, port, "set TANDEM_PLANNER_ADMIN_PORT to a free one")

    async def stop(self) -> None:
        """Closes the server."""
        await self._site.stop()

    async def _live(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ready"})

    async def _health(self, _: web.Request) -> web.Response:
        """Unwell before the first decision, and after several looks that came to none; what is missing meanwhile stands there, too."""
        memory = self._loop.memory
        body = {"status": "ready" if self._loop.well else "unwell", "fruitless": memory.fruitless,
                "missing": list(memory.observation.missing) if memory.observation is not None else []}
        return web.json_response(body, status=200 if self._loop.well else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics_of.exposition(), headers={"Content-Type": METRICS_TYPE})

    async def _decision(self, _: web.Request) -> web.Response:
        memory = self._loop.memory
        body: dict[str, Any] = {"decision": memory.decision, "observation": memory.observation, "under_way": self._loop.scaler.under_way}
        return web.Response(body=msgspec.json.encode(body), content_type="application/json")
