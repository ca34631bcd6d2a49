# SPDX-License-Identifier: Apache-2.0
"""Sleep and wake of a worker over a stand-in engine that keeps vLLM's own account of what sleeps."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import ClientSession

from fakes import WAIT_S, FakeHost
from sleepers import PATIENCE, StubEngine, StubHost
from tandem_protocol.errors import EngineError, RequestError, UnavailableError
from tandem_worker.admin import AdminServer
from tandem_worker.sleep import SleepCycle
from tandem_worker.sleep_admin import SleepRoutes
from tandem_worker.sleep_terms import Abilities, Patience, UnsupportedError, WrongStateError
from tandem_worker.status import WorkerState


@pytest.fixture
def engine() -> StubEngine:
    """An engine that works."""
    return StubEngine()


@pytest.fixture
def host() -> StubHost:
    """A ready worker."""
    return StubHost()


@pytest.fixture
def cycle(engine: StubEngine, host: StubHost) -> SleepCycle:
    """Of an engine with sleep mode."""
    return SleepCycle(host, engine, engine.verify, Abilities(), "w")


@pytest.mark.parametrize(("level", "asleep", "woken"), [
    (0, ["pause"], ["resume", "verify"]),
    (1, ["pause", "sleep1"], ["wake ['weights']", "wake ['kv_cache']", "resume", "verify"]),
    (2, ["pause", "sleep2"], ["wake ['weights']", "reload_weights", "wake ['kv_cache']", "resume", "verify"]),
])
async def test_each_level_there_and_back(cycle: SleepCycle, engine: StubEngine, host: StubHost, level: int, asleep: list[str],
                                         woken: list[str]) -> None:
    """Placement is left first and entered last; level 2 reads the weights again before the cache takes its memory."""
    assert await cycle.sleep(level, PATIENCE) == f"asleep at level {level}"
    assert (engine.calls, host.told, cycle.level) == (asleep, ["retired", "drained", "asleep"], level)
    assert cycle.away == (("kv_cache", "weights") if level else ("scheduling",))
    engine.calls.clear()
    assert await cycle.wake_up(None) == "awake"
    assert (engine.calls, host.told[3:], cycle.level, cycle.away) == (woken, ["ready"], None, ())


async def test_both_are_idempotent(cycle: SleepCycle, engine: StubEngine) -> None:
    """The second time nothing happens; another level is another wish."""
    assert await cycle.wake_up(None) == "already awake"
    assert await cycle.sleep(1, PATIENCE) == "asleep at level 1"
    done = list(engine.calls)
    assert await cycle.sleep(1, PATIENCE) == "already asleep at level 1"
    with pytest.raises(WrongStateError, match="wake it first"):
        await cycle.sleep(2, PATIENCE)
    assert engine.calls == done


async def test_woken_piece_by_piece(cycle: SleepCycle, engine: StubEngine, host: StubHost) -> None:
    """It serves when all is there; what is awake already is not woken twice."""
    await cycle.sleep(2, PATIENCE)
    assert await cycle.wake_up(["weights"]) == "awake but for kv_cache: it takes requests when everything is"
    assert (host.state, engine.weights) == (WorkerState.ASLEEP, "loaded")
    assert await cycle.wake_up(["scheduling"]) == "awake but for kv_cache: it takes requests when everything is"
    assert await cycle.wake_up(["weights", "kv_cache"]) == "awake"
    assert engine.calls.count("reload_weights") == engine.calls.count("wake ['weights']") == 1
    assert host.state is WorkerState.READY


@pytest.mark.parametrize(("level", "restored"), [
    (1, ["wake_up", "wake None", "resume", "verify"]), (2, ["wake_up", "reload_weights", "wake None", "resume", "verify"]),
])
async def test_a_sleep_that_fails_is_rolled_back(cycle: SleepCycle, engine: StubEngine, host: StubHost, level: int,
                                                 restored: list[str]) -> None:
    """Half of the memory may be gone: it is brought back past vLLM's account, proven by a token, and the worker announced again."""
    engine.broken = {f"sleep{level}"}
    with pytest.raises(EngineError, match=rf"did not fall asleep: vLLM's sleep failed: sleep{level} broke; it serves again"):
        await cycle.sleep(level, PATIENCE)
    assert engine.calls == ["pause", f"sleep{level}", *restored]
    assert (host.told, cycle.level) == (["retired", "drained", "ready"], None)
    engine.broken.clear()
    assert await cycle.sleep(level, PATIENCE) == f"asleep at level {level}"


