# SPDX-License-Identifier: Apache-2.0
"""Which models one server runs: names, roles, cores and GPUs. Pure: options and hardware in, a plan out."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role
from tandem_worker.ranks import engine_processes

ROUTER = "router"
MEMORY_SHARE = 0.9
"""vLLM's own default share of a GPU, divided among the engines that live on it."""


class Mode(StrEnum):
    """What a server serves."""

    AGG = "agg"
    DISAGG = "disagg"
    BOTH = "both"


@dataclass(frozen=True)
class Hardware:
    """What engines are placed on."""

    cores: tuple[int, ...]
    gpus: int
    fast_bf16: bool = True


@dataclass(frozen=True)
class WorkerPlan:
    """One engine: a Triton model of its own."""

    name: str
    role: Role
    index: int
    cores: str = ""
    gpus: str = ""
    execution_env: str = ""
    """A virtual environment for this worker alone (Triton's EXECUTION_ENV_PATH); empty: the launcher's own."""
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EnsemblePlan:
    """An ensemble that chains workers."""

    name: str
    template: str
    """The ensemble of the shipped repository that it is a copy of."""
    steps: dict[Role, str]
    """Role -> the worker that takes this step."""


@dataclass(frozen=True)
class Fleet:
    """All models of one server."""

    workers: tuple[WorkerPlan, ...]
    ensembles: tuple[EnsemblePlan, ...]
    routers: int = 0
    """Instances of the model `router`."""

    @property
    def model_names(self) -> tuple[str, ...]:
        """Every model that must answer."""
        models = (*(worker.name for worker in self.workers), *(ensemble.name for ensemble in self.ensembles))
        return (*models, ROUTER) if self.routers else models


@dataclass(frozen=True)
class Counts:
    """How many of each kind one server runs."""

    aggregated: int = 1
    prefill: int = 1
    decode: int = 1
    routers: int = 1
    encode: int = 0

    def __post_init__(self) -> None:
        if min(self.prefill, self.decode) < 1:
            raise ConfigError("--prefill and --decode must be at least 1")
        if min(self.aggregated, self.routers, self.encode) < 0:
            raise ConfigError("--workers, --routers and --encode must be at least 0")


def plan_fleet(mode: Mode, counts: Counts, only: Role | None, hardware: Hardware, arguments: dict[str, Any]) -> Fleet:
    """Plans a server. `only` is a role that this host serves alone, for prefill and decode on different hosts."""
    roles = _roles(mode, counts, only)
    if not roles and not counts.routers:
        raise ConfigError("there is nothing to serve: --workers 0 is for a server of routers alone, so give it --routers 1")
    workers = _place([WorkerPlan(name, role, index) for index, (name, role) in enumerate(roles, start=_first_index(roles))],
                     hardware, arguments)
    return Fleet(workers, _ensembles(workers), routers=counts.routers)


def _first_index(roles: list[tuple[str, Role]]) -> int:
    """Index 0 belongs to the aggregated worker, so that admin ports don't move with the mode."""
    return 0 if any(role is Role.AGGREGATED for _, role in roles) else 1


def _roles(mode: Mode, counts: Counts, only: Role | None) -> list[tuple[str, Role]]:
    aggregated = counts.aggregated if only is None and mode is not Mode.DISAGG else 0
    prefills = counts.prefill if _wants(Role.PREFILL, mode, only) else 0
    decodes = counts.decode if _wants(Role.DECODE, mode, only) else 0
    kinds = (("vllm", Role.AGGREGATED, aggregated), ("prefill", Role.PREFILL, prefills), ("decode", Role.DECODE, decodes),
             ("encode", Role.ENCODE, counts.encode if only is None else 0))
    return [(_numbered(name, i), role) for name, role, count in kinds for i in range(count)]


def _wants(role: Role, mode: Mode, only: Role | None) -> bool:
    return only is role if only is not None else mode is not Mode.AGG


def _numbered(name: str, i: int) -> str:
    return name if i == 0 else f"{name}_{i}"


def _ensembles(workers: tuple[WorkerPlan, ...]) -> tuple[EnsemblePlan, ...]:
    """Every chain of the shipped repository whose roles are all there."""
    chains = (("disagg", (Role.PREFILL, Role.DECODE)), ("encode_agg", (Role.ENCODE, Role.AGGREGATED)),
              ("encode_disagg", (Role.ENCODE, Role.PREFILL, Role.DECODE)))
    return tuple(plan for template, roles in chains for plan in _chained(template, roles, workers))


def _chained(template: str, roles: tuple[Role, ...], workers: tuple[WorkerPlan, ...]) -> list[EnsemblePlan]:
    """As many ensembles as the longest side has workers; the others are used again, since ensembles are static. The router does better."""
    names = {role: [worker.name for worker in workers if worker.role is role] for role in roles}
    if not all(names.values()):
        return []
    return [EnsemblePlan(_numbered(template, i), template, {role: own[i % len(own)] for role, own in names.items()})
            for i in range(max(map(len, names.values())))]


def _place(workers: list[WorkerPlan], hardware: Hardware, arguments: dict[str, Any]) -> tuple[WorkerPlan, ...]:
    if not workers:
        return ()
    # Prefill and decode work at the same time, so they are placed first and the aggregated worker shares.
    order = sorted(workers, key=lambda worker: worker.role is Role.AGGREGATED)
    placed = _on_gpus(order, hardware.gpus, arguments) if hardware.gpus else _on_cores(order, hardware, arguments)
    return tuple(sorted(placed, key=lambda worker: worker.index))


def _on_cores(workers: list[WorkerPlan], hardware: Hardware, arguments: dict[str, Any]) -> list[WorkerPlan]:
    """Equal shares of the cores; with fewer cores than engines, one core each in turn.

    Never overlapping shares of several cores: OpenMP threads of two engines spin on each other's barriers there.
    Without compilation by default: it triples the start of a CPU engine for some 10-30 % of speed. In float32 on cores without
    bfloat16 instructions, which emulate them at less than half the speed.
    """
    cores, groups = hardware.cores, engine_processes(arguments)
    share = max(1, len(cores) // (len(workers) * groups))
    own_arguments = {"enforce_eager": True, **({} if hardware.fast_bf16 else {"dtype": "float32"}), **arguments}
    placed = []
    for i, worker in enumerate(workers):
        own = [[cores[((i * groups + group) * share + k) % len(cores)] for k in range(share)] for group in range(groups)]
        named = "|".join(",".join(map(str, group)) for group in own)
        placed.append(WorkerPlan(worker.name, worker.role, worker.index, cores=named, arguments=dict(own_arguments)))
    return placed


def _on_gpus(workers: list[WorkerPlan], gpus: int, arguments: dict[str, Any]) -> list[WorkerPlan]:
    """As many GPUs per engine as its parallelism needs, in turn; engines that meet on a GPU share its memory."""
    per_engine = engine_processes(arguments)
    if per_engine > gpus:
        raise ConfigError(f"one engine needs {per_engine} GPUs, this host has {gpus}: lower --tensor-parallel-size or --data-parallel-size")
    slots = gpus // per_engine
    sharing = -(-len(workers) // slots)
    placed = []
    for i, worker in enumerate(workers):
        first = (i % slots) * per_engine
        own = {"gpu_memory_utilization": round(MEMORY_SHARE / sharing, 3), **arguments} if sharing > 1 else dict(arguments)
        placed.append(WorkerPlan(worker.name, worker.role, worker.index, gpus=",".join(str(first + k) for k in range(per_engine)),
                                 arguments=own))
    return placed
