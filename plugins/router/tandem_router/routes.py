# SPDX-License-Identifier: Apache-2.0
"""What placement is asked, what it answers, and what it needs of an index."""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tandem_protocol.workers import WorkerRecord
from tandem_router.cost import Terms

NO_KEYS: NDArray[np.uint64] = np.zeros(0, np.uint64)
UNTRACKED = 0
"""Ticket of a decision that the books don't keep."""


class PrefixOverlap(Protocol):
    """What an index knows of one prompt."""

    @property
    def blocks(self) -> NDArray[np.int32]:
        """Leading blocks by their best tier, shape (3, slots): device, host, storage."""


class PrefixIndex(Protocol):
    """Who holds which blocks; slots are columns of its overlaps."""

    def match(self, keys: NDArray[np.uint64]) -> PrefixOverlap:
        """The overlap of a prompt with every slot; does not change the index."""

    def add_worker(self, name: str, dp_rank: int) -> int:
        """The slot of a worker's rank, made if it is new."""

    def remove_worker(self, name: str) -> object:
        """Forgets a worker with all its ranks; unknown names are nothing."""


@dataclass(frozen=True, eq=False)
class RouteRequest:
    """One request to be placed."""

    isl: int
    """Prompt length in tokens."""
    keys: NDArray[np.uint64] = field(default_factory=lambda: NO_KEYS)
    """Chained keys of the prompt's full blocks, salted with the LoRA adapter; empty if prefixes don't matter."""
    lora: str = ""
    worker_id: str = ""
    """The worker that must take it, whatever it costs and however busy it is; empty for any."""
    exclude: frozenset[str] = frozenset()
    """Worker ids that must not take it, for one that has failed there."""
    overlap_weight: float | None = None
    """In place of the settings' factor before the prefill term."""
    temperature: float | None = None
    expected_output_tokens: int = 0
    """0 for unknown."""
    track: bool = True
    """False: the books don't keep the request, so nothing has to be freed."""
    priority: int = 0
    """For the queue before placement; cost and choice don't depend on it."""


class Timing(NamedTuple):
    """How long the parts of a decision took, in seconds."""

    match_s: float = 0.0
    """The prompt in the index, and what is believed of it."""
    choice_s: float = 0.0
    """Who may take it, loads, costs and the choice among them."""
    books_s: float = 0.0


@dataclass(frozen=True)
class Decision:
    """Where a request goes."""

    ticket: int
    """For `prefill_done`, `output_tokens` and `free`; UNTRACKED if there is nothing to free."""
    worker: WorkerRecord
    dp_rank: int
    slot: int
    """The worker's slot in the index."""
    overlap: tuple[int, int, int]
    """Leading blocks found on its device, in its host memory, in its storage."""
    cached_tokens: int
    non_cached_tokens: int
    """What must be computed; never 0, since vLLM computes the last prompt token again."""
    terms: tuple[Terms, ...]
    """Of all candidates; only from `peek`."""
    timing: Timing = field(default=Timing(), compare=False)

    @property
    def named_rank(self) -> int | None:
        """The rank that the worker is to be told; None where it has one only, or where its ranks are not known."""
        return self.dp_rank if len(self.worker.event_sources) > 1 else None


@dataclass(frozen=True)
class WorkerLoad:
    """What the books hold for one rank of a worker."""

    worker_id: str
    dp_rank: int
    active_requests: int
    active_prefill_tokens: int
    active_blocks: float
    total_blocks: int
    busy: bool