async def test_blocks_that_others_pull_are_waited_for_within_a_bound(cycle: SleepCycle, engine: StubEngine, host: StubHost) -> None:
    """Then the pause is taken back; nothing was put to sleep. Once they are pulled it works."""
    engine.held.clear()
    with pytest.raises(UnavailableError, match=r"still held blocks or requests after 0\.01 s.*; it serves again"):
        await cycle.sleep(1, Patience(PATIENCE.drain_s, 0.01))
    assert engine.calls == ["resume", "verify"]  # "pause" never came to its end
    assert (host.state, cycle.level) == (WorkerState.READY, None)
    engine.held.set()
    assert await cycle.sleep(1, PATIENCE) == "asleep at level 1"


async def test_a_roll_back_that_fails_can_be_tried_again(cycle: SleepCycle, engine: StubEngine, host: StubHost) -> None:
    """An engine of which nobody knows what is there must not be placed on."""
    engine.broken = {"sleep1", "wake_up"}
    with pytest.raises(EngineError, match=r"sleep1 broke; nor could it be brought back \(vLLM's wake-up failed: wake_up broke\)"):
        await cycle.sleep(1, PATIENCE)
    assert (host.state, cycle.level) == (WorkerState.ASLEEP, 1)
    with pytest.raises(EngineError, match="wake_up broke; it sleeps on"):
        await cycle.wake_up(None)
    engine.broken.clear()
    assert await cycle.wake_up(None) == "awake"
    assert host.state is WorkerState.READY


@pytest.mark.parametrize("broken", ["wake ['weights']", "reload_weights", "wake ['kv_cache']", "resume", "verify"])
async def test_a_wake_that_fails_can_be_tried_again(cycle: SleepCycle, engine: StubEngine, host: StubHost, broken: str) -> None:
    """It goes on where it failed, and serves only after a token."""
    await cycle.sleep(2, PATIENCE)
    engine.broken = {broken}
    with pytest.raises(EngineError, match="did not wake up"):
        await cycle.wake_up(None)
    assert (host.state, cycle.level) == (WorkerState.ASLEEP, 2)
    engine.broken.clear()
    assert await cycle.wake_up(None) == "awake"
    assert (host.state, engine.weights, engine.away) == (WorkerState.READY, "loaded", set())


async def test_transitions_wait_for_one_another(cycle: SleepCycle, engine: StubEngine, host: StubHost) -> None:
    """A wake that comes while the worker still falls asleep wakes it afterwards; who asked may go away."""
    engine.held.clear()
    sleeping = asyncio.create_task(cycle.sleep(1, PATIENCE))
    await asyncio.wait_for(engine.pausing.wait(), WAIT_S)
    waking = asyncio.create_task(cycle.wake_up(None))
    sleeping.cancel()
    engine.held.set()
    assert await waking == "awake"
    assert host.told == ["retired", "drained", "asleep", "ready"]


@pytest.mark.parametrize("state", [WorkerState.STARTING, WorkerState.DRAINING, WorkerState.DEAD, WorkerState.HUNG, WorkerState.STOPPED])
async def test_only_a_worker_that_serves_is_put_to_sleep(cycle: SleepCycle, engine: StubEngine, host: StubHost, state: WorkerState) -> None:
    """Neither is another one woken or cleared; nothing is done."""
    host.state = state
    with pytest.raises(WrongStateError, match=str(state)):
        await cycle.sleep(1, PATIENCE)
    with pytest.raises(WrongStateError, match=str(state)):
        await cycle.wake_up(None)
    with pytest.raises(UnavailableError, match=str(state)):
        await cycle.clear(force=False)
    assert (engine.calls, host.told) == ([], [])


async def test_an_engine_that_dies_asleep_is_not_announced(cycle: SleepCycle, engine: StubEngine, host: StubHost) -> None:
    """The host knows better."""
    await cycle.sleep(1, PATIENCE)
    host.lost = True
    with pytest.raises(UnavailableError, match="did not wake up"):
        await cycle.wake_up(None)
    assert "ready" not in host.told


async def test_what_an_engine_can_not_do(engine: StubEngine, host: StubHost) -> None:
    """Without sleep mode only the pause; with adapters not level 2; and no level but vLLM's."""
    plain = SleepCycle(host, engine, engine.verify, Abilities(refusal="no sleep mode here"), "w")
    with pytest.raises(UnsupportedError, match="no sleep mode here"):
        await plain.sleep(1, PATIENCE)
    assert host.state is WorkerState.READY
    assert await plain.sleep(0, PATIENCE) == "asleep at level 0"
    adapted = SleepCycle(StubHost(), engine, engine.verify, Abilities(discardable=False), "w")
    with pytest.raises(UnsupportedError, match="LoRA"):
        await adapted.sleep(2, PATIENCE)
    with pytest.raises(RequestError, match="one of 0, 1, 2"):
        await adapted.sleep(3, PATIENCE)
    with pytest.raises(RequestError, match="unknown tag 'wieghts'"):
        await adapted.wake_up(["wieghts"])


