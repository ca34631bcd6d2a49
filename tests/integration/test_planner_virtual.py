# SPDX-License-Identifier: Apache-2.0
"""The virtual connector over a real etcd: Dynamo's keys, an acknowledgement, and an etcd that goes away."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from etcds import BINARY, Etcd
from servers import wait_for
from tandem_planner.connectors import Bounds
from tandem_planner.connectors.virtual import VirtualConnector
from tandem_planner.terms import Pool
from tandem_protocol.discovery.etcd import connect, parse_address, read_all
from tandem_protocol.errors import UnavailableError
from tandem_protocol.roles import Role

pytestmark = pytest.mark.skipif(BINARY is None, reason="there is no etcd")
BOUNDS = Bounds(call_s=5, scale_s=5, check_s=0.02, drain_s=0)
ROLES = (Role.PREFILL, Role.DECODE)
WAIT_S = 30.0
PREFIX = "v1/prod/planner/"


class Client:
    """Who starts and ends workers, as Dynamo's `VirtualConnectorClient` does."""

    def __init__(self, etcd: Etcd) -> None:
        self._client = connect(parse_address(etcd.url.removeprefix("etcd:")))

    def read(self) -> dict[str, str]:
        """All keys, without their prefix."""
        return {name.removeprefix(PREFIX): raw.decode() for name, raw in read_all(self._client, PREFIX).values.items()}

    def complete(self, decision: int) -> None:
        """Acknowledges."""
        self._client.put(f"{PREFIX}scaled_decision_id", str(decision))


@pytest.fixture
async def etcd(tmp_path: Path) -> AsyncIterator[Etcd]:
    """One of the test's own."""
    one = Etcd(tmp_path)
    await asyncio.to_thread(one.start)
    yield one
    one.kill()


async def test_decisions_are_left_for_others_and_wait_for_their_acknowledgement(etcd: Etcd) -> None:
    connector, client = VirtualConnector(etcd.url, "prod", BOUNDS, ROLES), Client(etcd)
    assert await connector.pools() == {Role.PREFILL: Pool(0, 0), Role.DECODE: Pool(0, 0)}
    scaling = asyncio.create_task(connector.scale(Role.DECODE, 2))
    await asyncio.to_thread(wait_for, lambda: client.read().get("decision_id") == "0", WAIT_S, "the decision in etcd")
    assert client.read() == {"num_prefill_workers": "0", "num_decode_workers": "2", "decision_id": "0"}
    assert (await connector.pools())[Role.DECODE] == Pool(ready=0, wanted=2)
    assert not scaling.done()
    client.complete(0)
    async with asyncio.timeout(WAIT_S):
        await scaling
    assert (await connector.pools())[Role.DECODE] == Pool(2, 2)
    await connector.scale(Role.DECODE, 2)  # stands there already
    assert client.read()["decision_id"] == "0"
    await _after_a_restart(etcd, client)
    await connector.close()


async def _after_a_restart(etcd: Etcd, client: Client) -> None:
    """Another planner goes on with what stands there; an etcd that is away is a sentence, and nothing is lost."""
    other = VirtualConnector(etcd.url, "prod", Bounds(5, 0.3, 0.02, 0), ROLES)
    assert (await other.pools())[Role.DECODE] == Pool(2, 2)
    with pytest.raises(UnavailableError, match=r"an acknowledgement of decision 1 \(3 prefill workers\)"):
        await other.scale(Role.PREFILL, 3)
    assert client.read() == {"num_prefill_workers": "3", "num_decode_workers": "2", "decision_id": "1", "scaled_decision_id": "0"}
    assert not (await other.pools())[Role.PREFILL].settled
    etcd.kill()
    with pytest.raises(UnavailableError, match="etcd can't be asked"):
        await other.pools()
    await asyncio.to_thread(etcd.start)
    client.complete(1)
    assert await other.pools() == {Role.PREFILL: Pool(3, 3), Role.DECODE: Pool(2, 2)}
    await other.close()


async def test_two_planners_can_not_write_over_each_other(etcd: Etcd) -> None:
    """A decision is only written on top of the one that was read."""
    one, other = (VirtualConnector(etcd.url, "prod", BOUNDS, ROLES) for _ in range(2))
    board = await one._read()
    assert other._write(await other._read(), Role.DECODE, 5)
    assert not one._write(board, Role.DECODE, 1)
    assert Client(etcd).read()["num_decode_workers"] == "5"
    await one.close()
    await other.close()
