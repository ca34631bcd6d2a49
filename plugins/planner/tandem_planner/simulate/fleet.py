# SPDX-License-Identifier: Apache-2.0
"""A fleet in virtual time: arrivals are placed on the least burdened worker, prompts go on to decode workers, pools grow and shrink.

A prompt never changes the worker that it waits at, as with Tandem's router. A new worker takes its time to start and costs from the
beginning; one that leaves takes nothing new and goes when it is idle.
"""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from tandem_planner.simulate.load import Load
from tandem_planner.simulate.requests import SimRequest
from tandem_planner.simulate.times import EngineTimes
from tandem_planner.simulate.workers import EngineLimits, Life, Outcome, SimWorker
from tandem_planner.terms import Mode, Pool
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role


@dataclass(frozen=True)
class FleetSettings:
    """What a fleet is like. All made up but for the engine's own times."""

    mode: Mode = Mode.DISAGGREGATED
    limits: EngineLimits = field(default_factory=EngineLimits)
    start_s: float = 60.0
    """From the decision until a worker takes requests."""
    transfer_s: float = 5e-3
    """Of KV blocks from prefill to decode: for each request, and"""
    transfer_token_s: float = 131_072 / 20e9
    """for each prompt token: 128 KiB at 20 GB/s."""
    gpus: Mapping[Role, int] = field(default_factory=lambda: dict.fromkeys(Role, 1))
    """GPUs per worker."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a fleet that can't answer anybody."""
        if self.mode not in (Mode.AGGREGATED, Mode.DISAGGREGATED):
            raise ConfigError(f"a fleet of mode {self.mode} answers nobody: simulate agg or disagg")
        if min(self.start_s, self.transfer_s, self.transfer_token_s) < 0:
            raise ConfigError("times of starting and transfer must not be negative")


@dataclass(frozen=True)
class Milestone:
    """Times of first tokens and ends, in the order in which they were known."""

    at_s: float
    request: SimRequest


