# SPDX-License-Identifier: Apache-2.0
"""A small fleet for the tests of placement: workers, prompts, a clock that is set by hand, and an index that is told what it knows."""

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem_protocol.roles import Role
from tandem_protocol.workers import EventSource, WorkerRecord, WorkerState
from tandem_router.config import RouterSettings
from tandem_router.placement import Placement

BLOCK = 16


@dataclass
class Clock:
    """Seconds, set by hand."""

    now: float = 100.0

    def __call__(self) -> float:
        """The time."""
        return self.now


@dataclass
class FakeOverlap:
    """Blocks per tier and slot."""

    blocks: NDArray[np.int32]


@dataclass
class FakeIndex:
    """An index that is told the hits of every prompt: worker name -> (device, host, storage)."""

    hits: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    slots: dict[tuple[str, int], int] = field(default_factory=dict)
    matches: int = 0

    def match(self, keys: NDArray[np.uint64]) -> FakeOverlap:
        """At most as many blocks as the prompt has."""
        self.matches += 1
        blocks = np.zeros((3, len(self.slots)), np.int32)
        for (name, _), slot in self.slots.items():
            blocks[:, slot] = np.minimum(self.hits.get(name, (0, 0, 0)), len(keys))
        return FakeOverlap(blocks)

    def add_worker(self, name: str, dp_rank: int) -> int:
        """In order of appearance."""
        return self.slots.setdefault((name, dp_rank), len(self.slots))

    def remove_worker(self, name: str) -> None:
        """Slots are not given out again here."""
        self.hits.pop(name, None)


def worker(name: str, *, role: Role = Role.AGGREGATED, state: WorkerState = WorkerState.READY, ranks: int = 1,
           **fields: Any) -> WorkerRecord:
    """A worker of 1,000 blocks."""
    figures: dict[str, Any] = {"block_size": BLOCK, "total_blocks": 1000, "max_num_seqs": 256, "max_num_batched_tokens": 2048} | fields
    sources = tuple(EventSource(dp_rank=rank, endpoint=f"tcp://{name}:{rank}") for rank in range(ranks))
    return WorkerRecord(id=name, role=role, state=state, model="m", grpc_url=f"{name}:8001", triton_model="vllm", event_sources=sources,
                        **figures)


def workers(count: int, **fields: Any) -> list[WorkerRecord]:
    """w0, w1, ..."""
    return [worker(f"w{number}", **fields) for number in range(count)]


def prompt(system: int, own: int, seed: int) -> NDArray[np.uint64]:
    """Chained keys: `system` blocks that all prompts share, then `own` blocks of this seed."""
    shared = random.Random(0)
    tail = random.Random(f"{system} {seed}")
    keys = [shared.getrandbits(64) for _ in range(system)] + [tail.getrandbits(64) for _ in range(own)]
    return np.array(keys, np.uint64)


def placement(fleet: list[WorkerRecord], index: FakeIndex | None = None, clock: Clock | None = None, **settings: Any) -> Placement:
    """A placement over the fleet with a seeded generator."""
    role = fleet[0].role if fleet else Role.AGGREGATED
    placed = Placement(RouterSettings(**settings), role, index or FakeIndex(), clock or Clock(), random.Random(1))
    placed.set_workers(fleet)
    return placed
