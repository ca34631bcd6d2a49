# SPDX-License-Identifier: Apache-2.0
"""The contract of `tandem_protocol.discovery`, as a suite that every store's tests inherit; they give the fixture `url`."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing

import msgspec
import pytest

from tandem_protocol.discovery import Discovery, Snapshot, open_collection, open_discovery
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role
from tandem_protocol.routers import RouterRecord
from tandem_protocol.workers import EventSource, WorkerRecord, WorkerState

WAIT_S = 30.0
"""Bound of every wait; only a failing test reaches it."""


def worker(name: str = "vllm-1", **changes: object) -> WorkerRecord:
    """A ready worker with every field set."""
    record = WorkerRecord(
        id=name, role=Role.AGGREGATED, state=WorkerState.READY, model="org/name", grpc_url="127.0.0.1:8001", triton_model="vllm",
        admin_url="http://127.0.0.1:8081", event_sources=(EventSource(dp_rank=0, endpoint="tcp://127.0.0.1:20080"),), block_size=32,
        total_blocks=100, max_num_seqs=16, max_num_batched_tokens=2048, loras=("a",),
    )
    return msgspec.structs.replace(record, **changes)


async def until(watch: AsyncIterator[Snapshot], wanted: Callable[[Snapshot], bool], within_s: float = WAIT_S) -> Snapshot:
    """The first snapshot for which `wanted` holds."""
    async with asyncio.timeout(within_s):
        async for snapshot in watch:
            if wanted(snapshot):
                return snapshot
    raise AssertionError("the watch ended")


def ids(snapshot: Snapshot) -> list[str]:
    """Its workers."""
    return [record.id for record in snapshot.records]


class DiscoveryContract:
    """What holds for every store. `here` and `there` are two users of one store, as a worker and a router are."""

    @pytest.fixture
    async def opened(self, url: str) -> AsyncIterator[Callable[[], Discovery]]:
        """Opens users of the store; closed at the end."""
        async with AsyncExitStack() as stack:

            def open_one() -> Discovery:
                discovery = open_discovery(url)
                stack.push_async_callback(discovery.close)
                return discovery

            yield open_one

    @pytest.fixture
    def here(self, opened: Callable[[], Discovery]) -> Discovery:
        """A worker's."""
        return opened()

    @pytest.fixture
    def there(self, opened: Callable[[], Discovery]) -> Discovery:
        """A router's."""
        return opened()

    async def test_an_empty_store_is_a_view_too(self, there: Discovery) -> None:
        """A watcher that starts first need not wait for a worker."""
        assert await there.list() == ()
        assert await until(there.watch(), lambda _: True) == Snapshot(records=())

    async def test_a_record_comes_back_whole(self, here: Discovery, there: Discovery) -> None:
        """Every field, by list and by watch; names with slashes as well."""
        record = worker("org/name 1%")
        registration = await here.register(record)
        assert (registration.record, registration.held) == (record, True)
        assert await there.list() == (record,)
        assert (await until(there.watch(), lambda _: True)).records == (record,)

    async def test_records_are_ordered_by_id(self, here: Discovery, there: Discovery) -> None:
        """So that equal fleets are equal snapshots."""
        for name in ("b", "c", "a"):
            await here.register(worker(name))
        assert [record.id for record in await there.list()] == ["a", "b", "c"]
        assert ids(await until(there.watch(), lambda _: True)) == ["a", "b", "c"]

    async def test_a_watch_sees_join_change_and_leave(self, here: Discovery, there: Discovery) -> None:
        """Each as a whole view."""
        async with aclosing(there.watch()) as watch:
            assert ids(await until(watch, lambda _: True)) == []
            registration = await here.register(worker())
            await until(watch, lambda snapshot: ids(snapshot) == ["vllm-1"])
            await registration.set_state(WorkerState.DRAINING)
            drained = await until(watch, lambda snapshot: snapshot.records[0].state is WorkerState.DRAINING)
            assert drained.records == (worker(state=WorkerState.DRAINING),)
            await registration.update(worker(loras=("a", "b")))
            await until(watch, lambda snapshot: snapshot.records == (worker(loras=("a", "b")),))
            await registration.close()
            await until(watch, lambda snapshot: ids(snapshot) == [])

    async def test_two_watches_see_the_same(self, here: Discovery, there: Discovery) -> None:
        """Of one discovery object, begun at different times."""
        first = there.watch()
        assert ids(await until(first, lambda _: True)) == []
        await here.register(worker())
        assert (await until(first, lambda snapshot: ids(snapshot) == ["vllm-1"])).current
        assert ids(await until(there.watch(), lambda _: True)) == ["vllm-1"]

    async def test_changes_in_a_row_become_few_snapshots(self, here: Discovery, there: Discovery) -> None:
        """A fleet that starts together is not as many events; the last view is never missed."""
        seen = 0
        watch = there.watch()
        await until(watch, lambda _: True)

        def count(snapshot: Snapshot) -> bool:
            nonlocal seen
            seen += 1
            return len(snapshot.records) == 20

        joined = [await here.register(worker(f"w{number:02}")) for number in range(20)]
        await until(watch, count)
        assert seen < len(joined)

    async def test_a_change_after_closing_does_nothing(self, here: Discovery, there: Discovery) -> None:
        """A worker that leaves while its state changes must not come back."""
        registration = await here.register(worker())
        await registration.close()
        await registration.update(worker(state=WorkerState.DRAINING))
        await registration.close()
        assert not registration.held
        assert await there.list() == ()

    async def test_registering_an_id_again_replaces_it(self, here: Discovery, there: Discovery) -> None:
        """As a worker does whose first attempt timed out on the way back."""
        await here.register(worker())
        await here.register(worker(total_blocks=7))
        assert await there.list() == (worker(total_blocks=7),)

    async def test_a_registration_stays_one_worker(self, here: Discovery) -> None:
        """Another id is another worker."""
        registration = await here.register(worker())
        with pytest.raises(ConfigError, match="can't become one of 'other'"):
            await registration.update(worker("other"))

    async def test_closing_deregisters_and_ends_watches(self, here: Discovery, there: Discovery) -> None:
        """Nothing is left of a user that went; closing twice is fine."""
        await here.register(worker())
        watch = here.watch()
        assert ids(await until(watch, lambda _: True)) == ["vllm-1"]
        await here.close()
        await here.close()
        async with asyncio.timeout(WAIT_S):
            assert all([ids(snapshot) in ([], ["vllm-1"]) async for snapshot in watch])
        assert await there.list() == ()

    async def test_registrations_are_counted(self, here: Discovery) -> None:
        """Nothing was lost."""
        await here.register(worker("a"))
        await here.register(worker("b"))
        assert (here.counts.registrations, here.counts.re_registrations, here.counts.losses) == (2, 0, 0)

    async def test_routers_and_workers_are_kept_apart(self, url: str, here: Discovery, there: Discovery) -> None:
        """Neither kind sees the other, also under one id."""
        router = RouterRecord(id="vllm-1", model="m", events_endpoint="tcp://127.0.0.1:1", state_endpoint="tcp://127.0.0.1:2")
        async with AsyncExitStack() as stack:
            ours, theirs = (open_collection(url, RouterRecord) for _ in range(2))
            for store in (ours, theirs):
                stack.push_async_callback(store.close)
            await here.register(worker())
            registration = await ours.register(router)
            assert await there.list() == (worker(),)
            assert await theirs.list() == (router,)
            async with asyncio.timeout(WAIT_S):
                assert (await anext(theirs.watch())).records == (router,)
            await registration.close()
            assert await there.list() == (worker(),)
            assert await theirs.list() == ()
