# SPDX-License-Identifier: Apache-2.0
"""The admin server of one worker: `/live`, `/health`, `/metrics`, `POST /engine/abort`, `POST /engine/drain`, and `/kvbm`;
the routes of sleep are in `sleep_admin`.

It runs on the engine's event loop and listens on loopback by default: whoever reaches it can drain the worker.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

from aiohttp import web
from prometheus_client import REGISTRY

from tandem_protocol.admin_site import METRICS_TYPE, AdminSite, bad_request, json_object
from tandem_protocol.errors import RequestError, UnavailableError
from tandem_worker.metrics.exposition import Exposition
from tandem_worker.status import WorkerState, WorkerStatus

_MAX_BODY = 64 * 1024
_TIERS = ("G1", "G2", "G3", "G4")
_EVERYTHING = Exposition((REGISTRY,))
_NOT_LIVE = frozenset({WorkerState.DEAD, WorkerState.HUNG, WorkerState.STOPPED})


class Host(Protocol):
    """What the admin server needs of the engine host."""

    def status(self) -> WorkerStatus:
        """A snapshot."""

    async def abort(self, request_id: str) -> int:
        """Aborts by client request id; returns how many were in flight."""

    async def drain(self, timeout_s: float) -> int:
        """Stops taking requests; returns how many had to be aborted."""

    async def kvbm(self, command: str, tier: str) -> dict[str, Any]:
        """`status` of the KV tiers, or `reset` of one. Raises RequestError without such tiers, UnavailableError after a deadline."""


async def _no_models() -> dict[str, str]:
    return {}


class AdminServer:
    """Serves the admin routes of one worker."""

    def __init__(self, host: Host, model_name: str, drain_timeout_s: float,
                 models: Callable[[], Awaitable[dict[str, str]]] = _no_models, routes: Iterable[web.RouteDef] = (),
                 metrics: Callable[[], bytes] = _EVERYTHING.text) -> None:  # fmt: skip
        """`models` tells the state of each model that Triton holds, by name; empty where Triton doesn't answer. `routes`: further ones.

        `metrics`: in Prometheus' text format; it is called in a thread.
        """
        self._host = host
        self._model_name = model_name
        self._drain_timeout_s = drain_timeout_s
        self._models = models
        self._exposition = metrics
        self._site = AdminSite(self._application(routes))

    async def start(self, address: str, port: int) -> int:
        """Listens; returns the port, which differs from `port` only for 0. Raises ConfigError when it is taken."""
        return await self._site.start(address, port, "set DYN_SYSTEM_PORT to a free one")

    async def stop(self) -> None:
        """Closes the server."""
        await self._site.stop()

    def _application(self, routes: Iterable[web.RouteDef]) -> web.Application:
        app = web.Application(client_max_size=_MAX_BODY)
        app.add_routes([
            web.get("/live", self._live),
            web.get("/health", self._health),
            web.get("/metrics", self._metrics),
            web.post("/engine/abort", self._abort),
            web.post("/engine/drain", self._drain),
            web.get("/kvbm", self._kvbm_status),
            web.post("/kvbm", self._kvbm_reset),
            *routes,
        ])
        return app

    async def _live(self, _: web.Request) -> web.Response:
        status = self._host.status()
        reason = {"reason": status.reason} if status.reason else {}
        return web.json_response({"status": status.state, **reason}, status=503 if status.state in _NOT_LIVE else 200)

    async def _health(self, _: web.Request) -> web.Response:
        status, models = self._host.status(), await self._models()
        body = {**status.as_json(self._model_name), **({"models": models} if models else {})}
        return web.json_response(body, status=200 if status.state is WorkerState.READY else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        body = await asyncio.to_thread(self._exposition)
        return web.Response(body=body, headers={"Content-Type": METRICS_TYPE})

    async def _abort(self, request: web.Request) -> web.Response:
        body = await json_object(request)
        request_id = body.get("request_id")
        if not isinstance(request_id, str) or not request_id:
            raise bad_request('send {"request_id": "..."}, the id that the client gave its request')
        return web.json_response({"aborted": await self._host.abort(request_id)})

    async def _drain(self, request: web.Request) -> web.Response:
        body = await json_object(request)
        timeout_s = body.get("timeout_s", self._drain_timeout_s)
        if not isinstance(timeout_s, int | float) or isinstance(timeout_s, bool) or not 0 <= timeout_s <= 86_400:
            raise bad_request("timeout_s must be a number of seconds from 0 to 86400")
        return web.json_response({"aborted": await self._host.drain(float(timeout_s))})

    async def _kvbm_status(self, _: web.Request) -> web.Response:
        return await self._kvbm("status", "")

    async def _kvbm_reset(self, request: web.Request) -> web.Response:
        tier = (await json_object(request)).get("reset")
        if tier not in _TIERS:
            raise bad_request(f'send {{"reset": "G2"}}, one of {", ".join(_TIERS)}')
        return await self._kvbm("reset", tier)

    async def _kvbm(self, command: str, tier: str) -> web.Response:
        try:
            return web.json_response(await self._host.kvbm(command, tier))
        except RequestError as exc:
            return web.json_response({"error": str(exc)}, status=404)
        except UnavailableError as exc:
            return web.json_response({"error": str(exc)}, status=503)
