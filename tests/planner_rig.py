# SPDX-License-Identifier: Apache-2.0
"""An engine by formula, its profile, and a fleet of such engines in closed loop with a planner: for the planner's unit tests."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tandem_planner.plan import Planner
from tandem_planner.profile_data import DecodePoints, PrefillPoints, Profile
from tandem_planner.queueing import Queue
from tandem_planner.terms import Decision, Latency, Observation, Pool, Traffic, WorkerLoad
from tandem_protocol.roles import Role


@dataclass(frozen=True)
class Engine:
    """Prefill at a rate after a fixed time; decode steps that grow with requests and with KV tokens read."""

    first_ms: float = 20.0
    tokens_per_ms: float = 40.0
    step_ms: float = 5.0
    per_request_ms: float = 0.02
    per_kv_ms: float = 6.0
    """At a full KV cache."""
    max_kv_tokens: float = 1_000_000.0

    def ttft_ms(self, isl: float) -> float:
        """Of one prompt alone."""
        return self.first_ms + isl / self.tokens_per_ms

    def itl_ms(self, use: float, context: float) -> float:
        """At a KV use (0 to 1)."""
        return self.step_ms + self.per_request_ms * use * self.max_kv_tokens / context + self.per_kv_ms * use

    def profile(self, points: int = 16, loads: int = 6) -> Profile:
        """As a profiler would measure it."""
        isl = np.linspace(100, 16_000, points)
        ttft = np.array([self.ttft_ms(one) for one in isl])
        grid = [(use, context) for context in (500.0, 1500.0, 3000.0, 6000.0, 12_000.0) for use in np.linspace(0.02, 0.95, loads)]
        use, context = (np.array(column) for column in zip(*grid, strict=True))
        itl = np.array([self.itl_ms(*one) for one in grid])
        rate = use * self.max_kv_tokens / context / itl * 1e3
        return Profile(PrefillPoints(isl, ttft, isl / ttft * 1e3), DecodePoints(use, context, itl, rate, self.max_kv_tokens))


def latency(mean_s: float, tail: float = 1.0) -> Latency:
    """A distribution whose upper quantiles are `tail` times the mean."""
    return Latency(mean_s, mean_s, mean_s * tail, mean_s * tail)


def steady(rate: float, isl: float = 3000.0, osl: float = 300.0, interval_s: float = 60.0, ttft_s: float = 0.1,
           itl_s: float = 0.009) -> Traffic:
    """One interval of a steady load."""
    return Traffic(interval_s, rate * interval_s, isl, osl, latency(ttft_s), latency(itl_s), ttft_s + osl * itl_s)


def pools(prefill: int, decode: int, queued: float = 0.0, kv_use: float = 0.0) -> dict[Role, Pool]:
    """Settled pools whose workers are all equally loaded."""
    return {
        Role.PREFILL: Pool(prefill, prefill, tuple(WorkerLoad(f"p{at}", queued_prefill_tokens=queued) for at in range(prefill))),
        Role.DECODE: Pool(decode, decode, tuple(WorkerLoad(f"d{at}", kv_use=kv_use) for at in range(decode))),
    }


@dataclass
class Fleet:
    """Engines that follow the planner at once, with noise of a chosen size, in steps of the load interval."""

    planner: Planner
    engine: Engine
    prefill: int = 1
    decode: int = 1
    isl: float = 3000.0
    osl: float = 300.0
    interval_s: float = 60.0
    step_s: float = 5.0
    slower: float = 1.0
    """Than the profile says."""
    noise: float = 0.0
    variability: float = 1.0
    """Of its queues; 0.5: prompts are all equal."""
    at_s: float = 0.0
    backlog: float = 0.0
    """Prompt tokens not computed in time, over all prefill engines."""
    seed: int = 0
    decisions: list[Decision] = field(default_factory=list)
    counts: list[tuple[int, int]] = field(default_factory=list)

    def run(self, rate: Callable[[float], float], seconds: float) -> None:
        """Calls the planner at each step; traffic is told once per interval."""
        rng = np.random.default_rng(self.seed)
        end, seen = self.at_s + seconds, 0.0
        while self.at_s < end:
            self.at_s += self.step_s
            now = max(0.0, rate(self.at_s) * (1 + self.noise * float(rng.standard_normal())))
            seen += now * self.step_s
            traffic = None
            if self.at_s % self.interval_s < self.step_s / 2 and seen > 0:
                traffic, seen = self._traffic(seen / self.interval_s), 0.0
            self._decide(self._pools(now), traffic)

    @property
    def changes(self) -> int:
        """Times at which the fleet turned from growing to shrinking or back, over both pools."""
        return sum(_turns([pair[at] for pair in self.counts]) for at in (0, 1))

    def _decide(self, seen: dict[Role, Pool], traffic: Traffic | None) -> None:
        decision = self.planner.decide(Observation(self.at_s, seen, traffic))
        self.decisions.append(decision)
        self.prefill, self.decode = decision.target.get(Role.PREFILL, self.prefill), decision.target.get(Role.DECODE, self.decode)
        self.counts.append((self.prefill, self.decode))

    def _service_s(self) -> float:
        return self.engine.ttft_ms(self.isl) / 1e3 * self.slower

    def _itl_s(self, rate: float) -> tuple[float, float]:
        """ITL and KV use at a rate, by fixed point."""
        context, itl = self.isl + self.osl / 2, self.engine.step_ms / 1e3
        for _ in range(50):
            use = min(1.0, rate * self.osl * itl * context / max(1, self.decode) / self.engine.max_kv_tokens)
            itl = self.engine.itl_ms(use, context) / 1e3 * self.slower
        return itl, use

    def _pools(self, rate: float) -> dict[Role, Pool]:
        capacity = self.prefill * self.isl / self._service_s()
        self.backlog = max(0.0, self.backlog + (rate * self.isl - capacity) * self.step_s)
        waiting = Queue(rate, self._service_s(), self.variability).wait_s(self.prefill, None)
        queued = self.backlog / max(1, self.prefill) + (waiting if math.isfinite(waiting) else 0.0) * self.isl / self._service_s()
        return pools(self.prefill, self.decode, queued, self._itl_s(rate)[1])

    def _traffic(self, rate: float) -> Traffic:
        queue = Queue(rate, self._service_s(), self.variability)
        mean, tail = (min(60.0, self._service_s() + queue.wait_s(self.prefill, one)) for one in (None, 0.95))
        itl = self._itl_s(rate)[0]
        ttft, request_s = Latency(mean, mean, tail, tail), mean + self.osl * itl
        return Traffic(self.interval_s, rate * self.interval_s, self.isl, self.osl, ttft, latency(itl), request_s)


def _turns(counts: list[int]) -> int:
    moves = [after - before for before, after in itertools.pairwise(counts) if after != before]
    return sum(1 for before, after in itertools.pairwise(moves) if before * after < 0)
