# SPDX-License-Identifier: Apache-2.0
"""A leader and its followers: both ends of the tie over real sockets, without engines."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import aiohttp
import pytest
from aiohttp import web

from tandem_protocol.admin_site import AdminSite
from tandem_protocol.errors import ConfigError, UnavailableError
from tandem_protocol.workers import EventSource
from tandem_worker.followers.leader import Followers
from tandem_worker.followers.leash import Leash
from tandem_worker.followers.terms import PATH, Figures, Joining, ranks_text
from tandem_worker.ranks import LocalRanks

RANKS = LocalRanks(0, 1, 3)
SOON_S = 10.0
PATIENCE_S = 0.3
NO_HURRY_S = 60.0


@dataclass
class Leader:
    """A leader of ranks 1 to 3, and what it was told of their end."""

    followers: Followers
    url: str
    site: AdminSite
    gone: "asyncio.Queue[str]" = field(default_factory=asyncio.Queue)


async def lead(patience_s: float) -> Leader:
    """On a free port."""
    gone: asyncio.Queue[str] = asyncio.Queue()
    followers = Followers(RANKS, patience_s, gone.put)
    app = web.Application()
    app.add_routes(followers.routes())
    site = AdminSite(app)
    port = await site.start("127.0.0.1", 0, "")
    return Leader(followers, f"http://127.0.0.1:{port}", site, gone)


@pytest.fixture
async def leader() -> AsyncIterator[Leader]:
    """Patient enough for a busy machine."""
    started = await lead(NO_HURRY_S)
    yield started
    await started.followers.close()
    await started.site.stop()


def leash(url: str, first: int, count: int, find_timeout_s: float = SOON_S) -> Leash:
    """A follower that has used ten seconds for each rank's number."""
    figures = Figures(tuple(10.0 * (first + i) for i in range(count)))
    return Leash(url, Joining(first, count, 20080, 21080), lambda: figures, find_timeout_s, NO_HURRY_S)


async def until_told(leader: Leader, rank: int) -> float:
    """The processor time of a rank, once it was told."""
    cpu_s = leader.followers.beside(lambda _: -1.0)
    async with asyncio.timeout(SOON_S):
        while not cpu_s(rank):  # noqa: ASYNC110 - set by the other end
            await asyncio.sleep(0)
    return cpu_s(rank)


async def test_followers_complete_a_leader(leader: Leader) -> None:
    """Their events are at the address they came from, and their figures beside its own."""
    holds = [asyncio.create_task(leash(leader.url, 1, 2).hold()), asyncio.create_task(leash(leader.url, 3, 1).hold())]
    await leader.followers.complete(SOON_S)
    sources = leader.followers.event_sources()
    assert sorted(sources) == [1, 2, 3]
    assert sources[2] == EventSource(dp_rank=2, endpoint="tcp://127.0.0.1:20081", replay_endpoint="tcp://127.0.0.1:21081")
    assert [await until_told(leader, rank) for rank in (1, 2, 3)] == [10.0, 20.0, 30.0]
    assert leader.followers.beside(lambda _: 5.0)(0) == 5.0
    assert leader.followers.beside(lambda _: 6.0)(None) == 6.0
    await leader.followers.close()
    assert await asyncio.wait_for(asyncio.gather(*holds), SOON_S) == [True, True], "they were told that it ends"
    assert leader.gone.empty(), "what it ended itself is no news"


async def test_a_leader_that_failed_says_so(leader: Leader) -> None:
    """Then its followers haven't ended well, either."""
    hold = asyncio.create_task(leash(leader.url, 1, 3).hold())
    await until_told(leader, 3)
    await leader.followers.close(failed=True)
    assert await asyncio.wait_for(hold, SOON_S) is False


async def test_a_leader_names_the_ranks_that_nobody_came_for(leader: Leader) -> None:
    """With what to set on both sides."""
    hold = asyncio.create_task(leash(leader.url, 1, 2).hold())
    await until_told(leader, 1)
    with pytest.raises(UnavailableError, match=r"ranks 3 run, but no follower .* within 0.1 s.*--leader-url"):
        await leader.followers.complete(0.1)
    hold.cancel()
    assert await asyncio.wait_for(leader.gone.get(), SOON_S) == "the follower with ranks 1 to 2 at 127.0.0.1 is gone: its engines are lost"
    assert leader.followers.event_sources() == {}


