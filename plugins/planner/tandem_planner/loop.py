# SPDX-License-Identifier: Apache-2.0
"""Look, decide, scale: one iteration (`step`), and the loop around it (`run`).

Each `load_s` the load of the workers is looked at, and each `adjustment_s` the traffic, too: an observation without traffic in between
says nothing of how much there was. Whatever can't be read, decided or done costs this iteration, is counted, and leaves the fleet as it is.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from tandem_planner.connectors.interface import Connector
from tandem_planner.metrics import PlannerMetrics, gpus_of
from tandem_planner.observe import Observer
from tandem_planner.rhythm import Rhythm, next_adjustment
from tandem_planner.scaling import Scaler
from tandem_planner.state_file import SavedState, write_state
from tandem_planner.terms import Decision, Observation, Pool
from tandem_protocol.errors import TandemError
from tandem_protocol.roles import Role

log = logging.getLogger(__name__)

_HOUR_S = 3600.0
_HOPELESS = 5
"""Iterations in a row that came to nothing, after which the planner is unwell."""


class Brain(Protocol):
    """What decides: `tandem_planner.brain.PlannerBrain`, or a smaller one in tests."""

    def decide(self, observation: Observation) -> Decision:
        """How many workers each role should have."""

    def save(self) -> bytes:
        """What it has learned."""


@dataclass
class Memory:
    """What outlives an iteration."""

    adjust_at_s: float
    """Unix time of the next look at the traffic."""
    adjusted_at_s: float
    """Of the last; that of the start if there was none."""
    gpu_hours: float = 0.0
    counted_at_s: float | None = None
    decision: Decision | None = None
    observation: Observation | None = None
    fruitless: int = 0
    """Iterations in a row without a decision."""


@dataclass(frozen=True)
class Parts:
    """What a loop is made of."""

    brain: Brain
    observer: Observer
    connector: Connector
    metrics: PlannerMetrics
    gpus: Mapping[Role, int] = field(default_factory=dict)
    """GPUs of one engine of each role."""
    state: Path | None = None


class PlannerLoop:
    """One planner. Used on one event loop; only the brain thinks on a thread, one thought at a time."""

    def __init__(self, parts: Parts, rhythm: Rhythm, saved: SavedState | None = None,
                 clock: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self._parts = parts
        self._rhythm = rhythm
        self._clock = clock
        now, last = clock(), saved.adjusted_at_s if saved is not None else None
        self.memory = Memory(next_adjustment(last, now, rhythm.adjustment_s), now, saved.gpu_hours if saved is not None else 0.0)
        self.scaler = Scaler(parts.connector, rhythm.retry_s, monotonic, parts.metrics.changed)
        self._thought: asyncio.Task[Decision] | None = None

    @property
    def well(self) -> bool:
        """Whether the last few iterations came to a decision."""
        return self.memory.decision is not None and self.memory.fruitless < _HOPELESS

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set. Iterations begin `load_s` apart, or when the last one ended."""
        await _wait(stop, self._rhythm.start_delay_s)
        while not stop.is_set():
            begun = time.monotonic()
            await self.step()
            await _wait(stop, max(0.0, self._rhythm.load_s - (time.monotonic() - begun)))

    async def step(self) -> Decision | None:
        """One iteration: None, and the fleet stays as it is, if it came to nothing. Raises nothing; bounded by `step_s`."""
        decision = None
        try:
            async with asyncio.timeout(self._rhythm.step_s):
                decision = await self._look_and_decide()
        except TimeoutError:
            self._fail("observation", f"it took more than {self._rhythm.step_s:g} s")
        self.memory.fruitless = 0 if decision is not None else self.memory.fruitless + 1
        return decision

    async def _look_and_decide(self) -> Decision | None:
        pools = await self._pools()
        if pools is None:
            return None
        observation = await self._observe(pools)
        decision = await self._decide(observation)
        if decision is None:
            return None
        await self.scaler.follow(decision.target, pools)
        if observation.traffic is not None:
            await self._save()
        return decision

    async def _pools(self) -> Mapping[Role, Pool] | None:
        try:
            pools = await self._parts.connector.pools()
        except TandemError as exc:
            self._fail("connector", str(exc))
            return None
        self._count_gpus(pools)
        under_way = self.scaler.under_way
        # Who holds the workers may show a change only when it is half done; a pool's `wanted` is what was last told.
        return {role: replace(pool, wanted=under_way.get(role, pool.wanted)) for role, pool in pools.items()}

    async def _observe(self, pools: Mapping[Role, Pool]) -> Observation:
        memory, now = self.memory, self._clock()
        at_traffic = now + self._rhythm.slack_s >= memory.adjust_at_s
        observation = await self._parts.observer.observe(pools, self._rhythm.adjustment_s if at_traffic else None)
        if at_traffic and (observation.traffic is not None or not observation.missing):
            # What could not be read is asked for again with the next look, not an interval later.
            memory.adjusted_at_s, memory.adjust_at_s = now, next_adjustment(now, now, self._rhythm.adjustment_s)
        self._tell(observation)
        self._parts.metrics.looked(observation, at_traffic=at_traffic)
        memory.observation = observation
        return observation

    def _tell(self, observation: Observation) -> None:
        """Logs what is missing when that changes, and counts it always."""
        last = self.memory.observation
        if observation.missing:
            self._parts.metrics.failed("observation")
        if observation.missing != (last.missing if last is not None else ()):
            for sentence in observation.missing:
                log.warning("planner.missing: %s", sentence)

    async def _decide(self, observation: Observation) -> Decision | None:
        """On a thread, since a prediction may take seconds. A thought that is given up ends before the next begins."""
        if self._thought is not None and not self._thought.done():
            self._fail("decision", "the last one is still being thought about")
            return None
        self._thought = asyncio.create_task(asyncio.to_thread(self._parts.brain.decide, observation))
        try:
            decision = await asyncio.shield(self._thought)
        except TandemError as exc:
            self._fail("decision", str(exc))
            return None
        except Exception as exc:  # a bug in deciding must not end what keeps the fleet: it stays as it is
            log.exception("planner.decision_bug")
            self._fail("decision", f"{type(exc).__name__}: {exc}")
            return None
        self._explain(decision)
        return decision

    def _explain(self, decision: Decision) -> None:
        last, self.memory.decision = self.memory.decision, decision
        self._parts.metrics.decided(decision)
        level = logging.DEBUG if last is not None and last.target == decision.target else logging.INFO
        log.log(level, "planner.decided %s: %s", " ".join(f"{role}={count}" for role, count in decision.target.items()), decision.reason)
        for term in decision.terms:
            log.log(level, "planner.term %s%s=%g: %s", f"{term.role}." if term.role else "", term.name, term.value, term.how)

    def _count_gpus(self, pools: Mapping[Role, Pool]) -> None:
        memory, now = self.memory, self._clock()
        if memory.counted_at_s is not None:
            memory.gpu_hours += gpus_of(pools, self._parts.gpus) * max(0.0, now - memory.counted_at_s) / _HOUR_S
        memory.counted_at_s = now
        self._parts.metrics.gpu_hours(memory.gpu_hours)

    async def _save(self) -> None:
        if self._parts.state is None:
            return
        state = SavedState(self.memory.adjusted_at_s, self._parts.brain.save(), self.memory.gpu_hours)
        try:
            await asyncio.to_thread(write_state, self._parts.state, state)
        except OSError as exc:
            self._fail("state", f"{self._parts.state} can't be written: {exc}")

    def _fail(self, what: str, reason: str) -> None:
        self._parts.metrics.failed(what)
        log.warning("planner.%s_failed reason=%s; the fleet stays as it is", what, reason)

    async def close(self) -> None:
        """Saves, cancels what is under way, and ends the connector's connections; the fleet stays as it is."""
        if self.memory.decision is not None:
            await self._save()
        await self.scaler.close()
        await self._parts.connector.close()


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    """Until `stop` is set or the time is over."""
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return
