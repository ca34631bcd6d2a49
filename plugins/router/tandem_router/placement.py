# SPDX-License-Identifier: Apache-2.0
"""Places requests on the workers of one pool: who may take a request, what it would cost there, who gets it.

Decisions are pure but for the pool's own books, which take effect at once: the next decision sees the load and the prefix of
this one before any event or metric comes back. Decode workers are placed like others, their prefill term counting what they
would have to pull or compute; if the prompt is prefilled remotely, call `prefill_done` for the decode ticket at once.
Not thread-safe: one event loop calls it.
"""

import itertools
import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tandem_protocol.errors import ConfigError, RequestError, UnavailableError
from tandem_protocol.roles import Role
from tandem_protocol.workers import WorkerRecord
from tandem_router.approximate import Beliefs
from tandem_router.book_events import Publisher, publish_nothing
from tandem_router.books import Books, PlacedPrompt
from tandem_router.busy import BusyThresholds, busy
from tandem_router.choice import Field, choose
from tandem_router.config import RouterMode, RouterSettings
from tandem_router.cost import Costs, Loads, Prompt, Terms, Weights, costs, explain
from tandem_router.pool import Refusal, form_pool
from tandem_router.routes import UNTRACKED, Decision, PrefixIndex, PrefixOverlap, RouteRequest, Timing, WorkerLoad

__all__ = ["UNTRACKED", "Decision", "Placement", "PrefixIndex", "PrefixOverlap", "RouteRequest", "WorkerLoad"]


@dataclass(frozen=True)
class _Candidates:
    """Those who may take a request, with all that the choice needs."""

    positions: NDArray[np.int64]
    loads: Loads
    hits: NDArray[np.int32]
    costs: Costs
    match_s: float
    """How long it took to find the hits."""


