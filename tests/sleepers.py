# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the engine and the host of a worker that sleeps."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from tandem_worker.sleep_terms import Patience
from tandem_worker.status import WorkerState

PATIENCE = Patience(drain_s=1.0, blocks_s=1.0)


@dataclass
class StubEngine:
    """An engine that notes what it is asked; `broken` methods raise, `held` is set while nobody holds blocks."""

    calls: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    away: set[str] = field(default_factory=set)
    weights: str = "loaded"
    paused: bool = False
    held: asyncio.Event = field(default_factory=asyncio.Event)
    pausing: asyncio.Event = field(default_factory=asyncio.Event)
    clearable: bool = True

    def __post_init__(self) -> None:
        self.held.set()

    def _note(self, name: str) -> None:
        self.calls.append(name)
        if name in self.broken:
            raise RuntimeError(f"{name} broke")

    async def pause_generation(self, *, mode: Any, clear_cache: bool) -> None:
        """Waits for whoever holds blocks."""
        assert (mode, clear_cache) == ("wait", False)
        self.paused = True
        self.pausing.set()
        await self.held.wait()
        self._note("pause")

    async def resume_generation(self) -> None:
        """Schedules again."""
        self._note("resume")
        self.paused = False

    async def sleep(self, level: int, mode: Any) -> None:
        """Frees memory; breaks half-way if it is to break."""
        assert self.paused, "vLLM can't take back a sleep that waits"
        self.weights = "offloaded" if level == 1 else "gone"
        self._note(f"sleep{level}")
        self.away = {"weights", "kv_cache"}

    async def wake_up(self, tags: list[str] | None) -> bool:
        """Brings back what is away."""
        self._note(f"wake {tags}")
        if tags is None or "weights" in tags:
            self.weights = "loaded" if self.weights == "offloaded" else self.weights
        self.away -= set(self.away if tags is None else tags)
        return not self.away

    async def collective_rpc(self, method: str) -> list[Any]:
        """What ranks do by themselves."""
        self._note(method)
        if method == "reload_weights":
            assert "weights" not in self.away
            self.weights = "loaded"
        elif self.weights == "offloaded":
            self.weights = "loaded"
        return [None]

    async def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
        """As set."""
        self._note(f"reset {reset_running_requests}")
        return self.clearable or reset_running_requests

    async def verify(self) -> None:
        """One token, which needs everything."""
        self._note("verify")
        assert (self.away, self.weights, self.paused) == (set(), "loaded", False)


@dataclass
class StubHost:
    """A host that notes its states."""

    state: WorkerState = WorkerState.READY
    told: list[str] = field(default_factory=list)
    in_flight: int = 0
    lost: bool = False

    async def retire(self) -> None:
        """Told to discovery."""
        self.told.append("retired")

    async def drain(self, timeout_s: float) -> int:
        """Aborts what is there."""
        assert timeout_s == PATIENCE.drain_s
        self.state = WorkerState.DRAINING
        self.told.append("drained")
        return self.in_flight

    def enter(self, state: WorkerState, reason: str | None = None) -> bool:
        """Unless lost."""
        if not self.lost:
            self.state = state
            self.told.append(str(state))
        return not self.lost
