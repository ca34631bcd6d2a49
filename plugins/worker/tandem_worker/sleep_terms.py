# SPDX-License-Identifier: Apache-2.0
"""The terms of `sleep`: levels, tags, errors, and what it needs of engine and host."""

from dataclasses import dataclass
from typing import Any, Protocol

from tandem_protocol.errors import RequestError
from tandem_worker.status import WorkerState

WEIGHTS, KV_CACHE, SCHEDULING = "weights", "kv_cache", "scheduling"
TAGS = (WEIGHTS, KV_CACHE, SCHEDULING)
"""What can be woken by itself; vLLM's names."""
LEVELS = (0, 1, 2)


class UnsupportedError(RequestError):
    """This engine can't sleep in that way; the message says what would let it (HTTP 501)."""


class WrongStateError(RequestError):
    """The worker is not in a state for that (HTTP 409)."""


@dataclass(frozen=True)
class Abilities:
    """What an engine can do."""

    refusal: str = ""
    """Why levels 1 and 2 are not possible; empty if they are."""
    discardable: bool = True
    """Whether everything that level 2 discards can be read again: not so with LoRA adapters."""

    def check(self, level: int) -> None:
        """Raises RequestError for a level that vLLM doesn't have, UnsupportedError for one that this engine doesn't."""
        if level not in LEVELS:
            raise RequestError(f"level must be one of {', '.join(map(str, LEVELS))}, got {level!r}")
        if level > 0 and self.refusal:
            raise UnsupportedError(self.refusal)
        if level > 1 and not self.discardable:
            raise UnsupportedError("level 2 would discard LoRA adapters, which are not read again: use level 1")


class SleepingEngine(Protocol):
    """What is needed of vLLM's AsyncLLM."""

    async def pause_generation(self, *, mode: Any, clear_cache: bool) -> None:
        """Returns when nothing is in the engine any more (mode `wait`)."""

    async def resume_generation(self) -> None:
        """Takes a pause back, also one that still waits."""

    async def sleep(self, level: int, mode: Any) -> None:
        """Pauses and gives memory back."""

    async def wake_up(self, tags: list[str] | None) -> bool:
        """Whether it is wholly awake, and scheduling."""

    async def collective_rpc(self, method: str) -> list[Any]:
        """Calls a method of every rank."""

    async def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
        """Whether it could be done."""


class SleepingHost(Protocol):
    """What is needed of the engine host."""

    @property
    def state(self) -> WorkerState:
        """Where the worker is in its life."""

    async def retire(self) -> None:
        """Leaves placement, still taking requests."""

    async def drain(self, timeout_s: float) -> int:
        """Stops taking requests; returns how many were aborted after the timeout."""

    def enter(self, state: WorkerState, reason: str | None = None) -> bool:
        """False if the engine is lost meanwhile."""


@dataclass(frozen=True)
class Patience:
    """How long a sleep waits for requests in flight, and then for blocks that others pull; seconds."""

    drain_s: float
    blocks_s: float
