# SPDX-License-Identifier: Apache-2.0
"""Scales Deployments, StatefulSets and LeaderWorkerSets, found by their labels, through their scale subresource.

A worker that goes is drained by its own end: the pod gets SIGTERM, tritonserver ends, and the worker ends its requests and leaves discovery
within the pod's grace period. Kubernetes chooses which pod that is.
"""

from collections.abc import Mapping

from tandem_planner.connectors.interface import FLEET_LABEL, ROLE_LABEL, Bounds, Connector, wait_until
from tandem_planner.connectors.kubernetes_api import KubernetesApi, Workload
from tandem_planner.terms import Pool
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role


class KubernetesConnector(Connector):
    """One fleet in one namespace; every role has one workload."""

    def __init__(self, api: KubernetesApi, fleet: str, bounds: Bounds) -> None:
        self._api = api
        self._selector = f"{FLEET_LABEL}={fleet},{ROLE_LABEL}"
        self._bounds = bounds

    async def pools(self) -> Mapping[Role, Pool]:
        """Ready are those of which Kubernetes says so; a change that no controller has seen yet is not settled."""
        return {role: _pool(workload) for role, workload in (await self._by_role()).items()}

    async def scale(self, role: Role, count: int) -> None:
        """As much as Kubernetes has room for; what is pending when the bound ends stays wanted there."""
        workload = await self._workload(role)
        if workload.wanted != count:
            await self._api.set_replicas(workload, count)
        await wait_until(lambda: self._is_at(role, count), self._bounds, f"{count} ready {role} workers in {workload.kind} {workload.name}")

    async def _is_at(self, role: Role, count: int) -> bool:
        workload = await self._workload(role)
        return workload.current and workload.ready == count == workload.wanted

    async def _workload(self, role: Role) -> Workload:
        found = (await self._by_role()).get(role)
        if found is None:
            raise ConfigError(f"no workload has the labels {self._selector}={role}: label the one that holds the {role} workers")
        return found

    async def _by_role(self) -> dict[Role, Workload]:
        """Raises ConfigError if two workloads have one role: nobody said which of them is to grow."""
        found: dict[Role, Workload] = {}
        for workload in await self._api.workloads(self._selector):
            other = found.setdefault(workload.role, workload)
            if other is not workload:
                raise ConfigError(f"{other.kind} {other.name} and {workload.kind} {workload.name} both have {ROLE_LABEL}={workload.role}: "
                                  f"give each {FLEET_LABEL} one workload of a role")
        return found

    async def close(self) -> None:
        """Ends its connections."""
        await self._api.close()


def _pool(workload: Workload) -> Pool:
    # Before the controller has seen a change, `ready` is of the old one and could look settled by accident.
    ready = workload.ready if workload.current or workload.ready != workload.wanted else max(0, workload.wanted - 1)
    return Pool(ready=ready, wanted=workload.wanted)
