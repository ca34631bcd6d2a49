# SPDX-License-Identifier: Apache-2.0
"""The two things that a simulated worker does: prompts in batches, first come first served, and decoding of many requests at once.

A decoding request gets one token per step, all requests of a worker in the same step. So a worker counts its steps, a request ends at
a count that is known when it joins, and time passes by leaps from one end or arrival to the next. The time of a step follows the KV
cache's growth every few steps. KV cache is reserved for a request's whole length: no preemption.
"""

import heapq
import math
from collections import deque

from tandem_planner.simulate.requests import SimRequest
from tandem_planner.simulate.times import DecodeTimes, PrefillTimes

_REFRESH_STEPS = 16
"""For so many steps the time of one is taken as constant: the KV cache grows by a percent or less meanwhile."""
_ROUNDING = 1e-6
"""In steps."""


class PrefillLane:
    """Prompts of one worker: a queue, and the batch that is being computed."""

    def __init__(self, times: PrefillTimes, max_batched_tokens: int) -> None:
        self._times, self._limit = times, max_batched_tokens
        self.queue: deque[SimRequest] = deque()
        self.batch: list[SimRequest] = []
        self.ends_at = math.inf
        self.queued_tokens = 0
        """To be computed, the batch included."""
        self.step_s = 0.0
        """Of the batch: what one engine step of it takes by itself."""

    def push(self, request: SimRequest) -> None:
        """Puts a request at the end of the queue."""
        self.queue.append(request)
        self.queued_tokens += request.input_tokens - request.cached_tokens

    def begin(self, now: float, batch: list[SimRequest], decode_step_s: float = 0.0) -> None:
        """Computes requests taken from the queue, each of whose steps also takes `decode_step_s` for what decodes beside it."""
        tokens = sum(request.input_tokens - request.cached_tokens for request in batch)
        steps = max(1, -(-tokens // self._limit))
        seconds = sum(map(self._seconds, batch)) - (len(batch) - 1) * self._times.step_s
        self.batch, self.step_s = batch, seconds / steps
        self.ends_at = now + seconds + steps * decode_step_s

    def room_beside(self, batch: list[SimRequest]) -> bool:
        """Whether the first request of the queue fits into a step with these."""
        if not self.queue:
            return False
        tokens = sum(request.input_tokens - request.cached_tokens for request in batch)
        return not batch or tokens + self.queue[0].input_tokens - self.queue[0].cached_tokens <= self._limit

    def finish(self) -> list[SimRequest]:
        """Ends the batch; returns its requests."""
        done, self.batch, self.ends_at, self.step_s = self.batch, [], math.inf, 0.0
        self.queued_tokens -= sum(request.input_tokens - request.cached_tokens for request in done)
        return done

    def _seconds(self, request: SimRequest) -> float:
        """Of this prompt alone: what its length takes less what its cached part would have taken."""
        if not request.cached_tokens:
            return self._times.of(request.input_tokens)
        saved = self._times.of(request.cached_tokens) - self._times.step_s
        return max(self._times.step_s, self._times.of(request.input_tokens) - saved)


class DecodeBatch:
    """The requests that one worker decodes, and those that wait for KV cache."""

    def __init__(self, times: DecodeTimes, max_kv_tokens: int, max_seqs: int) -> None:
        self._times, self._max_kv, self._max_seqs = times, max_kv_tokens, max_seqs
        self._ends: list[tuple[float, int, SimRequest]] = []
        self.waiting: deque[SimRequest] = deque()
        self.reserved_tokens = 0
        self._held = 0
        self._steps, self._kv, self._updated = 0.0, 0.0, 0.0
        self.step_s, self._refresh_at = math.inf, math.inf
        self.extra_s = 0.0
        """What each step takes on top: the chunk of a prompt in it."""

    @property
    def running(self) -> int:
        """Requests that get tokens."""
        return len(self._ends)

    @property
    def kv_use(self) -> float:
        """Of the KV cache, 0 to 1, at the last `advance`."""
        return self._kv / self._max_kv

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits here."""
        return not self._ends and not self.waiting and not self._held

    def plain_step_s(self) -> float:
        """Seconds of a step without prompts beside it; 0 when nothing decodes."""
        return self._times.of(self.kv_use, self._kv / len(self._ends)) if self._ends else 0.0

    def reserve(self, request: SimRequest) -> bool:
        """Takes KV cache for its whole length, if there is enough."""
        if self._held + 1 > self._max_seqs or self.reserved_tokens + request.kv_tokens > self._max_kv:
            return False
        self.reserved_tokens += request.kv_tokens
        self._held += 1
        return True

    def advance(self, now: float) -> None:
        """Lets time pass."""
        if self._ends:
            steps = (now - self._updated) / self.step_s
            self._steps += steps
            self._kv += steps * len(self._ends)
        self._updated = now

    def finished(self, now: float) -> list[SimRequest]:
        """Takes out the requests that have all their tokens."""
        done = []
        while self._ends and self._ends[0][0] <= self._steps + _ROUNDING:
            request = heapq.heappop(self._ends)[2]
            self._release(request, request.kv_tokens)
            request.end_s, request.first_s = now, min(request.first_s, now)  # the step was shorter than foreseen
            done.append(request)
        if not self._ends:
            self._kv = 0.0
        return done

    def join(self, request: SimRequest, steps: int) -> None:
        """Lets a request that has reserved decode for so many steps from now."""
        heapq.heappush(self._ends, (self._steps + steps, request.number, request))
        self._kv += request.input_tokens

    def end_at_once(self, request: SimRequest) -> None:
        """Gives back what a request reserved that needs no step."""
        self._release(request, 0)

    def admit(self) -> list[SimRequest]:
        """Lets waiting requests decode, in order, as far as the KV cache goes; returns them."""
        admitted = []
        while self.waiting and self.reserve(self.waiting[0]):
            request = self.waiting.popleft()
            self.join(request, request.output_tokens)
            admitted.append(request)
        return admitted

    def refresh(self) -> None:
        """Takes the time of a step anew. After every change of the batch, with the time advanced to now."""
        if self._ends:
            self.step_s = self.plain_step_s() + self.extra_s
            self._refresh_at = self._updated + self.step_s * _REFRESH_STEPS
        else:
            self._refresh_at = math.inf

    def next_event(self) -> float:
        """When a request ends or the time of a step should be taken anew."""
        if not self._ends:
            return math.inf
        return min(self._updated + max(0.0, self._ends[0][0] - self._steps) * self.step_s, self._refresh_at)

    def check_integrity(self) -> None:
        """Raises AssertionError when the sums are not those of the requests."""
        assert self._held >= len(self._ends)
        assert 0 <= self.reserved_tokens <= self._max_kv
        assert self._kv >= -_ROUNDING * self._max_kv

    def _release(self, request: SimRequest, grown_tokens: int) -> None:
        self.reserved_tokens -= request.kv_tokens
        self._held -= 1
        self._kv = max(0.0, self._kv - grown_tokens)
