# SPDX-License-Identifier: Apache-2.0
"""Discovery in a real etcd: the contract, and what happens when etcd or a worker goes away."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from discovery_contract import DiscoveryContract, ids, until, worker
from etcds import BINARY, Etcd
from tandem_protocol.discovery import LEASE_TTL_S, Discovery, open_discovery
from tandem_protocol.discovery.etcd import EtcdDiscovery, connect, parse_address
from tandem_protocol.errors import ConfigError, UnavailableError
from tandem_protocol.workers import WorkerState, encode_record

pytestmark = pytest.mark.skipif(BINARY is None, reason="no etcd here: apt-get install etcd-server")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    """One etcd for the tests that leave it alone."""
    server = Etcd(tmp_path_factory.mktemp("etcd"))
    try:
        server.start()
        yield server
    finally:
        server.kill(wipe=True)


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    """An etcd that the test may kill."""
    server = Etcd(tmp_path)
    try:
        server.start()
        yield server
    finally:
        server.kill(wipe=True)


@pytest.fixture
async def here(etcd: Etcd) -> AsyncIterator[EtcdDiscovery]:
    """A worker's."""
    discovery = open_discovery(etcd.url)
    assert isinstance(discovery, EtcdDiscovery)
    yield discovery
    await discovery.close()


@pytest.fixture
async def there(etcd: Etcd) -> AsyncIterator[Discovery]:
    """A router's."""
    discovery = open_discovery(etcd.url)
    yield discovery
    await discovery.close()


class TestEtcd(DiscoveryContract):
    """Under a prefix of each test's own."""

    @pytest.fixture
    def url(self, shared: Etcd, request: pytest.FixtureRequest) -> str:
        """A prefix of this test."""
        return f"etcd://127.0.0.1:{shared.port}/{request.node.name}"


async def test_etcd_killed_and_started_with_its_data(etcd: Etcd, here: EtcdDiscovery, there: Discovery) -> None:
    """The view stays while it is away, says so, and no worker is ever missing from it."""
    registration = await here.register(worker())
    async with aclosing(there.watch()) as watch:
        await until(watch, lambda snapshot: ids(snapshot) == ["vllm-1"])
        await asyncio.to_thread(etcd.kill)
        away = await until(watch, lambda snapshot: not snapshot.current)
        assert ids(away) == ["vllm-1"]
        await registration.set_state(WorkerState.DRAINING)
        assert not registration.held
        await asyncio.to_thread(etcd.start)
        back = await until(watch, lambda snapshot: snapshot.current)
        assert ids(back) == ["vllm-1"]
        await until(watch, lambda snapshot: snapshot.records == (worker(state=WorkerState.DRAINING),))
    assert registration.held
    assert (here.counts.losses, there.counts.losses) == (1, 1)


async def test_etcd_killed_and_started_empty(etcd: Etcd, here: EtcdDiscovery, there: Discovery) -> None:
    """The worker registers again under a new lease, within the grace of watchers, who never miss it."""
    registration = await here.register(worker())
    async with aclosing(there.watch()) as watch:
        await until(watch, lambda snapshot: ids(snapshot) == ["vllm-1"])
        await asyncio.to_thread(etcd.kill, wipe=True)
        views = [await until(watch, lambda snapshot: not snapshot.current)]
        await asyncio.to_thread(etcd.start)
        newcomer = open_discovery(etcd.url)
        await until(newcomer.watch(), lambda snapshot: snapshot.records == (worker(),))
        await newcomer.close()
        views.append(await until(watch, lambda snapshot: snapshot.current))
        await registration.set_state(WorkerState.ASLEEP)
        views.append(await until(watch, lambda snapshot: snapshot.records[0].state is WorkerState.ASLEEP))
    assert [ids(view) for view in views] == [["vllm-1"]] * 3
    assert here.counts.re_registrations == 1


