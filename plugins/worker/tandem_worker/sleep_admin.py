# SPDX-License-Identifier: Apache-2.0
"""Sleep on the admin port: `POST /engine/sleep`, `POST /engine/wake_up`, `/engine/is_sleeping`, `POST /clear_kv_blocks`.

Answers are Dynamo's: `{"status": "ok", "message": ...}` or `{"status": "error", "message": ...}`; `success` for cleared blocks.
"""

from collections.abc import Awaitable
from typing import Any

from aiohttp import web

from tandem_protocol.admin_site import bad_request, json_object
from tandem_protocol.errors import RequestError, TandemError, UnavailableError
from tandem_worker.sleep import SleepCycle
from tandem_worker.sleep_terms import LEVELS, TAGS, Patience, UnsupportedError, WrongStateError

_CODES: tuple[tuple[type[TandemError], int], ...] = (
    (UnsupportedError, 501), (WrongStateError, 409), (RequestError, 400), (UnavailableError, 503), (TandemError, 500),
)
_LONGEST_S = 86_400
BLOCKS_TIMEOUT_S = 45.0
"""How long a sleep waits for blocks that decode workers pull: the lease of 30 s after which they are given up, and half of that."""


class SleepRoutes:
    """The routes of one worker."""

    def __init__(self, cycle: SleepCycle, default_level: int, drain_timeout_s: float) -> None:
        self._cycle = cycle
        self._default_level = default_level
        self._drain_timeout_s = drain_timeout_s

    def routes(self) -> list[web.RouteDef]:
        """For the worker's application."""
        return [
            web.post("/engine/sleep", self._sleep),
            web.post("/engine/wake_up", self._wake_up),
            web.get("/engine/is_sleeping", self._is_sleeping),
            web.post("/engine/is_sleeping", self._is_sleeping),
            web.post("/clear_kv_blocks", self._clear),
        ]

    async def _sleep(self, request: web.Request) -> web.Response:
        body = await json_object(request)
        level = body.get("level", self._default_level)
        if level not in LEVELS or isinstance(level, bool):
            raise bad_request(f'send {{"level": 1}}, one of {", ".join(map(str, LEVELS))}')
        patience = Patience(_seconds(body, "drain_timeout_s", self._drain_timeout_s), _seconds(body, "blocks_timeout_s", BLOCKS_TIMEOUT_S))
        return await _answer(self._cycle.sleep(level, patience))

    async def _wake_up(self, request: web.Request) -> web.Response:
        tags = (await json_object(request)).get("tags")
        if tags is not None and not (isinstance(tags, list) and tags and set(map(str, tags)) <= set(TAGS)):
            raise bad_request(f'send {{}} or {{"tags": [...]}} with some of {", ".join(TAGS)}')
        return await _answer(self._cycle.wake_up(tags))

    async def _is_sleeping(self, _: web.Request) -> web.Response:
        level = self._cycle.level
        return web.json_response({"is_sleeping": level is not None, "level": level, "tags": list(self._cycle.away)})

    async def _clear(self, request: web.Request) -> web.Response:
        force = (await json_object(request)).get("force", False)
        if not isinstance(force, bool):
            raise bad_request("force must be true or false")
        return await _answer(self._cycle.clear(force=force), "success")


async def _answer(transition: Awaitable[str], done: str = "ok") -> web.Response:
    try:
        return web.json_response({"status": done, "message": await transition})
    except TandemError as exc:
        code = next(code for kind, code in _CODES if isinstance(exc, kind))
        return web.json_response({"status": "error", "message": str(exc)}, status=code)


def _seconds(body: dict[str, Any], name: str, default: float) -> float:
    value = body.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _LONGEST_S:
        raise bad_request(f"{name} must be a number of seconds from 0 to {_LONGEST_S}")
    return float(value)
