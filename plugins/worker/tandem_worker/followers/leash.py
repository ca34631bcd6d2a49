# SPDX-License-Identifier: Apache-2.0
"""The follower's side: finds its leader, tells it of the ranks here, and knows when it is gone. On one event loop."""

import asyncio
import logging
from collections.abc import Callable

import aiohttp
import msgspec

from tandem_protocol.errors import ConfigError, UnavailableError
from tandem_worker.followers.terms import FIGURES_INTERVAL_S, PATH, Figures, Joining, Welcome, beat_s

log = logging.getLogger(__name__)

_RETRY_S = 1.0
_ANSWER_S = 5.0


class Leash:
    """Ties a follower to its leader until one of them ends."""

    def __init__(self, leader_url: str, joining: Joining, figures: Callable[[], Figures], find_timeout_s: float, patience_s: float) -> None:
        """`figures` is called in a thread. `find_timeout_s`: until the leader is found, which opens its port when its engine is up;
        `patience_s`: how long it may be silent afterwards, 0 for ever."""
        self._url = leader_url.rstrip("/") + PATH
        self._joining = joining
        self._figures = figures
        self._find_timeout_s = find_timeout_s
        self._patience_s = patience_s
        self.tied = False
        """Whether the leader holds this follower now."""

    async def hold(self) -> bool:
        """Returns when the leader is gone: whether it said that it was told to end.

        Raises UnavailableError when there is none in time, ConfigError when it refuses this follower.
        """
        async with aiohttp.ClientSession() as http:
            socket = await self._find(http)
            self.tied = True
            log.info("leader.tied url=%s", self._url)
            telling = asyncio.create_task(self._tell(socket))
            try:
                async for _ in socket:
                    pass  # it has nothing to say until its end
            finally:
                self.tied = False
                telling.cancel()
                await asyncio.gather(telling, return_exceptions=True)
                await socket.close()
            return socket.close_code == aiohttp.WSCloseCode.GOING_AWAY

    async def _find(self, http: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse:
        try:
            async with asyncio.timeout(self._find_timeout_s):
                while (socket := await self._join(http)) is None:  # noqa: ASYNC110 - another host's port gives no event
                    await asyncio.sleep(_RETRY_S)
        except TimeoutError:
            raise UnavailableError(f"there was no leader at {self._url} within {self._find_timeout_s:g} s: start it, look at --leader-url, "
                                   "and let its admin port be reached (--admin-host)") from None
        return socket

    async def _join(self, http: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse | None:
        """None while nobody answers. Raises ConfigError for a refusal."""
        try:
            closing = aiohttp.ClientWSTimeout(ws_close=_ANSWER_S)
            socket = await http.ws_connect(self._url, heartbeat=beat_s(self._patience_s), timeout=closing)
        except aiohttp.WSServerHandshakeError as exc:
            raise ConfigError(f"{self._url} is no leader of followers (HTTP {exc.status}): give it --data-parallel-size-local, "
                              "below --data-parallel-size") from exc
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None
        await socket.send_str(msgspec.json.encode(self._joining).decode())
        answer = await socket.receive(_ANSWER_S)
        if answer.type is aiohttp.WSMsgType.TEXT:
            msgspec.json.decode(answer.data, type=Welcome)
            return socket
        await socket.close()
        if socket.close_code == aiohttp.WSCloseCode.POLICY_VIOLATION:
            raise ConfigError(f"the leader refuses this follower: {answer.extra or 'it gave no reason'}")
        return None

    async def _tell(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Until cancelled, or until the leader is gone, which `hold` notices."""
        while True:
            figures = await asyncio.to_thread(self._figures)
            try:
                await socket.send_str(msgspec.json.encode(figures).decode())
            except ConnectionError:
                return
            await asyncio.sleep(FIGURES_INTERVAL_S)
