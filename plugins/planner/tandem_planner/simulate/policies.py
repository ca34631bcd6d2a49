# SPDX-License-Identifier: Apache-2.0
"""What scales a simulated fleet besides Tandem's planner: nothing, a rule as Kubernetes' HorizontalPodAutoscaler has it, the reference."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from tandem_planner import reference
from tandem_planner.interpolation import DecodeSurface, PrefillCurve
from tandem_planner.terms import Decision, Observation, Pool
from tandem_protocol.roles import Role


class Policy(Protocol):
    """Decides how many workers each role should have. Roles that it leaves out stay as they are."""

    def decide(self, observation: Observation) -> Decision:
        """Called every few seconds, with traffic of the last window."""


@dataclass(frozen=True)
class StaticPolicy:
    """Always the same."""

    target: Mapping[Role, int]

    def decide(self, observation: Observation) -> Decision:
        """The sizes that it was made with."""
        return Decision(observation.at_s, self.target, "static")


@dataclass
class HpaPolicy:
    """`ceil(workers * metric / target)` per role within a tolerance, downwards only to the highest wish of the last minutes.

    Metrics are means over ready workers, as HPA takes them: requests that wait for prefill, and KV use of decode (aggregated workers:
    whichever asks for more). Tolerance, window and the bound on growth are Kubernetes' defaults (doubling, or four more).
    """

    max_workers: int
    queue_target: float = 2.0
    """Requests that wait, per worker."""
    kv_target: float = 0.6
    tolerance: float = 0.1
    stabilization_s: float = 300.0
    _wishes: dict[Role, deque[tuple[float, int]]] = field(default_factory=dict)

    def decide(self, observation: Observation) -> Decision:
        """One sync of the controller."""
        target = {role: self._stable(role, observation.at_s, self._wish(role, pool), pool) for role, pool in observation.pools.items()}
        return Decision(observation.at_s, target, "queue and KV use against their targets")

    def _wish(self, role: Role, pool: Pool) -> int:
        if not pool.loads:
            return pool.wanted
        ratios = []
        if role is not Role.DECODE:
            ratios.append(sum(load.queued_requests for load in pool.loads) / len(pool.loads) / self.queue_target)
        if role is not Role.PREFILL:
            ratios.append(sum(load.kv_use for load in pool.loads) / len(pool.loads) / self.kv_target)
        ratio = max(ratios)
        wish = pool.wanted if abs(ratio - 1) <= self.tolerance else math.ceil(pool.ready * ratio)
        return min(max(1, wish), max(pool.wanted * 2, pool.wanted + 4), self.max_workers)

    def _stable(self, role: Role, at_s: float, wish: int, pool: Pool) -> int:
        wishes = self._wishes.setdefault(role, deque())
        wishes.append((at_s, wish))
        while wishes[0][0] < at_s - self.stabilization_s:
            wishes.popleft()
        return wish if wish >= pool.wanted else min(pool.wanted, max(past for _, past in wishes))


@dataclass
class ReferencePolicy:
    """The reference planner's formulas without corrections, each interval for the traffic of the last one.

    Only for disaggregated fleets, as the reference. Between intervals, and without traffic, everything stays.
    """

    curve: PrefillCurve
    surface: DecodeSurface
    engines: reference.Engines
    itl_ms: float
    _target: dict[Role, int] = field(default_factory=dict)

    def decide(self, observation: Observation) -> Decision:
        """As `tandem_planner.reference.replicas`."""
        if (traffic := observation.traffic) is not None:
            interval = reference.Interval(traffic.requests, traffic.isl, traffic.osl, traffic.interval_s)
            prefill, decode = reference.replicas(interval, self.curve, self.surface, self.engines, self.itl_ms)
            self._target = {Role.PREFILL: prefill, Role.DECODE: decode}
        return Decision(observation.at_s, self._target, "the reference's formulas")