class Placement:
    """One pool of workers of one role over a shared index.

    With replica sync, `replica` names this start of this router (a restarted one is another, as with workers), `publish` takes
    the books' events to the others, and theirs go to `books.apply_remote`; ConfigError if the name is missing.
    Slots are taken from the index by `set_workers`: call it again after a snapshot was loaded into the index.
    """

    def __init__(self, settings: RouterSettings, role: Role, index: PrefixIndex, clock: Callable[[], float] = time.monotonic,
                 rng: random.Random | None = None, *, replica: str = "", publish: Publisher = publish_nothing) -> None:
        if settings.router_replica_sync and not replica:
            raise ConfigError("DYN_ROUTER_REPLICA_SYNC needs a name for this router: without one, replicas would ignore each other")
        self.thresholds = BusyThresholds.of(settings)
        """May be replaced at any time."""
        self.books = Books(pool=role.value, replica=replica, assume_kv_reuse=settings.router_assume_kv_reuse,
                           track_output=settings.router_track_output_blocks, publish=publish)
        self.beliefs = _beliefs(settings, clock)
        self._settings, self._role, self._index, self._clock = settings, role, index, clock
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._weights = Weights.of(settings)
        self._tickets = itertools.count(1)
        self._decisions = itertools.count(1)
        self._known: dict[str, WorkerRecord] = {}
        self._down: dict[str, float] = {}
        self._last_chosen = np.zeros(0, np.int64)
        self._block_size = settings.kv_cache_block_size
        self._pool = form_pool((), self._block_size, self._place)

    @property
    def block_size(self) -> int:
        """Tokens per block of the keys that requests must bring; 0 before the first worker if the settings leave it open."""
        return self._block_size

    @property
    def workers(self) -> tuple[WorkerRecord, ...]:
        """Workers that take part in placement now, except for those marked down."""
        return tuple(record for worker_id, record in self._pool.workers.items() if worker_id not in self._down)

    def set_workers(self, records: Sequence[WorkerRecord]) -> tuple[Refusal, ...]:
        """Takes the fleet as it is now; only placeable workers of the pool's role take part.

        A worker that is absent is gone, with its requests and beliefs; one that drains or sleeps keeps them. Returns
        those refused, with the reason.
        """
        fleet = {record.id: record for record in records if record.role is self._role}
        for worker_id in self._known.keys() - fleet.keys():
            self._forget(worker_id)
        for worker_id, record in fleet.items():
            if self._known.get(worker_id) != record:
                self._down.pop(worker_id, None)
        self._known = fleet
        if not self._block_size and fleet:
            self._block_size = next(iter(fleet.values())).block_size
        self._pool = form_pool(tuple(fleet.values()), self._block_size, self._place)
        return self._pool.refused

    def mark_down(self, worker_id: str, for_s: float | None = None) -> None:
        """A stream of the worker broke: it gets nothing for `for_s` seconds (unset: the settings' time), or until its record changes."""
        if worker_id in self._known:
            self._down[worker_id] = self._clock() + (self._settings.down_s if for_s is None else for_s)

    def choose(self, request: RouteRequest) -> Decision:
        """Places a request; the books and beliefs know it at once.

        RequestError if it names a worker or adapter that the pool doesn't have; UnavailableError if nobody can take it now.
        """
        return self._decide(request, book=True)

    def peek(self, request: RouteRequest) -> Decision:
        """The decision that `choose` would make, with the terms of all candidates; changes nothing. Errors as in `choose`."""
        return self._decide(request, book=False)

    def prefill_done(self, ticket: int) -> bool:
        """The first token came, or the prompt is computed elsewhere; false if that was known or the ticket is over."""
        return self.books.prefill_done(ticket)

    def output_tokens(self, ticket: int, tokens: int) -> bool:
        """So many more tokens were generated; false if output isn't tracked or the ticket is over."""
        return self.books.output(ticket, tokens)

    def free(self, ticket: int) -> bool:
        """The request is over, however it ended; safe to repeat."""
        return self.books.free(ticket)

    def loads(self) -> tuple[WorkerLoad, ...]:
        """What is in flight on each rank, for metrics."""
        pool = self._pool
        loads = self.books.loads(pool.columns)
        occupied = busy(self.thresholds, loads, pool.capacities)
        return tuple(
            WorkerLoad(worker_id, rank, int(loads.requests[at]), int(loads.prefill_tokens[at]), float(loads.blocks[at]),
                       int(pool.capacities.total_blocks[at]), bool(occupied[at]))
            for at, (worker_id, rank) in enumerate(pool.names)
        )

    def _decide(self, request: RouteRequest, *, book: bool) -> Decision:
        started = time.perf_counter()
        found = self._candidates(request)
        chosen = self._choose(request, found)
        position = int(found.positions[chosen])
        hits = found.hits[:, chosen].tolist()
        cached = self._cached_tokens(sum(hits), request.isl)
        known = time.perf_counter()
        ticket = self._book(request, position, request.isl - cached) if book else UNTRACKED
        timing = Timing(found.match_s, known - started - found.match_s, time.perf_counter() - known)
        return Decision(
            ticket=ticket, worker=self._pool.records[position], dp_rank=self._pool.names[position][1], slot=int(self._pool.slots[position]),
            overlap=(hits[0], hits[1], hits[2]), cached_tokens=cached, non_cached_tokens=request.isl - cached,
            terms=() if book else self._explain(found, chosen), timing=timing,
        )

    def _choose(self, request: RouteRequest, found: _Candidates) -> int:
        mode = self._settings.router_mode
        if request.worker_id and mode is RouterMode.DIRECT:
            mode = RouterMode.KV  # among the named worker's ranks
        if len(found.positions) == 1 and mode is not RouterMode.DIRECT:
            return 0
        last_chosen = self._last_chosen[self._pool.columns[found.positions]]
        temperature = self._settings.router_temperature if request.temperature is None else request.temperature
        candidates = Field(found.costs.total, found.loads.requests, found.loads.blocks, last_chosen)
        return choose(mode, candidates, temperature, self._rng)

    def _candidates(self, request: RouteRequest) -> _Candidates:
        positions = self._eligible(request)
        columns = self._pool.columns[positions]
        loads = self.books.loads(columns)
        started = time.perf_counter()
        hits, believed = self._hits(request.keys, positions)
        match_s = time.perf_counter() - started
        prompt = Prompt(request.isl, self._block_size, hits, self.books.shared(request.keys, columns), believed)
        return _Candidates(positions, loads, hits, costs(self._weights_for(request), loads, prompt), match_s)

    def _hits(self, keys: NDArray[np.uint64], positions: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Hits per tier, shape (3, candidates), and those on the device that are only believed, shape (candidates,)."""
        hits = np.zeros((3, len(positions)), np.int32)
        if not len(keys):
            return hits, hits[0]
        if self._settings.kv_events:
            hits = self._index.match(keys).blocks[:, self._pool.slots[positions]]
        believed = np.maximum(self.beliefs.match(keys, self._pool.columns[positions]) - hits.sum(axis=0, dtype=np.int32), 0)
        hits[0] += believed
        return hits, believed

    def _weights_for(self, request: RouteRequest) -> Weights:
        if request.overlap_weight is None:
            return self._weights
        return self._weights.with_prefill_scale(request.overlap_weight)

    def _eligible(self, request: RouteRequest) -> NDArray[np.int64]:
        """Positions in the pool of those who may take the request; raises if there are none."""
        self._raise_downs()
        if not self._pool.names:
            raise UnavailableError(self._nobody())
        positions = self._pool.everyone
        if request.lora:
            positions = self._with_lora(request.lora)
        if request.worker_id:
            return self._pinned(request, positions)
        if request.exclude or self._down:
            positions = self._pool.without(positions, request.exclude | self._down.keys())
        if not len(positions):
            raise UnavailableError(f"no {self._role} worker is left that could take the request: {self._absent(request.exclude)}; "
                                   "retry later or start another worker")
        return self._free_of(positions) if self.thresholds.any_set else positions

    def _with_lora(self, lora: str) -> NDArray[np.int64]:
        """Of prefill workers none is needed: the decode worker, which has the adapter, computes the prompt by itself."""
        try:
            return self._pool.with_lora(lora)
        except RequestError as exc:
            if self._role is Role.PREFILL:
                raise UnavailableError(str(exc)) from exc
            raise

    def _pinned(self, request: RouteRequest, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        worker_id = request.worker_id
        if worker_id not in self._pool.workers:
            known = ", ".join(sorted(self._pool.workers))
            raise RequestError(f"worker {worker_id!r} is not among the {self._role} workers: known are {known}")
        if worker_id in request.exclude or worker_id in self._down:
            raise UnavailableError(f"worker {worker_id!r} is down: retry later, or name no worker")
        own = self._pool.of_worker(positions, worker_id)
        if not len(own):
            raise RequestError(f"worker {worker_id!r} does not have the LoRA adapter {request.lora!r}: load it there, or name no worker")
        return own

    def _free_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        occupied = busy(self.thresholds, self.books.loads(self._pool.columns[positions]), self._pool.capacities.at(positions))
        if occupied.all():
            raise UnavailableError(f"all workers are busy: every {self._role} worker is beyond {self.thresholds}; "
                                   "retry later, add workers or raise the threshold")
        return positions[~occupied]

    def _book(self, request: RouteRequest, position: int, prefill_tokens: int) -> int:
        column = int(self._pool.columns[position])
        self._last_chosen[column] = next(self._decisions)
        self.beliefs.believe(column, request.keys)
        if not request.track:
            return UNTRACKED
        ticket = next(self._tickets)
        worker_id, rank = self._pool.names[position]
        prompt = PlacedPrompt(request.keys, request.isl, self._block_size, prefill_tokens, request.expected_output_tokens)
        self.books.add(ticket, worker_id, rank, prompt)
        return ticket

    def _cached_tokens(self, blocks: int, isl: int) -> int:
        """vLLM computes at least the last prompt token, and so its whole block, even if it has it."""
        size = self._block_size
        return max(0, min(blocks * size, (isl - 1) // size * size))

    def _explain(self, found: _Candidates, chosen: int) -> tuple[Terms, ...]:
        return explain([self._pool.names[at] for at in found.positions.tolist()], found.costs, found.loads, found.hits, chosen)

    def _place(self, worker_id: str, dp_rank: int) -> tuple[int, int]:
        """Column in the books and slot in the index."""
        column = self.books.register(worker_id, dp_rank)
        if column >= len(self._last_chosen):
            self._last_chosen = np.append(self._last_chosen, np.zeros(column + 1 - len(self._last_chosen), np.int64))
        return column, self._index.add_worker(worker_id, dp_rank)

    def _forget(self, worker_id: str) -> None:
        for column in self.books.columns_of(worker_id):
            self.beliefs.remove(column)
            self._last_chosen[column] = 0
        self.books.forget_worker(worker_id)
        self._index.remove_worker(worker_id)
        self._down.pop(worker_id, None)

    def _raise_downs(self) -> None:
        if self._down:
            now = self._clock()
            self._down = {worker_id: until for worker_id, until in self._down.items() if until > now}

    def _nobody(self) -> str:
        if not self._known:
            return f"no {self._role} worker is registered: start one, or look at discovery with `tandem status`"
        states = ", ".join(f"{worker_id} {self._pool.why_not(record)}" for worker_id, record in sorted(self._known.items()))
        return f"no {self._role} worker takes requests ({states}): retry later, or wake or start one"

    def _absent(self, exclude: Collection[str]) -> str:
        down, tried = sorted(self._down), sorted(set(exclude) & set(self._pool.workers))
        return f"down are {', '.join(down) or 'none'}, excluded are {', '.join(tried) or 'none'}"


def _beliefs(settings: RouterSettings, clock: Callable[[], float]) -> Beliefs:
    ttl_s = settings.router_predicted_ttl_secs if settings.kv_events else settings.router_ttl
    return Beliefs(ttl_s=ttl_s, max_blocks=settings.router_max_tree_size, prune_ratio=settings.router_prune_target_ratio, clock=clock)
