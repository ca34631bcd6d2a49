# SPDX-License-Identifier: Apache-2.0
"""What the worker knows of its engine's load, read off the statistics that vLLM hands out every step."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tandem_protocol.errors import RequestError
from tandem_worker.speculation import Acceptance, padded

_SMOOTHING = 0.1
_IDLE_S = 1.0
_QUEUE_WEIGHT = 6.0
_FULL_HALF = 0.5
"""A request that waits weighs the more the fuller the KV cache is beyond its half: there queues shrink slowly. vLLM's own figures."""


@dataclass
class EngineLoad:
    """The latest figures of one data-parallel rank; written by the event loop, read by anyone (single attributes, no lock needed)."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    step_s: float = 0.0
    steps: int = 0
    """Steps that the engine has told of since its start: its pulse."""
    in_engine: int = 0
    """Requests that were, or are being, handed to the engine and have not ended; counted by whoever hands them over."""
    acceptance: Acceptance = field(default_factory=Acceptance)
    now: Callable[[], float] = time.monotonic
    _last_step: float = field(default=0.0, repr=False)

    def record(self, scheduler_stats: Any | None, generated_tokens: int, begun: int = 0, computed: int = 0) -> None:
        """Takes one engine step's statistics; a step that generated tokens also updates the step time.

        `begun` requests got their first token in it, for which `computed` prompt tokens were computed.
        """
        self.steps += 1
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.waiting = scheduler_stats.num_waiting_reqs
            self.kv_usage = scheduler_stats.kv_cache_usage
            if (guesses := scheduler_stats.spec_decoding_stats) is not None:
                refused = guesses.num_drafts - guesses.num_accepted_tokens_per_pos[0]
                self.acceptance.record(guesses.num_drafts - padded(refused, begun, computed), guesses.num_accepted_tokens)
        if generated_tokens > 0:
            self._record_step()

    def _record_step(self) -> None:
        now = self.now()
        elapsed = now - self._last_step
        self._last_step = now
        if 0 < elapsed < _IDLE_S:
            self.step_s = elapsed if self.step_s == 0 else (1 - _SMOOTHING) * self.step_s + _SMOOTHING * elapsed

    @property
    def pressure(self) -> float:
        """What another request would find here; the rank with the least gets it. As vLLM weighs its ranks, by our own exact count."""
        return self.in_engine + self.waiting * _QUEUE_WEIGHT * max(0.0, self.kv_usage - _FULL_HALF)


class EngineLoads:
    """The loads of all data-parallel ranks that an engine serves here, each with a scheduler of its own; mostly there is one."""

    def __init__(self) -> None:
        self._by_rank: dict[int, EngineLoad] = {}
        self.asleep = False
        """The engine was told to pause, so that work in it says nothing of its health."""

    def of(self, dp_rank: int) -> EngineLoad:
        """That rank's; known from then on. Ranks count over the whole deployment, so the first one here need not be 0."""
        return self._by_rank.setdefault(dp_rank, EngineLoad())

    @property
    def by_rank(self) -> Mapping[int, EngineLoad]:
        """In the order of the ranks."""
        return dict(sorted((self._by_rank or {0: self.of(0)}).items()))

    @property
    def running(self) -> int:
        """Requests in the latest steps."""
        return sum(load.running for load in self._by_rank.values())

    @property
    def waiting(self) -> int:
        """Requests that the latest steps left out."""
        return sum(load.waiting for load in self._by_rank.values())

    @property
    def kv_usage(self) -> float:
        """Used share of all ranks' KV blocks; the ranks have equally many."""
        return sum(load.kv_usage for load in self._by_rank.values()) / max(len(self._by_rank), 1)

    @property
    def step_s(self) -> float:
        """The slowest rank's."""
        return max((load.step_s for load in self._by_rank.values()), default=0.0)

    def choose(self, wanted: int | None) -> tuple[int, int]:
        """The rank that serves the next request, and its place among those here: `wanted`, else the one with the least pressure.

        One rank for the whole request: its sequences share the prompt's blocks, and a handoff is pulled where they are generated.
        Raises RequestError for a rank that is not here.
        """
        loads = self.by_rank
        ranks = list(loads)
        if wanted is None:
            wanted = min(ranks, key=lambda rank: loads[rank].pressure)
        if wanted not in loads:
            known = f"its ranks are {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"its only rank is {ranks[0]}"
            raise RequestError(f"data_parallel_rank {wanted} is not served by this worker: {known}")
        return wanted, ranks.index(wanted)
