# SPDX-License-Identifier: Apache-2.0
"""Tells an engine that hangs from one that is slow.

The pulse of an engine is its steps: vLLM hands out statistics after each, with or without tokens. Work without steps is suspicious,
but no proof: a long prompt on few cores, or a kernel that is being compiled, is one long step. Such a step uses processor time, a
hang does not. So the engine hangs when it had work and for `hang_timeout_s` neither stepped nor computed, or when one step took
longer than `step_timeout_s` whatever it did. On a GPU the engine's own processes spin while they wait for the device, so there only
the time of compilers counts (`stacks.engine_cpu_s`).

An engine whose work was taken back in mid-silence (a router that moved its streams, clients that gave up) is asked for one token: it
tells nothing by itself, and what it should have done is undone.

Each data-parallel rank is judged by itself: its neighbours' steps and computation say nothing of it.

Runs on the worker's event loop; its own lateness (a busy loop, a stub that was stopped) is not held against the engine.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tandem_worker.load import EngineLoad, EngineLoads

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
_LONGEST_LOOK_S = 2 * INTERVAL_S
"""What one look may add to a silence: if more time passed, it was we who slept."""
_COMPUTING_SHARE = 0.1
"""Of one core. Waiting processes of a CPU engine use 0.01 to 0.05 (`resting`); one that computes and is starved by 10 others, 0.1."""


@dataclass(frozen=True)
class Pulse:
    """One look at the engine: seconds on a monotonic clock, steps since its start, requests in it, and its processes' CPU seconds."""

    now: float
    steps: int
    in_engine: int
    cpu_s: float


class Heartbeat:
    """Judges one look after another; decides only, touches nothing."""

    def __init__(self, hang_timeout_s: float, step_timeout_s: float, name: str = "the engine") -> None:
        self._name = name
        self._hang_timeout_s = hang_timeout_s
        self._step_timeout_s = step_timeout_s
        self._last: Pulse | None = None
        self._silent_s = 0.0
        self._stepless_s = 0.0

    def stands_still(self, steps: int, in_engine: int) -> bool:
        """Whether there is work and no step since the last look, so that processor time matters."""
        return self._last is not None and in_engine > 0 and steps == self._last.steps

    def look(self, pulse: Pulse) -> str | None:
        """A sentence if the engine hangs, else None."""
        last, self._last = self._last, pulse
        if last is None or pulse.steps != last.steps:
            self._silent_s = self._stepless_s = 0.0
        elif pulse.in_engine > 0:  # without work the silence pauses, so that clients who give up and retry don't restart it
            self._count(min(pulse.now - last.now, _LONGEST_LOOK_S), pulse.cpu_s - last.cpu_s)
        return self._verdict(pulse.in_engine)

    @property
    def in_doubt(self) -> bool:
        """Whether it has fallen silent with work, and has none any more."""
        return self._silent_s > 0 and self._last is not None and self._last.in_engine == 0

    def _count(self, elapsed_s: float, cpu_s: float) -> None:
        self._stepless_s += elapsed_s
        self._silent_s = 0.0 if cpu_s > _COMPUTING_SHARE * elapsed_s else self._silent_s + elapsed_s

    def _verdict(self, in_engine: int) -> str | None:
        if self._silent_s >= self._hang_timeout_s:
            return (f"{self._name} hangs: {in_engine} requests in it, and for {self._silent_s:.0f} s neither a step nor computation "
                    "(TANDEM_HANG_TIMEOUT_S)")
        if self._stepless_s >= self._step_timeout_s:
            return f"{self._name} hangs: {in_engine} requests in it, and a step that took {self._stepless_s:.0f} s (TANDEM_STEP_TIMEOUT_S)"
        return None


class HangWatch:
    """Looks at every rank of an engine each second until one hangs."""

    def __init__(self, heartbeat: Callable[[str], Heartbeat], loads: EngineLoads, engine_cpu_s: Callable[[int | None], float],
                 on_hang: Callable[[str], Awaitable[None]], probe: Callable[[], Awaitable[None]] | None = None) -> None:
        """`heartbeat` makes one for what it is called. `engine_cpu_s` is asked for a rank, or for None where there is only one.

        `probe` gives every rank work of our own, counted like any, and returns when it is done, however long that takes.
        """
        self._make = heartbeat
        self._loads = loads
        self._engine_cpu_s = engine_cpu_s
        self._on_hang = on_hang
        self.probe = probe
        self._probing: asyncio.Future[None] | None = None
        self._heartbeats: dict[int, Heartbeat] = {}
        self._cpu_s: dict[int, float] = {}

    async def run(self) -> None:
        """Until a rank hangs and `on_hang` was told why."""
        reason = None
        try:
            while reason is None:
                await asyncio.sleep(INTERVAL_S)
                try:
                    reason = await self.look()
                except Exception:  # a failed look at the processes must not end the watch
                    log.exception("heartbeat.look_failed")
            await self._on_hang(reason)
        finally:
            if self._probing is not None:
                self._probing.cancel()

    async def look(self) -> str | None:
        """One look at each rank; the first that hangs."""
        loads = self._loads.by_rank
        reasons = [await self._look_at(rank, load, alone=len(loads) == 1) for rank, load in loads.items()]
        if self._probing is None and not self._loads.asleep and any(heartbeat.in_doubt for heartbeat in self._heartbeats.values()):
            self._ask()
        return next((reason for reason in reasons if reason), None)

    def _ask(self) -> None:
        if self.probe is not None:
            log.warning("heartbeat.probe: the engine fell silent and lost its work; it is asked for one token")
            self._probing = asyncio.ensure_future(self.probe())
            self._probing.add_done_callback(self._probed)

    def _probed(self, probing: "asyncio.Future[None]") -> None:
        """One that fails says nothing of hanging; while the doubt lasts there is another."""
        self._probing = None
        if not probing.cancelled() and probing.exception() is not None:
            log.warning("heartbeat.probe_failed: %r", probing.exception())

    async def _look_at(self, rank: int, load: EngineLoad, *, alone: bool) -> str | None:
        """Processor time is read, off the loop, only of a rank that stands still."""
        heartbeat = self._heartbeats.get(rank)
        if heartbeat is None:
            heartbeat = self._heartbeats[rank] = self._make("the engine" if alone else f"data-parallel rank {rank} of the engine")
        steps, in_engine = load.steps, 0 if self._loads.asleep else load.in_engine
        if heartbeat.stands_still(steps, in_engine):
            self._cpu_s[rank] = await asyncio.to_thread(self._engine_cpu_s, None if alone else rank)
        return heartbeat.look(Pulse(time.monotonic(), steps, in_engine, self._cpu_s.get(rank, 0.0)))
