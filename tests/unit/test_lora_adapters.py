# SPDX-License-Identifier: Apache-2.0
"""A worker's adapters over a fake engine, and the routes over them."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import ClientSession, web

from fakes import WAIT_S
from tandem_protocol.admin_site import AdminSite
from tandem_protocol.errors import RequestError, UnavailableError
from tandem_worker.lora.adapter import Adapter, AdapterConflictError, UnknownAdapterError, lora_id
from tandem_worker.lora.adapters import LOADS, Adapters
from tandem_worker.lora.deadline import Deadline
from tandem_worker.lora.routes import lora_routes
from tandem_worker.lora.source import Source
from tandem_worker.lora.store import Copy
from tandem_worker.lora.terms import Limits

LIMITS = Limits(enabled=True, load_timeout_s=WAIT_S, unload_timeout_s=WAIT_S, most=3)
FRENCH = {"lora_name": "fr", "source": {"uri": "file:///fr"}}


class FakeEngine:
    """Remembers what it holds; fails on demand."""

    def __init__(self) -> None:
        self.takes_loras = True
        self.held: dict[int, str] = {}
        self.refuses: Exception | None = None
        self.keeps: Exception | None = None
        self.adds = 0

    async def add(self, adapter: Adapter) -> None:
        """Leaves something behind when it refuses, as vLLM may."""
        self.adds += 1
        self.held[adapter.id] = adapter.path
        await asyncio.sleep(0)
        if self.refuses is not None:
            raise self.refuses

    async def remove(self, adapter: Adapter) -> None:
        """Forgets it."""
        if self.keeps is not None:
            raise self.keeps
        self.held.pop(adapter.id, None)


class FakeSource:
    """Copies that are only counted; `gate` holds them back, `error` is raised."""

    def __init__(self) -> None:
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.gate.set()
        self.error: Exception | None = None
        self.fetched: list[str] = []
        self.copies: set[str] = set()

    def fetch(self, source: Source, deadline: Deadline) -> Copy:
        """On a thread of the adapters'."""
        self.fetched.append(source.uri)
        self.entered.release()
        while not self.gate.wait(0.01):
            deadline.check()
        if self.error is not None:
            raise self.error
        self.copies.add(source.path)
        return Copy(Path(source.path), 0)

    def release(self, copy: Copy) -> None:
        """Once for each."""
        self.copies.remove(str(copy.path))


@pytest.fixture
def engine() -> FakeEngine:
    """One that takes everything."""
    return FakeEngine()


@pytest.fixture
def source() -> FakeSource:
    """One that has everything."""
    return FakeSource()


@pytest.fixture
async def adapters(engine: FakeEngine, source: FakeSource) -> AsyncIterator[Adapters]:
    """With `doll` in multi_lora.json."""
    made = Adapters(engine, source, LIMITS, (Adapter("doll", lora_id("doll"), "/doll", "/doll"),))
    yield made
    await made.close()
    made.release()
    assert source.copies == set()


async def test_a_load_and_its_end(adapters: Adapters, engine: FakeEngine, source: FakeSource) -> None:
    """In the engine, in the list and told; and then in none of them."""
    told: list[tuple[str, ...]] = []
    adapters.follow(told.append)
    loaded = await adapters.load("fr", "file:///fr")
    assert (loaded.fresh, loaded.adapter) == (True, Adapter("fr", lora_id("fr"), "/fr", "file:///fr"))
    assert (engine.held, adapters.names) == ({lora_id("fr"): "/fr"}, ("doll", "fr"))
    await adapters.unload("fr")
    assert (engine.held, source.copies, adapters.names) == ({}, set(), ("doll",))
    assert told == [("doll",), ("doll", "fr"), ("doll",)]


async def test_concurrent_loads_of_one_name_load_once(adapters: Adapters, engine: FakeEngine, source: FakeSource) -> None:
    """All but one find it there."""
    before = {outcome: LOADS.labels(outcome)._value.get() for outcome in ("loaded", "present")}
    loads = await asyncio.gather(*(adapters.load("fr", "file:///fr") for _ in range(20)))
    assert sorted(load.fresh for load in loads) == [False] * 19 + [True]
    assert (source.fetched, engine.adds) == (["file:///fr"], 1)
    after = {outcome: LOADS.labels(outcome)._value.get() for outcome in ("loaded", "present")}
    assert (after["loaded"] - before["loaded"], after["present"] - before["present"]) == (1, 19)
    assert len(adapters._turns) == 0


async def test_other_names_do_not_wait(adapters: Adapters, source: FakeSource) -> None:
    """A slow source of one adapter holds up none of another."""
    source.gate.clear()
    slow = asyncio.create_task(adapters.load("slow", "file:///slow"))
    await asyncio.to_thread(source.entered.acquire, timeout=WAIT_S)
    async with adapters.using("doll") as adapter:
        assert adapter is not None
    await adapters.unload("doll")
    source.gate.set()
    assert (await slow).fresh