class Fleet:
    """Workers, requests and a calendar. `check_integrity` holds between calls."""

    def __init__(self, times: EngineTimes, settings: FleetSettings, sizes: Mapping[Role, int]) -> None:
        self.now = 0.0
        self.settings = settings
        self._times = times
        self._numbers = itertools.count()
        self._workers: dict[Role, list[SimWorker]] = {role: [] for role in settings.mode.roles}
        self.wanted = dict.fromkeys(settings.mode.roles, 0)
        self._pending: dict[Role, deque[SimRequest]] = {role: deque() for role in settings.mode.roles}
        self._calendar: list[tuple[float, int, SimWorker | SimRequest]] = []
        self.gone: list[SimWorker] = []
        self.in_flight = 0
        self.arrived_s: list[float] = []
        """Of requests that weren't refused, in order."""
        self.firsts: list[Milestone] = []
        self.ends: list[Milestone] = []
        for role in settings.mode.roles:
            self.scale(role, sizes.get(role, 1), start_s=0.0)
        self._run_calendar(0.0)

    def pools(self) -> dict[Role, Pool]:
        """As a connector and the workers' metrics would say."""
        return {role: self._pool(role) for role in self._workers}

    def gpu_seconds(self) -> float:
        """Of all workers until now, from the decision to start them until they were gone."""
        workers = itertools.chain(self.gone, *self._workers.values())
        ends = ((worker, self.now if math.isnan(worker.ended_s) else worker.ended_s) for worker in workers)
        return sum((end - worker.started_s) * self.settings.gpus[worker.role] for worker, end in ends)

    def arrive(self, request: SimRequest) -> None:
        """Takes a request at `now`."""
        self.in_flight += 1
        if request.kv_tokens > self._times.max_kv_tokens:
            request.refused, request.end_s = True, self.now
            self._note(Outcome([], [], [request]))
        else:
            self.arrived_s.append(self.now)
            self._place(self.settings.mode.roles[0], request)

    def run_until(self, load: Load, requests: list[SimRequest], begin: int, until_s: float) -> int:
        """Lets time pass, requests from index `begin` on arriving meanwhile; returns the index of the next one."""
        while begin < len(load) and requests[begin].at_s <= until_s:
            request = requests[begin]
            self._run_calendar(request.at_s)
            self.arrive(request)
            begin += 1
        self._run_calendar(until_s)
        return begin

    def scale(self, role: Role, count: int, start_s: float | None = None) -> None:
        """Has a pool grow or shrink to so many workers."""
        self.wanted[role] = count
        staying = [worker for worker in self._workers[role] if worker.life in (Life.STARTING, Life.READY)]
        for _ in range(count - len(staying)):
            self._start(role, self.settings.start_s if start_s is None else start_s)
        # Those that are not of use yet go first, then the idlest; of equals the youngest.
        order = sorted(staying, key=lambda worker: (worker.life is Life.READY, worker.burden, -worker.number))
        for worker in order[: max(0, len(staying) - count)]:
            worker.life = Life.DRAINING
            self._leave_if_idle(worker)

    def check_integrity(self) -> None:
        """Raises AssertionError when a pool is not as large as it was told to be, or a worker's books are wrong."""
        for role, workers in self._workers.items():
            assert sum(worker.life in (Life.STARTING, Life.READY) for worker in workers) == self.wanted[role]
            for worker in workers:
                worker.check_integrity()
        assert self.in_flight >= 0

    def _start(self, role: Role, start_s: float) -> None:
        worker = SimWorker(next(self._numbers), role, self._times, self.settings.limits, self.now)
        self._workers[role].append(worker)
        worker.scheduled_s = self.now + start_s
        heapq.heappush(self._calendar, (worker.scheduled_s, next(self._numbers), worker))

    def _pool(self, role: Role) -> Pool:
        ready = [worker for worker in self._workers[role] if worker.life is Life.READY]
        return Pool(len(ready), self.wanted[role], tuple(worker.load() for worker in ready))

    def _run_calendar(self, until_s: float) -> None:
        while self._calendar and self._calendar[0][0] <= until_s:
            self.now, _, item = heapq.heappop(self._calendar)
            if isinstance(item, SimRequest):
                self._place(Role.DECODE, item)
            elif item.scheduled_s == self.now and item.life is not Life.GONE:
                self._wake(item)
        self.now = until_s

    def _wake(self, worker: SimWorker) -> None:
        worker.scheduled_s = math.inf
        if worker.life is Life.STARTING:
            worker.life = Life.READY
            pending, self._pending[worker.role] = self._pending[worker.role], deque()
            for request in pending:
                self._place(worker.role, request)
        else:
            self._after(worker, worker.step(self.now))

    def _place(self, role: Role, request: SimRequest) -> None:
        ready = [worker for worker in self._workers[role] if worker.life is Life.READY]
        if not ready:
            self._pending[role].append(request)
            return
        worker = min(ready, key=_burden) if len(ready) > 1 else ready[0]
        take = worker.decode if role is Role.DECODE else worker.prefill
        self._after(worker, take(request, self.now))

    def _after(self, worker: SimWorker, outcome: Outcome) -> None:
        for request in outcome.prefilled:
            seconds = self.settings.transfer_s + self.settings.transfer_token_s * request.input_tokens
            heapq.heappush(self._calendar, (self.now + seconds, next(self._numbers), request))
        self._note(outcome)
        due = worker.next_event()
        if due != worker.scheduled_s:
            worker.scheduled_s = due
            if due < math.inf:
                heapq.heappush(self._calendar, (due, next(self._numbers), worker))
        if worker.life is Life.DRAINING:
            self._leave_if_idle(worker)

    def _note(self, outcome: Outcome) -> None:
        self.firsts += [Milestone(self.now, request) for request in outcome.first]
        self.ends += [Milestone(self.now, request) for request in outcome.ended]
        self.in_flight -= len(outcome.ended)

    def _leave_if_idle(self, worker: SimWorker) -> None:
        if worker.idle:
            worker.life, worker.ended_s = Life.GONE, self.now
            self._workers[worker.role].remove(worker)
            self.gone.append(worker)


def _burden(worker: SimWorker) -> tuple[float, int]:
    return worker.burden, worker.number
