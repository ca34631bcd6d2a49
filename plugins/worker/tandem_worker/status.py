# SPDX-License-Identifier: Apache-2.0
"""What a worker tells of itself on its admin port."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from tandem_protocol.roles import Role


class WorkerState(StrEnum):
    """Where a worker is in its life; only a ready one takes requests."""

    STARTING = "starting"
    READY = "ready"
    UNWELL = "unwell"
    """A canary request was late or failed (`canary`); the next good one makes it ready again."""
    DRAINING = "draining"
    ASLEEP = "asleep"
    """Told to sleep (`sleep`); `/engine/wake_up` makes it ready again."""
    DEAD = "dead"
    HUNG = "hung"
    """The engine lives but does nothing (`heartbeat`); the server is about to exit."""
    STOPPED = "stopped"


@dataclass(frozen=True)
class RankStatus:
    """One data-parallel rank, in the terms of WorkerStatus; `in_engine` counts what it was handed and has not ended."""

    dp_rank: int
    in_engine: int
    running: int
    waiting: int
    kv_usage: float
    step_s: float


@dataclass(frozen=True)
class WorkerStatus:
    """A snapshot of one worker.

    `active` counts requests between arrival and last response; `running` and `waiting` are the engine's own counts of its
    latest step; `kv_usage` is the used share of its KV blocks, 0 to 1; `step_s` the smoothed time of one engine step.
    """

    state: WorkerState
    role: Role
    active: int
    running: int
    waiting: int
    kv_usage: float
    step_s: float
    registration: str | None = None
    """Whether discovery holds this worker; None, and absent in `/health`, without discovery."""
    reason: str | None = None
    """Why it is not ready, where there is more to say than the state; absent in `/health` otherwise."""
    ranks: tuple[RankStatus, ...] = ()
    """Each data-parallel rank; absent in `/health` where there is only one."""

    def as_json(self, model: str) -> dict[str, Any]:
        """The body of `/health`."""
        fields = {name: value for name, value in asdict(self).items() if value not in (None, ())}
        return {"status": fields.pop("state"), "model": model, **fields}