@pytest.mark.parametrize("error", [RequestError("bad"), UnavailableError("later"), RuntimeError("bug")])
async def test_a_refusal_leaves_nothing(adapters: Adapters, engine: FakeEngine, source: FakeSource, error: Exception) -> None:
    """Neither in the engine, which may have half of it, nor on disk; and the next attempt works."""
    engine.refuses = error
    with pytest.raises(type(error), match=str(error)):
        await adapters.load("fr", "file:///fr")
    assert (engine.held, source.copies, adapters.names) == ({}, set(), ("doll",))
    engine.refuses = None
    assert (await adapters.load("fr", "file:///fr")).fresh


async def test_a_source_that_fails(adapters: Adapters, engine: FakeEngine, source: FakeSource) -> None:
    """The engine isn't asked."""
    source.error = UnavailableError("no hub")
    with pytest.raises(UnavailableError, match="no hub"):
        await adapters.load("fr", "file:///fr")
    assert (engine.adds, adapters.names) == (0, ("doll",))


async def test_a_caller_that_goes_away_ends_nothing(adapters: Adapters, source: FakeSource) -> None:
    """The load goes on, and who asks again finds it."""
    source.gate.clear()
    caller = asyncio.create_task(adapters.load("fr", "file:///fr"))
    await asyncio.to_thread(source.entered.acquire, timeout=WAIT_S)
    caller.cancel()
    await asyncio.wait([caller])
    source.gate.set()
    assert not (await adapters.load("fr", "file:///fr")).fresh


async def test_closing_ends_loads(adapters: Adapters, source: FakeSource) -> None:
    """By the deadline's stop; later ones are refused."""
    source.gate.clear()
    caller = asyncio.create_task(adapters.load("fr", "file:///fr"))
    await asyncio.to_thread(source.entered.acquire, timeout=WAIT_S)
    await adapters.close()
    with pytest.raises(UnavailableError, match="shutting down"):
        await caller
    with pytest.raises(UnavailableError, match="shutting down"):
        await adapters.load("fr", "file:///fr")


async def test_an_unload_waits_for_those_who_use_it(adapters: Adapters, engine: FakeEngine) -> None:
    """New requests are refused meanwhile, in vllm_backend's words."""
    await adapters.load("fr", "file:///fr")
    gone = asyncio.Event()
    adapters.follow(lambda names: None if "fr" in names else gone.set())
    async with adapters.using("fr") as adapter:
        assert adapter is not None
        unload = asyncio.create_task(adapters.unload("fr"))
        await asyncio.wait_for(gone.wait(), WAIT_S)
        with pytest.raises(RequestError, match=r"LoRA fr is not supported, we currently support \['doll'\]"):
            async with adapters.using("fr"):
                pass
        assert engine.held
    await unload
    assert not engine.held


async def test_an_unload_gives_up_on_long_requests(engine: FakeEngine, source: FakeSource) -> None:
    """And the adapter is there again."""
    adapters = Adapters(engine, source, Limits(enabled=True, load_timeout_s=WAIT_S, unload_timeout_s=0.01, most=3))
    await adapters.load("fr", "file:///fr")
    async with adapters.using("fr"):
        with pytest.raises(UnavailableError, match="1 requests still use"):
            await adapters.unload("fr")
        assert adapters.names == ("fr",)
    await adapters.unload("fr")


async def test_an_unload_that_the_engine_does_not_do(adapters: Adapters, engine: FakeEngine, source: FakeSource) -> None:
    """Is undone."""
    await adapters.load("fr", "file:///fr")
    engine.keeps = UnavailableError("busy")
    with pytest.raises(UnavailableError, match="busy"):
        await adapters.unload("fr")
    assert (adapters.names, source.copies) == (("doll", "fr"), {"/fr"})


async def test_listed_adapters_are_loaded_at_their_first_use(adapters: Adapters, engine: FakeEngine) -> None:
    """Once; bad files cost the request that named them."""
    engine.refuses = RequestError("bad files")
    with pytest.raises(RequestError, match="bad files"):
        async with adapters.using("doll"):
            pass
    assert engine.held == {}
    engine.refuses = None

    async def use() -> None:
        async with adapters.using("doll") as adapter:
            assert adapter is not None
            assert engine.held == {adapter.id: "/doll"}

    await asyncio.gather(*(use() for _ in range(5)))
    assert engine.adds == 2


