# SPDX-License-Identifier: Apache-2.0
"""The listening end of every admin server. The only module of the protocol that knows aiohttp."""

import json
import socket
from typing import Any

from aiohttp import web

from tandem_protocol.errors import ConfigError

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Content type of Prometheus' text format."""
_STOP_TIMEOUT_S = 2.0


class AdminSite:
    """Serves one application. Resource handling: `stop` closes it; repeating that does nothing."""

    def __init__(self, app: web.Application) -> None:
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_STOP_TIMEOUT_S)

    async def start(self, address: str, port: int, fix: str) -> int:
        """Listens; returns the port, which differs from `port` only for 0. Raises ConfigError, with the fix, when it is taken."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, address, port)
        try:
            await site.start()
        except OSError as exc:
            raise ConfigError(f"admin port {address}:{port} can't be opened ({exc.strerror}): {fix}") from exc
        sockets: list[socket.socket] = site._server.sockets  # type: ignore[union-attr]  # noqa: SLF001 - no public way to the port
        return int(sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Closes the server."""
        await self._runner.cleanup()


async def json_object(request: web.Request) -> dict[str, Any]:
    """The body as a JSON object; empty for no body. Raises HTTPBadRequest with a sentence."""
    if not await request.read():
        return {}
    try:
        body = await request.json()
    except ValueError as exc:
        raise bad_request(f"the body is not JSON: {exc}") from exc
    if not isinstance(body, dict):
        raise bad_request("the body must be a JSON object")
    return body


def bad_request(message: str) -> web.HTTPBadRequest:
    """To be raised: 400 with `{"error": message}`."""
    return web.HTTPBadRequest(text=json.dumps({"error": message}), content_type="application/json")
