# SPDX-License-Identifier: Apache-2.0
"""All that a planner remembers: immutable, small, and JSON, so that a restarted planner goes on without a jump."""

from typing import TypeVar

import msgspec

from tandem_planner.predict.forecast import TrafficHistory
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role

T = TypeVar("T")


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """A pressure at one look; 1 is an engine's threshold for more workers. In `samples` the most loaded engine's."""

    at_s: float
    pressure: float


class Change(msgspec.Struct, frozen=True):
    """A count of workers that is on trial, and the traffic when it was."""

    at_s: float
    workers: int
    requests_per_s: float | None


class Lesson(msgspec.Struct, frozen=True):
    """So many workers were too few at such traffic: the pool was made smaller and soon had to grow again."""

    workers: int
    requests_per_s: float | None
    until_s: float
    times: int


class RoleState(msgspec.Struct, frozen=True):
    """What is remembered of one pool."""

    counts: tuple[int, int] | None = None
    """Ready and wanted, as last seen."""
    counts_since_s: float = 0.0
    looked_since_s: float | None = None
    """Since when every worker could be read at each look, with these counts."""
    samples: tuple[Sample, ...] = ()
    over_since_s: float | None = None
    """Since when some engine is above the threshold."""
    joined_s: float | None = None
    """When a worker last became ready."""
    last_sum: Sample | None = None
    """The pressure of all engines at the last look, with these counts."""
    needed: int | None = None
    """Workers by the last throughput plan; None: there is none."""
    needed_to_shrink: int | None = None
    """The same for a margin of traffic more."""
    plans_below: int = 0
    """Throughput plans in a row that asked for fewer workers than there are."""
    log_correction: float = 0.0
    """Of observed over modelled latency."""
    log_service: float = 0.0
    """Of the time that a prompt takes of an engine, over the profile's."""
    target: int | None = None
    """What was decided last."""
    last_down: Change | None = None
    """The count that the pool was last made smaller to."""
    outgrown: Change | None = None
    """The count that was enough for the plan, but not for the load; the next plan tells whether traffic had grown."""
    lesson: Lesson | None = None


class PlannerState(msgspec.Struct, frozen=True):
    """What is remembered of all pools and the traffic."""

    roles: dict[str, RoleState] = {}
    history: TrafficHistory = TrafficHistory()
    planned_at_s: float | None = None
    """When traffic was last planned for."""
    requests_per_s: float | None = None
    """As seen then."""
    isl: float | None = None
    osl: float | None = None

    def of(self, role: Role) -> RoleState:
        """One pool's, empty if nothing was seen of it."""
        return self.roles.get(role.value) or RoleState()

    def with_role(self, role: Role, state: RoleState) -> "PlannerState":
        """The same with one pool's replaced."""
        return msgspec.structs.replace(self, roles={**self.roles, role.value: state})

    def encode(self) -> bytes:
        """As JSON."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, text: bytes) -> "PlannerState":
        """From JSON. Raises ConfigError for anything else; a planner may then begin with an empty one."""
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.MsgspecError as exc:
            raise ConfigError(f"this is no state of a planner ({exc}): remove it, and the planner begins anew") from exc


def changed(struct: T, **fields: object) -> T:
    """A struct with some fields replaced."""
    return msgspec.structs.replace(struct, **fields)  # type: ignore[type-var]  # T is a Struct, which msgspec's stub can't bind here