async def test_a_sleeping_engine_is_left_alone(adapters: Adapters, engine: FakeEngine) -> None:
    """Neither loads nor unloads; what is loaded stays."""
    state = "asleep"
    await adapters.load("fr", "file:///fr")
    adapters.rest_while(lambda: state)
    for change in (adapters.load("de", "file:///de"), adapters.unload("fr")):
        with pytest.raises(UnavailableError, match="the worker is asleep"):
            await change
    assert adapters.names == ("doll", "fr")
    state = ""
    await adapters.unload("fr")
    assert engine.held == {}


async def test_what_is_taken(adapters: Adapters) -> None:
    """A name with another source, and more than the bound."""
    await adapters.load("fr", "file:///fr")
    with pytest.raises(AdapterConflictError, match="unload it first"):
        await adapters.load("fr", "file:///other")
    with pytest.raises(AdapterConflictError, match="is loaded from /doll"):
        await adapters.load("doll", "file:///doll")
    await adapters.load("de", "file:///de")
    with pytest.raises(UnavailableError, match="TANDEM_LORA_MAX_ADAPTERS"):
        await adapters.load("it", "file:///it")
    with pytest.raises(UnknownAdapterError, match="loaded are doll, fr, de"):
        await adapters.unload("it")


async def test_names_of_one_number(adapters: Adapters, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine could not tell them apart."""
    monkeypatch.setattr("tandem_worker.lora.adapters.lora_id", lambda _: 7)
    with pytest.raises(AdapterConflictError, match="same number as 'doll'"):
        await adapters.load("fr", "file:///fr")


async def test_without_lora(adapters: Adapters, engine: FakeEngine, source: FakeSource) -> None:
    """vllm_backend's words for requests; the fix for those who load."""
    engine.takes_loras = False
    with pytest.raises(RequestError, match=r"^LoRA feature is not enabled\.$"):
        async with adapters.using("doll"):
            pass
    with pytest.raises(RequestError, match="--enable-lora"):
        await adapters.load("fr", "file:///fr")
    fixed = Adapters(engine, source, Limits(enabled=False, load_timeout_s=1, unload_timeout_s=1, most=3))
    with pytest.raises(RequestError, match="DYN_LORA_ENABLED"):
        await fixed.unload("doll")
    async with fixed.using(None) as adapter:
        assert adapter is None


@pytest.fixture
async def client(adapters: Adapters) -> AsyncIterator[ClientSession]:
    """A client of the routes."""
    app = web.Application()
    app.add_routes(lora_routes(adapters))
    site = AdminSite(app)
    port = await site.start("127.0.0.1", 0, "none")
    async with ClientSession(f"http://127.0.0.1:{port}") as session:
        yield session
    await site.stop()


async def test_the_routes_are_dynamos(client: ClientSession) -> None:
    """Bodies and texts."""
    for how in ("loaded successfully", "already loaded"):
        async with client.post("/v1/loras", json=FRENCH) as answer:
            assert (answer.status, await answer.json()) == (200, {
                "status": "success", "message": f"LoRA adapter 'fr' {how}", "lora_name": "fr", "lora_id": lora_id("fr")})
    async with client.get("/v1/loras") as answer:
        assert await answer.json() == {
            "status": "success", "loras": {"doll": lora_id("doll"), "fr": lora_id("fr")}, "count": 2,
            "sources": {"doll": "/doll", "fr": "file:///fr"},
        }
    async with client.delete("/v1/loras/fr") as answer:
        assert (answer.status, (await answer.json())["message"]) == (200, "LoRA adapter 'fr' unloaded successfully")


@pytest.mark.parametrize(
    ("body", "message"),
    [(b"", "not JSON"), (b"[]", "source is missing"), (b"{}", "source is missing"),
     (b'{"lora_name": "fr", "source": "file:///fr"}', "source is"),
     (b'{"source": {"uri": "file:///fr"}}', "lora_name None"), (b'{"lora_name": "fr", "source": {}}', "source.uri must be")],
)
async def test_bad_bodies(client: ClientSession, body: bytes, message: str) -> None:
    """400, with the form that is expected."""
    async with client.post("/v1/loras", data=body) as answer:
        assert answer.status == 400
        told = await answer.json()
    assert told["status"] == "error"
    assert message in told["message"]


async def test_statuses(client: ClientSession, source: FakeSource) -> None:
    """Unknown 404, taken 409, later 503; names with a slash can be unloaded."""
    async with client.delete("/v1/loras/fr") as answer:
        assert answer.status == 404
    async with client.post("/v1/loras", json={"lora_name": "doll", "source": {"uri": "file:///x"}}) as answer:
        assert answer.status == 409
    async with client.post("/v1/loras", json={**FRENCH, "lora_name": "org/fr"}) as answer:
        assert answer.status == 200
    async with client.delete("/v1/loras/org/fr") as answer:
        assert answer.status == 200
    source.error = UnavailableError("later")
    async with client.post("/v1/loras", json=FRENCH) as answer:
        assert answer.status == 503
