# SPDX-License-Identifier: Apache-2.0
"""`/v1/loras` of the admin port: GET lists, POST loads, DELETE `/v1/loras/{name}` unloads; the bodies are Dynamo's."""

from collections.abc import Awaitable
from typing import Any

from aiohttp import web

from tandem_protocol.errors import RequestError, TandemError, UnavailableError
from tandem_worker.lora.adapter import Adapter, AdapterConflictError, UnknownAdapterError
from tandem_worker.lora.adapters import Adapters

_BODY = 'send {"lora_name": "...", "source": {"uri": "file:///..."}}'
_STATUS: tuple[tuple[type[TandemError], int], ...] = (
    (UnknownAdapterError, 404), (AdapterConflictError, 409), (RequestError, 400), (UnavailableError, 503),
)


def lora_routes(adapters: Adapters) -> list[web.RouteDef]:
    """The routes over one worker's adapters."""

    async def show(_: web.Request) -> web.Response:
        listing = adapters.listing
        return web.json_response({
            "status": "success", "loras": {adapter.name: adapter.id for adapter in listing}, "count": len(listing),
            "sources": {adapter.name: adapter.uri for adapter in listing},
        })

    async def load(request: web.Request) -> web.Response:
        return await _answer(_load(adapters, request))

    async def unload(request: web.Request) -> web.Response:
        return await _answer(_unload(adapters, request.match_info["name"]))

    return [web.get("/v1/loras", show), web.post("/v1/loras", load), web.delete("/v1/loras/{name:.+}", unload)]


async def _load(adapters: Adapters, request: web.Request) -> dict[str, Any]:
    name, uri = await _asked(request)
    loaded = await adapters.load(name, uri)
    how = "loaded successfully" if loaded.fresh else "already loaded"
    return _done(f"LoRA adapter '{loaded.adapter.name}' {how}", loaded.adapter)


async def _unload(adapters: Adapters, name: str) -> dict[str, Any]:
    adapter = await adapters.unload(name)
    return _done(f"LoRA adapter '{adapter.name}' unloaded successfully", adapter)


async def _asked(request: web.Request) -> tuple[object, object]:
    """Name and URI, unchecked."""
    try:
        body = await request.json()
    except ValueError as exc:
        raise RequestError(f"the body is not JSON ({exc}): {_BODY}") from exc
    source = body.get("source") if isinstance(body, dict) else None
    if not isinstance(source, dict):
        raise RequestError(f"source is missing: {_BODY}")
    return body.get("lora_name"), source.get("uri")


async def _answer(doing: Awaitable[dict[str, Any]]) -> web.Response:
    try:
        return web.json_response(await doing)
    except TandemError as exc:
        status = next((status for kind, status in _STATUS if isinstance(exc, kind)), 500)
        return web.json_response({"status": "error", "message": str(exc)}, status=status)


def _done(message: str, adapter: Adapter) -> dict[str, Any]:
    return {"status": "success", "message": message, "lora_name": adapter.name, "lora_id": adapter.id}
