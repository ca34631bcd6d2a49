# SPDX-License-Identifier: Apache-2.0
"""One scenario from its first request to its last: the fleet runs, and every few seconds a policy looks at it and scales it."""

from collections.abc import Mapping
from dataclasses import dataclass

from tandem_planner.simulate.fleet import Fleet, FleetSettings
from tandem_planner.simulate.load import Load
from tandem_planner.simulate.observing import observe
from tandem_planner.simulate.policies import Policy
from tandem_planner.simulate.requests import SimRequest
from tandem_planner.simulate.times import EngineTimes
from tandem_protocol.errors import ConfigError, EngineError
from tandem_protocol.roles import Role

_PATIENCE = 20.0
"""A scenario is given up when it takes this many times its load's duration: the fleet can't keep up by far."""


@dataclass(frozen=True)
class Schedule:
    """When the policy looks, and over which time."""

    tick_s: float = 5.0
    """Between two looks at the workers."""
    window_s: float = 60.0
    """Between two looks at the traffic, and the time that its figures are of: the adjustment interval."""

    def __post_init__(self) -> None:
        """Raises ConfigError for times that aren't above 0."""
        if min(self.tick_s, self.window_s) <= 0:
            raise ConfigError("the planner's tick and window must be above 0 seconds")

    @property
    def ticks_per_window(self) -> int:
        """The window is rounded to whole ticks."""
        return max(1, round(self.window_s / self.tick_s))


@dataclass(frozen=True)
class Tick:
    """The fleet after a decision."""

    at_s: float
    wanted: Mapping[Role, int]
    ready: Mapping[Role, int]
    in_flight: int
    reason: str


@dataclass(frozen=True)
class Run:
    """What happened."""

    load: Load
    requests: list[SimRequest]
    ticks: list[Tick]
    gpu_seconds: float
    end_s: float
    gave_up: bool = False
    """Whether requests were left when patience ended; they count as missing every target."""


def simulate(load: Load, times: EngineTimes, settings: FleetSettings, policy: Policy, sizes: Mapping[Role, int],
             schedule: Schedule | None = None) -> Run:
    """Runs until every request has ended. `sizes` are the workers at the beginning. Deterministic."""
    schedule = schedule or Schedule()
    fleet = Fleet(times, settings, sizes)
    requests = _requests(load)
    ticks: list[Tick] = []
    arrived, number = 0, 0
    while (arrived < len(load) or fleet.in_flight) and fleet.now < load.duration_s * _PATIENCE:
        number += 1
        arrived = fleet.run_until(load, requests, arrived, number * schedule.tick_s)
        ticks.append(_tick(fleet, policy, schedule.window_s if number % schedule.ticks_per_window == 0 else None))
    fleet.check_integrity()
    return Run(load, requests, ticks, fleet.gpu_seconds(), fleet.now, gave_up=bool(fleet.in_flight or arrived < len(load)))


def _tick(fleet: Fleet, policy: Policy, window_s: float | None) -> Tick:
    decision = policy.decide(observe(fleet, window_s))
    for role, count in decision.target.items():
        if role not in fleet.wanted or count < 0:
            raise EngineError(f"the planner wants {count} workers of role {role}, which this fleet can't have")
        if count != fleet.wanted[role]:
            fleet.scale(role, count)
    pools = fleet.pools()
    return Tick(fleet.now, dict(fleet.wanted), {role: pool.ready for role, pool in pools.items()}, fleet.in_flight, decision.reason)


def _requests(load: Load) -> list[SimRequest]:
    columns = zip(load.at_s.tolist(), load.input_tokens.tolist(), load.output_tokens.tolist(), load.cached_tokens.tolist(), strict=True)
    return [SimRequest(number, *row) for number, row in enumerate(columns)]