async def test_aborted_requests_are_told(cycle: SleepCycle, host: StubHost) -> None:
    """Who put it to sleep should know what that cost."""
    host.in_flight = 2
    assert await cycle.sleep(1, PATIENCE) == "asleep at level 1; 2 requests were aborted after 1 s"


async def test_clearing_blocks_ends_with_a_step(cycle: SleepCycle, engine: StubEngine) -> None:
    """Or no router would hear of it; blocks in use are refused unless they are forced."""
    assert await cycle.clear(force=False) == "KV cache cleared"
    assert engine.calls == ["reset False", "verify"]
    engine.clearable = False
    with pytest.raises(UnavailableError, match="blocks are in use"):
        await cycle.clear(force=False)
    assert await cycle.clear(force=True) == "KV cache cleared"


@pytest.fixture
async def client(cycle: SleepCycle) -> AsyncIterator[ClientSession]:
    """Of an admin server with the routes of `cycle`."""
    server = AdminServer(FakeHost(), "vllm", 1.0, routes=SleepRoutes(cycle, 2, PATIENCE.drain_s).routes())
    port = await server.start("127.0.0.1", 0)
    async with ClientSession(f"http://127.0.0.1:{port}") as session:
        yield session
    await server.stop()


async def post(client: ClientSession, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    """Code and body."""
    async with client.post(path, json=body) as answer:
        return answer.status, await answer.json()


async def test_the_routes_answer_as_dynamos(client: ClientSession, engine: StubEngine) -> None:
    """`ok` and a message, `success` for cleared blocks; no body means the default level and everything."""
    assert await post(client, "/clear_kv_blocks") == (200, {"status": "success", "message": "KV cache cleared"})
    assert await post(client, "/engine/sleep") == (200, {"status": "ok", "message": "asleep at level 2"})
    async with client.get("/engine/is_sleeping") as answer:
        assert await answer.json() == {"is_sleeping": True, "level": 2, "tags": ["kv_cache", "weights"]}
    assert (await post(client, "/clear_kv_blocks"))[0] == 503
    assert await post(client, "/engine/wake_up", {"tags": ["weights", "kv_cache"]}) == (200, {"status": "ok", "message": "awake"})
    assert await post(client, "/engine/is_sleeping") == (200, {"is_sleeping": False, "level": None, "tags": []})


@pytest.mark.parametrize(("path", "body", "code", "message"), [
    ("/engine/sleep", {"level": 3}, 400, "one of 0, 1, 2"), ("/engine/sleep", {"level": True}, 400, "one of 0, 1, 2"),
    ("/engine/sleep", {"level": 1, "drain_timeout_s": -1}, 400, "drain_timeout_s"),
    ("/engine/sleep", {"level": 1, "blocks_timeout_s": "x"}, 400, "blocks_timeout_s"),
    ("/engine/wake_up", {"tags": []}, 400, "weights, kv_cache, scheduling"), ("/engine/wake_up", {"tags": "weights"}, 400, "tags"),
    ("/engine/wake_up", {"tags": [["weights"]]}, 400, "tags"), ("/clear_kv_blocks", {"force": 1}, 400, "force"),
])
async def test_bad_bodies_are_refused(client: ClientSession, engine: StubEngine, path: str, body: dict[str, Any], code: int,
                                      message: str) -> None:
    """With the fix; nothing is done."""
    status, answer = await post(client, path, body)
    assert (status, engine.calls) == (code, [])
    assert message in answer["error"]


async def test_failures_have_their_codes(client: ClientSession, cycle: SleepCycle, engine: StubEngine, host: StubHost) -> None:
    """501 for what can't be, 409 for not now in this state, 503 and 500 for what failed and was rolled back."""
    engine.broken = {"sleep1"}
    assert await post(client, "/engine/sleep", {"level": 1}) == (
        500, {"status": "error", "message": "the worker did not fall asleep: vLLM's sleep failed: sleep1 broke; it serves again"})
    engine.held.clear()
    assert (await post(client, "/engine/sleep", {"level": 1, "blocks_timeout_s": 0.01}))[0] == 503
    host.state = WorkerState.DRAINING
    assert (await post(client, "/engine/sleep", {"level": 1}))[0] == 409
    cycle.abilities = Abilities(refusal="none here")
    assert await post(client, "/engine/sleep", {"level": 1}) == (501, {"status": "error", "message": "none here"})
