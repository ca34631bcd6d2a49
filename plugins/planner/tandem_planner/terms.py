# SPDX-License-Identifier: Apache-2.0
"""What the parts of the planner hand to each other: what was seen, how many workers of each role, and why."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from tandem_protocol.roles import Role


class Mode(StrEnum):
    """Which pools one planner scales."""

    AGGREGATED = "agg"
    PREFILL = "prefill"
    DECODE = "decode"
    DISAGGREGATED = "disagg"

    @property
    def roles(self) -> tuple[Role, ...]:
        """The pools of this mode, in the order in which a budget is granted."""
        if self is Mode.DISAGGREGATED:
            return (Role.PREFILL, Role.DECODE)
        return (Role.AGGREGATED if self is Mode.AGGREGATED else Role(self.value),)


@dataclass(frozen=True)
class Latency:
    """Seconds."""

    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Traffic:
    """What clients asked for and felt over one interval. Only made of finite figures of at least one request."""

    interval_s: float
    requests: float
    isl: float
    """Prompt tokens per request, mean."""
    osl: float
    """Generated tokens per request, mean."""
    ttft: Latency
    itl: Latency
    request_s: float
    """A request's whole duration, mean, in seconds."""
    cached_fraction: float = 0.0
    """Prompt tokens that needed no prefill, of all: 0 to 1."""


@dataclass(frozen=True)
class WorkerLoad:
    """One worker at the moment of the observation."""

    id: str
    queued_requests: float = 0.0
    queued_prefill_tokens: float = 0.0
    kv_use: float = 0.0
    """Of its KV blocks: 0 to 1."""
    active_requests: float = 0.0
    """That routers have sent it and that it hasn't answered; 0 without a router's metrics."""


@dataclass(frozen=True)
class Pool:
    """The workers of one role."""

    ready: int
    """That take requests now."""
    wanted: int
    """As the connector was last told; above `ready` while workers start, below it while they drain."""
    loads: tuple[WorkerLoad, ...] = ()
    """Of ready workers whose metrics were read; workers that could not be read are missing."""

    @property
    def settled(self) -> bool:
        """Whether no scaling is under way."""
        return self.ready == self.wanted


@dataclass(frozen=True)
class Observation:
    """Everything a decision may rest on. What could not be read is absent, never zero."""

    at_s: float
    """Unix time."""
    pools: Mapping[Role, Pool]
    traffic: Traffic | None = None
    """None: no request in the interval, or figures that are missing, stale or not finite."""
    missing: tuple[str, ...] = ()
    """What could not be read, in words, for the log and the metrics."""


@dataclass(frozen=True)
class Term:
    """One step of a decision's explanation: `name = value`, and how it came about."""

    name: str
    value: float
    how: str
    role: Role | None = None


@dataclass(frozen=True)
class Decision:
    """How many workers each role should have."""

    at_s: float
    target: Mapping[Role, int]
    reason: str
    """One sentence."""
    terms: tuple[Term, ...] = field(default=())
