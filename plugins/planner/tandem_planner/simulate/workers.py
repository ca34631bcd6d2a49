# SPDX-License-Identifier: Apache-2.0
"""A simulated worker of any role, and its life: starting, ready, draining, gone."""

import math
from dataclasses import dataclass
from enum import StrEnum

from tandem_planner.simulate.lanes import DecodeBatch, PrefillLane
from tandem_planner.simulate.requests import SimRequest
from tandem_planner.simulate.times import EngineTimes
from tandem_planner.terms import WorkerLoad
from tandem_protocol.roles import Role


class Life(StrEnum):
    """Where a worker stands."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


@dataclass(frozen=True)
class EngineLimits:
    """What an engine takes at once; vLLM's names."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192


@dataclass
class Outcome:
    """What a step of time brought."""

    prefilled: list[SimRequest]
    """That decode elsewhere now."""
    first: list[SimRequest]
    """Whose first token came or is a step away."""
    ended: list[SimRequest]


class SimWorker:
    """One worker. Not thread-safe; time only goes forward."""

    def __init__(self, number: int, role: Role, times: EngineTimes, limits: EngineLimits, started_s: float) -> None:
        self.number, self.role = number, role
        self.life = Life.STARTING
        self.started_s, self.ended_s = started_s, math.nan
        self.scheduled_s = math.inf
        """Of its next event in the fleet's calendar."""
        self._prompts = PrefillLane(times.prefill, limits.max_num_batched_tokens) if role is not Role.DECODE else None
        max_kv = times.max_kv_tokens
        self._decode = DecodeBatch(times.decode, max_kv, limits.max_num_seqs) if role is not Role.PREFILL else None
        self._waiting_tokens = 0

    @property
    def idle(self) -> bool:
        """Whether it could leave without hurting a request."""
        prompts = self._prompts is None or not (self._prompts.queue or self._prompts.batch)
        return prompts and (self._decode is None or self._decode.idle)

    @property
    def burden(self) -> float:
        """Tokens ahead of a request that comes now; what placement compares within a role."""
        prompts = self._prompts.queued_tokens if self._prompts else 0
        return prompts + (self._decode.reserved_tokens + self._waiting_tokens if self._decode else 0)

    def load(self) -> WorkerLoad:
        """As its metrics would say."""
        queued = (len(self._prompts.queue) if self._prompts else 0) + (len(self._decode.waiting) if self._decode else 0)
        tokens = self._prompts.queued_tokens if self._prompts else 0
        return WorkerLoad(f"{self.role}-{self.number}", queued, tokens, self._decode.kv_use if self._decode else 0.0)

    def prefill(self, request: SimRequest, now: float) -> Outcome:
        """Takes a prompt."""
        assert self._prompts is not None
        self._prompts.push(request)
        return self.step(now)

    def decode(self, request: SimRequest, now: float) -> Outcome:
        """Takes a request whose prompt is computed."""
        assert self._decode is not None
        self._decode.waiting.append(request)
        self._waiting_tokens += request.kv_tokens
        return self.step(now)

    def step(self, now: float) -> Outcome:
        """Lets time pass until `now`."""
        outcome = Outcome([], [], [])
        batch = self._decode
        if batch is not None:
            batch.advance(now)
            outcome.ended += batch.finished(now)
        if self._prompts is not None:
            self._prompt_step(self._prompts, now, outcome)
        if batch is not None:
            admitted = batch.admit()
            self._waiting_tokens -= sum(request.kv_tokens for request in admitted)
            batch.refresh()
            for request in admitted:
                request.first_s = now + batch.step_s
            outcome.first += admitted
        return outcome

    def next_event(self) -> float:
        """When it has to be stepped, unless something comes before."""
        times = (self._prompts.ends_at if self._prompts else math.inf, self._decode.next_event() if self._decode else math.inf)
        return min(times)

    def check_integrity(self) -> None:
        """Raises AssertionError when its books are wrong."""
        if self._decode is not None:
            self._decode.check_integrity()
        assert self._prompts is None or self._prompts.queued_tokens >= 0

    def _prompt_step(self, prompts: PrefillLane, now: float, outcome: Outcome) -> None:
        if prompts.batch and prompts.ends_at <= now:
            done = prompts.finish()
            if self._decode is None:
                outcome.prefilled += done
            else:
                self._decode_here(self._decode, done, now, outcome)
        if not prompts.batch and prompts.queue:
            self._begin(prompts, now)
        if self._decode is not None:
            self._decode.extra_s = prompts.step_s

    @staticmethod
    def _decode_here(batch: DecodeBatch, done: list[SimRequest], now: float, outcome: Outcome) -> None:
        """The step that ends a prompt gives its first token."""
        for request in done:
            request.first_s = now
            outcome.first.append(request)
            if request.output_tokens > 1:
                batch.join(request, request.output_tokens - 1)
            else:
                batch.end_at_once(request)
                request.end_s = now
                outcome.ended.append(request)

    def _begin(self, prompts: PrefillLane, now: float) -> None:
        taken: list[SimRequest] = []
        while prompts.room_beside(taken) and (self._decode is None or self._decode.reserve(prompts.queue[0])):
            taken.append(prompts.queue.popleft())
        if taken:
            prompts.begin(now, taken, self._decode.plain_step_s() if self._decode else 0.0)