async def test_a_worker_that_died_meanwhile_is_dropped_after_the_grace(etcd: Etcd, there: Discovery) -> None:
    """The last view is no belief for ever."""
    dying = open_discovery(etcd.url)
    await dying.register(worker())
    async with aclosing(there.watch()) as watch:
        await until(watch, lambda snapshot: ids(snapshot) == ["vllm-1"])
        await asyncio.to_thread(etcd.kill, wipe=True)
        await until(watch, lambda snapshot: not snapshot.current)
        await dying.close()
        await asyncio.to_thread(etcd.start)
        assert ids(await until(watch, lambda snapshot: snapshot.current)) == ["vllm-1"]
        started = time.monotonic()
        await until(watch, lambda snapshot: ids(snapshot) == [])
        assert 0.5 * LEASE_TTL_S < time.monotonic() - started < 2 * LEASE_TTL_S
    assert there.counts.graced == 1


async def test_the_lease_of_a_killed_worker_ends(etcd: Etcd, there: Discovery) -> None:
    """SIGKILL leaves the entry for one lease, not longer."""
    register = (
        "import asyncio, sys\n"
        "from tandem_protocol.discovery import open_discovery\n"
        "from tandem_protocol.workers import decode_record\n"
        "async def main():\n"
        "    await open_discovery(sys.argv[1]).register(decode_record(sys.argv[2].encode()))\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    async with aclosing(there.watch()) as watch:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", register, etcd.url, encode_record(worker()).decode())
        try:
            await until(watch, lambda snapshot: ids(snapshot) == ["vllm-1"])
        finally:
            process.kill()
            await process.wait()
        started = time.monotonic()
        await until(watch, lambda snapshot: ids(snapshot) == [])
        assert time.monotonic() - started < 1.5 * LEASE_TTL_S


async def test_an_etcd_that_hangs_is_away_too(etcd: Etcd, here: EtcdDiscovery, there: Discovery) -> None:
    """Every call ends within its deadline, and the view stays."""
    await here.register(worker())
    async with aclosing(there.watch()) as watch:
        await until(watch, lambda snapshot: ids(snapshot) == ["vllm-1"])
        etcd.pause()
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="does not answer"):
            await there.list()
        assert time.monotonic() - started < 8
        assert ids(await until(watch, lambda snapshot: not snapshot.current)) == ["vllm-1"]
        etcd.resume()
        assert ids(await until(watch, lambda snapshot: snapshot.current)) == ["vllm-1"]


async def test_a_lost_lease_is_made_anew(etcd: Etcd, here: EtcdDiscovery, there: Discovery) -> None:
    """Also when somebody revoked it by hand."""
    registration = await here.register(worker())
    client = connect(parse_address(etcd.url.removeprefix("etcd:")))
    leases = await asyncio.to_thread(client.post, client.get_url("/lease/leases"), json={})
    for lease in leases["leases"]:
        await asyncio.to_thread(client.post, client.get_url("/lease/revoke"), json={"ID": lease["ID"]})
    assert await there.list() == ()
    await registration.beat()  # type: ignore[attr-defined]
    assert await there.list() == (worker(),)
    assert here.counts.re_registrations == 1


async def test_what_is_no_record_is_left_out_and_counted(etcd: Etcd, here: EtcdDiscovery, there: Discovery) -> None:
    """Somebody else's key under our prefix hides no worker."""
    await here.register(worker())
    address = parse_address(etcd.url.removeprefix("etcd:"))
    await asyncio.to_thread(connect(address).put, address.key("strange"), b"{}")
    assert await there.list() == (worker(),)
    assert there.counts.bad_records == 1


async def test_registering_without_an_etcd_fails_in_time(tmp_path: Path) -> None:
    """The worker retries, and a watch that starts then has an empty view that is not current."""
    discovery = open_discovery(Etcd(tmp_path).url)
    with pytest.raises(UnavailableError, match="start it, or mend TANDEM_DISCOVERY"):
        await discovery.register(worker())
    snapshot = await until(discovery.watch(), lambda _: True)
    assert (snapshot.records, snapshot.current) == ((), False)
    await discovery.close()


@pytest.mark.parametrize("url", ["etcd:", "etcd://", "etcd://host:port", "etcd:///prefix", "etcd://me:word@host"])
def test_incomplete_addresses_are_refused(url: str) -> None:
    """With the way to write them."""
    with pytest.raises(ConfigError, match="etcd://host:port"):
        open_discovery(url)
