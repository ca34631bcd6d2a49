# SPDX-License-Identifier: Apache-2.0
"""Whom a router takes for a worker of its model."""

from router_fleet import worker, workers
from tandem_protocol.discovery.memory import MemoryDiscovery
from tandem_protocol.roles import Role
from tandem_protocol.workers import WorkerRecord
from tandem_router.config import RouterSettings
from tandem_router.fleet import Fleet
from tandem_router.index import KvIndex


async def test_a_pipelines_worker_is_nobody_to_place_on() -> None:
    """Even one of the same model, and its model isn't the router's because it came first."""
    discovery: MemoryDiscovery[WorkerRecord] = MemoryDiscovery()
    fleet = Fleet(RouterSettings(), discovery, KvIndex(), None)
    fleet.apply((worker("omni", role=Role.OMNI),))
    assert (fleet.model, fleet.members) == ("", ())
    fleet.apply((worker("omni", role=Role.OMNI), *(ours := workers(2))))
    assert (fleet.model, [record for record, _ in fleet.members]) == ("m", ours)
    assert {role: len(pool.workers) for role, pool in fleet.pools.items() if pool.workers} == {Role.AGGREGATED: 2}
    await fleet.close()
