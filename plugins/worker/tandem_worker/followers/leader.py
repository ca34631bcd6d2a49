# SPDX-License-Identifier: Apache-2.0
"""The leader's side: which followers are tied to it, what they tell of their ranks, and what to do when one goes.

Everything runs on the worker's event loop, except `beside`'s function, which is called in a thread and reads one attribute.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import msgspec
from aiohttp import WSCloseCode, web

from tandem_protocol.errors import UnavailableError
from tandem_protocol.workers import EventSource
from tandem_worker.followers.terms import PATH, Figures, Joining, Welcome, beat_s, ranks_text
from tandem_worker.ranks import LocalRanks

log = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 2.0
_LONGEST_MESSAGE = 64 * 1024
_LONGEST_REASON = 120
"""Of the 123 bytes that a close may carry."""


@dataclass
class _Follower:
    joining: Joining
    host: str
    socket: web.WebSocketResponse
    cpu_s: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"the follower with {ranks_text(self.joining.first, self.joining.count)} at {self.host}"


class Followers:
    """Those of one leader; of a worker whose ranks are all here there are none, and everything is an answer at once."""

    def __init__(self, ranks: LocalRanks, patience_s: float, on_gone: Callable[[str], Awaitable[None]]) -> None:
        """`patience_s`: how long one may be silent; 0 for ever. `on_gone` gets why the engine is of no more use."""
        self.awaited = range(ranks.count, ranks.count + ranks.remote)
        """The ranks that others run."""
        self._patience_s = patience_s
        self._on_gone = on_gone
        self._tied: dict[int, _Follower] = {}
        self._changed = asyncio.Condition()
        self._closing = False

    def routes(self) -> tuple[web.RouteDef, ...]:
        """For the admin server."""
        return (web.get(PATH, self._tie),) if self.awaited else ()

    async def complete(self, timeout_s: float) -> None:
        """Waits until every rank has its follower. Raises UnavailableError when that takes longer."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: not self._missing())
        except TimeoutError:
            missing = ", ".join(map(str, self._missing()))
            raise UnavailableError(f"the engines of ranks {missing} run, but no follower of theirs came to this worker's admin port within "
                                   f"{timeout_s:g} s: let it listen for them (--admin-host) and name it to them (--leader-url)") from None

    def beside(self, local: Callable[[int | None], float]) -> Callable[[int | None], float]:
        """Processor time of any rank's engine: `local` knows this host's, followers told of the others."""
        return lambda rank: local(rank) if rank is None or rank not in self.awaited else self._cpu_s(rank)

    def event_sources(self) -> dict[int, EventSource]:
        """Where the KV events of other hosts' ranks are, by rank."""
        sources = (source for follower in self._tied.values() for source in _sources(follower))
        return {source.dp_rank: source for source in sources}

    async def close(self, *, failed: bool = False) -> None:
        """Lets all followers end, as told to unless the leader `failed`; from now on that is no news."""
        self._closing = True
        code = WSCloseCode.INTERNAL_ERROR if failed else WSCloseCode.GOING_AWAY
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                for follower in tuple(self._tied.values()):
                    await follower.socket.close(code=code, message=b"the leader ends")

    def _missing(self) -> list[int]:
        held = {rank for one in self._tied.values() for rank in range(one.joining.first, one.joining.first + one.joining.count)}
        return [rank for rank in self.awaited if rank not in held]

    def _cpu_s(self, rank: int) -> float:
        for one in tuple(self._tied.values()):
            place = rank - one.joining.first
            if 0 <= place < len(one.cpu_s):
                return one.cpu_s[place]
        return 0.0

    async def _tie(self, request: web.Request) -> web.WebSocketResponse:
        """Holds one follower until either side ends."""
        socket = web.WebSocketResponse(heartbeat=beat_s(self._patience_s), max_msg_size=_LONGEST_MESSAGE)
        await socket.prepare(request)
        try:
            async with asyncio.timeout(_JOIN_TIMEOUT_S):
                joining = msgspec.json.decode(await socket.receive_str(), type=Joining)
        except (TimeoutError, TypeError, msgspec.DecodeError):
            await socket.close(code=WSCloseCode.POLICY_VIOLATION, message=b"say first which ranks you have")
            return socket
        refusal = self._refusal(joining)
        if refusal:
            log.warning("follower.refused host=%s: %s", request.remote, refusal)
            await socket.close(code=WSCloseCode.POLICY_VIOLATION, message=refusal.encode()[:_LONGEST_REASON])
            return socket
        await self._hold(_Follower(joining, request.remote or "", socket, ()))
        return socket

    def _refusal(self, joining: Joining) -> str:
        wanted = range(joining.first, joining.first + joining.count)
        if self._closing:
            return "the leader ends"
        if not wanted or any(rank not in self.awaited for rank in wanted):
            here, awaited = ranks_text(joining.first, joining.count), ranks_text(self.awaited[0], len(self.awaited))
            return f"it has {here}, and {awaited} are on other hosts: look at both sides' --data-parallel-*"
        if any(rank not in self._missing() for rank in wanted):
            return f"{ranks_text(joining.first, joining.count)} have another follower"
        return ""

    async def _hold(self, follower: _Follower) -> None:
        self._tied[follower.joining.first] = follower
        log.info("follower.tied host=%s ranks=%s", follower.host, ranks_text(follower.joining.first, follower.joining.count))
        async with self._changed:
            self._changed.notify_all()
        try:
            await follower.socket.send_str(msgspec.json.encode(Welcome()).decode())
            async for message in follower.socket:
                follower.cpu_s = msgspec.json.decode(message.data, type=Figures).cpu_s
        except (ConnectionError, TypeError, msgspec.DecodeError) as exc:
            log.warning("follower.failed host=%s: %r", follower.host, exc)
        finally:
            del self._tied[follower.joining.first]
            await follower.socket.close()
        if not self._closing:
            await self._on_gone(f"{follower.name} is gone: its engines are lost")


def _sources(follower: _Follower) -> list[EventSource]:
    joining, host = follower.joining, f"[{follower.host}]" if ":" in follower.host else follower.host
    if not joining.event_port:
        return []
    return [EventSource(dp_rank=joining.first + i, endpoint=f"tcp://{host}:{joining.event_port + i}",
                        replay_endpoint=f"tcp://{host}:{joining.replay_port + i}") for i in range(joining.count)]  # fmt: skip
