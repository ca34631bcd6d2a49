# SPDX-License-Identifier: Apache-2.0
"""What the worker knows of its engine's load, read off the statistics that vLLM hands out every step."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_SMOOTHING = 0.1
_IDLE_S = 1.0


@dataclass
class EngineLoad:
    """The latest figures; written by the event loop, read by anyone (single attributes, no lock needed)."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    step_s: float = 0.0
    steps: int = 0
    """Steps that the engine has told of since its start: its pulse."""
    in_engine: int = 0
    """Requests that were handed to the engine and have not ended; counted by whoever hands them over."""
    asleep: bool = False
    """The engine was told to pause, so that work in it says nothing of its health."""
    now: Callable[[], float] = time.monotonic
    _last_step: float = field(default=0.0, repr=False)

    def record(self, scheduler_stats: Any | None, generated_tokens: int) -> None:
        """Takes one engine step's statistics; a step that generated tokens also updates the step time."""
        self.steps += 1
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.waiting = scheduler_stats.num_waiting_reqs
            self.kv_usage = scheduler_stats.kv_cache_usage
        if generated_tokens > 0:
            self._record_step()

    def _record_step(self) -> None:
        now = self.now()
        elapsed = now - self._last_step
        self._last_step = now
        if 0 < elapsed < _IDLE_S:
            self.step_s = elapsed if self.step_s == 0 else (1 - _SMOOTHING) * self.step_s + _SMOOTHING * elapsed