@pytest.mark.parametrize(("first", "count", "reason"), [(0, 1, "it has rank 0, and ranks 1 to 3 are on other hosts"),
                                                        (3, 2, "it has ranks 3 to 4, and ranks 1 to 3"), (1, 0, "ranks 1 to 3")])
async def test_ranks_that_are_not_awaited_are_refused(leader: Leader, first: int, count: int, reason: str) -> None:
    """With the reason, at once; the leader goes on."""
    with pytest.raises(ConfigError, match=f"refuses this follower: .*{reason}"):
        await leash(leader.url, first, count).hold()
    assert leader.gone.empty()


async def test_a_rank_has_one_follower(leader: Leader) -> None:
    """The first."""
    hold = asyncio.create_task(leash(leader.url, 2, 2).hold())
    await until_told(leader, 2)
    with pytest.raises(ConfigError, match="ranks 1 to 2 have another follower"):
        await leash(leader.url, 1, 2).hold()
    assert not hold.done()
    hold.cancel()
    await leader.gone.get()


async def test_what_is_no_follower_is_refused(leader: Leader) -> None:
    """It is told what was expected."""
    async with aiohttp.ClientSession() as http, http.ws_connect(leader.url + PATH) as socket:
        await socket.send_str("hello")
        answer = await socket.receive(SOON_S)
        assert (answer.type, answer.extra) == (aiohttp.WSMsgType.CLOSE, "say first which ranks you have")
    assert leader.gone.empty()


async def test_a_leader_that_is_killed_is_gone_without_a_word(leader: Leader) -> None:
    """Its end of the connection closes, which isn't the same as being told to end."""
    tie = leash(leader.url, 1, 3)
    hold = asyncio.create_task(tie.hold())
    await until_told(leader, 3)
    assert tie.tied
    await leader.site.stop()
    assert await asyncio.wait_for(hold, SOON_S) is False
    assert not tie.tied


async def test_a_follower_that_stands_still_is_gone() -> None:
    """It answers no pings, for longer than the leader is patient."""
    leader = await lead(PATIENCE_S)
    try:
        async with aiohttp.ClientSession() as http, http.ws_connect(leader.url + PATH, autoping=False) as socket:
            await socket.send_str('{"type": "Joining", "first": 1, "count": 3, "event_port": 0, "replay_port": 0}')
            assert "ranks 1 to 3" in await asyncio.wait_for(leader.gone.get(), SOON_S)
            assert leader.followers.event_sources() == {}
    finally:
        await leader.followers.close()
        await leader.site.stop()


async def test_there_may_be_no_leader() -> None:
    """Until its time is over; a server that leads nobody is told apart."""
    with pytest.raises(UnavailableError, match=r"no leader at http://127.0.0.1:9/followers within 0.1 s: start it"):
        await leash("http://127.0.0.1:9", 1, 1, find_timeout_s=0.1).hold()
    site = AdminSite(web.Application())
    port = await site.start("127.0.0.1", 0, "")
    try:
        with pytest.raises(ConfigError, match=r"is no leader of followers \(HTTP 404\)"):
            await leash(f"http://127.0.0.1:{port}", 1, 1).hold()
    finally:
        await site.stop()


async def test_a_worker_without_followers_waits_for_none() -> None:
    """It has no route for them, either."""
    alone = Followers(LocalRanks(0, 2), NO_HURRY_S, asyncio.Queue[str]().put)
    await alone.complete(0.0)
    assert (alone.routes(), alone.event_sources(), alone.beside(lambda rank: float(rank or 0))(1)) == ((), {}, 1.0)


def test_ranks_for_people() -> None:
    """One is no range."""
    assert (ranks_text(3, 1), ranks_text(2, 2)) == ("rank 3", "ranks 2 to 3")
