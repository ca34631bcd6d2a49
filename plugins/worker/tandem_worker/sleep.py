# SPDX-License-Identifier: Apache-2.0
"""Puts a worker to sleep and wakes it: placement is left first, and whatever fails is rolled back.

Levels are vLLM's. 1: weights go to host memory, the KV cache is discarded. 2: both are discarded, and the weights are read from the
model's files again. 0: only scheduling pauses, all memory stays; it is what a platform without sleep mode can do, such as a CPU.

In: a worker that takes requests → draining in discovery → drained → the engine idle, which includes KV blocks that decode workers
still pull → asleep. Out: memory back → a request of one token answered → ready in discovery. The engine is asked to sleep only once it
is idle: vLLM can't take back a sleep that waits for blocks, but a mere pause it can.

Runs on the worker's event loop. Transitions are serialised and go on to their end whatever becomes of who asked for them.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import Counter, Gauge

from tandem_protocol.errors import EngineError, RequestError, TandemError, UnavailableError
from tandem_worker.sleep_terms import (
    KV_CACHE,
    SCHEDULING,
    TAGS,
    WEIGHTS,
    Abilities,
    Patience,
    SleepingEngine,
    SleepingHost,
    WrongStateError,
)
from tandem_worker.status import WorkerState

log = logging.getLogger(__name__)

_MEMORY = frozenset({WEIGHTS, KV_CACHE})
_AWAKE = frozenset({WorkerState.READY, WorkerState.UNWELL})
_ENGINE_TIMEOUT_S = 300.0
"""For one call of the engine: weights of a large model on their way to or from host memory or a disk."""
_VERIFY_TIMEOUT_S = 60.0
"""For one token after waking; the first step on a busy machine is slow."""

TRANSITIONS = Counter("tandem_sleep_transitions", "Sleeps and wakes of this worker by how they ended", ["worker", "kind", "outcome"])
ASLEEP = Gauge("tandem_asleep", "1 while this worker sleeps", ["worker"])


class SleepCycle:
    """The sleep of one worker."""

    def __init__(self, host: SleepingHost, engine: SleepingEngine, step: Callable[[], Awaitable[None]], abilities: Abilities,
                 name: str) -> None:
        """`step` has the engine answer one token, past the host's queue, or raises."""
        self.abilities = abilities
        self._host, self._engine, self._step, self._name = host, engine, step, name
        self._level: int | None = None
        self._away: frozenset[str] = frozenset()
        """The tags whose memory is not there."""
        self._discarded = False
        """Whether the weights are gone, not only away."""
        self._asked = 0
        """The level that the engine itself was asked for, or 0."""
        self._torn = False
        """Whether a sleep failed half-way and could not be rolled back: then it is not known what is there."""
        self._lock = asyncio.Lock()
        self._running: set[asyncio.Task[str]] = set()
        ASLEEP.labels(name).set_function(lambda: float(self._level is not None))

    @property
    def level(self) -> int | None:
        """The level at which it sleeps; None while awake."""
        return self._level

    @property
    def away(self) -> tuple[str, ...]:
        """What is still asleep, of TAGS."""
        return tuple(sorted(self._away)) or ((SCHEDULING,) if self._level is not None else ())

    async def sleep(self, level: int, patience: Patience) -> str:
        """A sentence of what was done. Raises TandemError with the reason why not; the worker then serves again if it did before."""
        self.abilities.check(level)
        return await self._to_the_end(self._sleep(level, patience))

    async def wake_up(self, tags: Collection[str] | None) -> str:
        """A sentence of what was done; None wakes everything. Raises TandemError: it sleeps on then, and may be woken again."""
        unknown = sorted(set(tags or ()) - set(TAGS))
        if unknown:
            raise RequestError(f"unknown tag {unknown[0]!r}: choose from {', '.join(TAGS)}")
        return await self._to_the_end(self._wake_up(tags))

    async def clear(self, *, force: bool) -> str:
        """Empties the prefix cache on the device. `force` also takes the blocks of running requests, which compute them again.

        Raises UnavailableError if blocks are in use, or the worker sleeps.
        """
        return await self._to_the_end(self._clear(force))

    async def _to_the_end(self, transition: Coroutine[Any, Any, str]) -> str:
        task = asyncio.create_task(transition)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    # --- to sleep ---

    async def _sleep(self, level: int, patience: Patience) -> str:
        async with self._lock:
            if self._level is not None:
                return self._already_asleep(level)
            if self._host.state not in _AWAKE:
                raise WrongStateError(f"the worker is {self._host.state}: only one that takes requests can be put to sleep")
            try:
                aborted = await self._fall_asleep(level, patience)
            except Exception as exc:
                TRANSITIONS.labels(self._name, "sleep", "failed").inc()
                raise _named("the worker did not fall asleep", exc, await self._roll_back(level)) from exc
            TRANSITIONS.labels(self._name, "sleep", "done").inc()
            log.info("worker.asleep level=%d aborted=%d", level, aborted)
            return f"asleep at level {level}" + (f"; {aborted} requests were aborted after {patience.drain_s:g} s" if aborted else "")

    def _already_asleep(self, level: int) -> str:
        if level != self._level:
            raise WrongStateError(f"the worker sleeps at level {self._level}: wake it first to change the level")
        return f"already asleep at level {level}"

    async def _fall_asleep(self, level: int, patience: Patience) -> int:
        self._asked = 0
        await self._host.retire()
        aborted = await self._host.drain(patience.drain_s)
        await self._quiesce(patience.blocks_s)
        if level > 0:
            self._asked = level
            async with _bounded("vLLM's sleep"):
                await self._engine.sleep(level, "abort")  # of nothing: the engine is idle
        self._level, self._away, self._discarded = level, _MEMORY if level > 0 else frozenset(), level > 1
        if not self._host.enter(WorkerState.ASLEEP, f"level {level}; POST /engine/wake_up wakes it"):
            raise UnavailableError("the engine was lost meanwhile")
        return aborted

    async def _quiesce(self, timeout_s: float) -> None:
        """Until the engine holds nothing for anybody. It goes on to send blocks meanwhile, and gives up those whose lease ends."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._engine.pause_generation(mode="wait", clear_cache=False)
        except TimeoutError as exc:
            raise UnavailableError(f"the engine still held blocks or requests after {timeout_s:g} s, such as blocks that a decode worker "
                                   "has not pulled: retry later or with a larger blocks_timeout_s") from exc

    async def _roll_back(self, level: int) -> str:
        """Serves again if that is possible; says what came of it."""
        self._level, self._away, self._discarded, self._torn = level, frozenset(), False, True
        try:
            await self._restore()
        except Exception as exc:  # the reason of the first failure matters more; this one is told with it
            log.exception("worker.rollback_failed")
            self._host.enter(WorkerState.ASLEEP, f"it fell asleep by halves ({exc}); POST /engine/wake_up tries to wake it")
            TRANSITIONS.labels(self._name, "rollback", "failed").inc()
            return f"nor could it be brought back ({exc}): wake it or restart it"
        TRANSITIONS.labels(self._name, "rollback", "done").inc()
        return "it serves again"

    async def _restore(self) -> None:
        if self._asked > 0:
            await self._restore_memory(self._asked)
        self._torn = False
        await self._serve()

    async def _restore_memory(self, level: int) -> None:
        """Brings back whatever a sleep that failed half-way took; what is there already is left as it is."""
        async with _bounded("vLLM's wake-up"):
            await self._engine.collective_rpc("wake_up")  # past vLLM's own account, which doesn't know of a sleep that failed
            if level > 1:
                await self._engine.collective_rpc("reload_weights")
            await self._engine.wake_up(None)

    # --- and back ---

    async def _wake_up(self, tags: Collection[str] | None) -> str:
        async with self._lock:
            if self._level is None:
                if self._host.state not in _AWAKE:
                    raise WrongStateError(f"the worker is {self._host.state}, not asleep")
                return "already awake"
            try:
                woken = await self._awaken(tags)
            except Exception as exc:
                TRANSITIONS.labels(self._name, "wake_up", "failed").inc()
                raise _named("the worker did not wake up", exc, "it sleeps on, wake it again or restart it") from exc
            if not woken:
                return f"awake but for {', '.join(self.away)}: it takes requests when everything is"
            TRANSITIONS.labels(self._name, "wake_up", "done").inc()
            log.info("worker.awake")
            return "awake"

    async def _awaken(self, tags: Collection[str] | None) -> bool:
        """Whether the worker serves again; False while a part of it sleeps."""
        if self._torn:
            await self._restore()
            return True
        wanted = self._away if tags is None else self._away & set(tags)
        if WEIGHTS in wanted:
            await self._wake(WEIGHTS)
        if self._discarded and WEIGHTS not in self._away:
            async with _bounded("reading the weights again"):
                await self._engine.collective_rpc("reload_weights")
            self._discarded = False
        if KV_CACHE in wanted:
            await self._wake(KV_CACHE)
        if self._away or not (tags is None or wanted or SCHEDULING in tags):
            return False
        await self._serve()
        return True

    async def _serve(self) -> None:
        """With all memory there: schedule, prove it, be placed on again."""
        async with _bounded("vLLM's resume"):
            await self._engine.resume_generation()
        await self._check()
        self._level = None
        if not self._host.enter(WorkerState.READY):
            raise UnavailableError(f"the worker is {self._host.state}")

    async def _wake(self, tag: str) -> None:
        async with _bounded(f"waking {tag}"):
            await self._engine.wake_up([tag])
        self._away -= {tag}

    async def _check(self) -> None:
        """An engine that only looks awake must not be placed on."""
        async with _bounded("the first token", _VERIFY_TIMEOUT_S):
            await self._step()

    # --- the prefix cache ---

    async def _clear(self, force: bool) -> str:
        async with self._lock:
            if self._host.state not in _AWAKE:
                raise UnavailableError(f"the worker is {self._host.state}: its blocks can't be cleared now")
            async with _bounded("clearing blocks", _VERIFY_TIMEOUT_S):
                cleared = await self._engine.reset_prefix_cache(reset_running_requests=force)
            if not cleared:
                raise UnavailableError('blocks are in use by requests or transfers: retry when the worker is idle, or send {"force": true}')
            await self._check()  # vLLM tells routers of cleared blocks with its next step
            return "KV cache cleared"


@asynccontextmanager
async def _bounded(what: str, timeout_s: float = _ENGINE_TIMEOUT_S) -> AsyncIterator[None]:
    """Raises UnavailableError naming what took too long, and EngineError with vLLM's own reason."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as exc:
        raise UnavailableError(f"{what} took longer than {timeout_s:g} s") from exc
    except TandemError:
        raise
    except Exception as exc:
        raise EngineError(f"{what} failed: {exc}") from exc


def _named(what: str, exc: Exception, then: str) -> TandemError:
    kind = UnavailableError if isinstance(exc, UnavailableError) else EngineError
    return kind(f"{what}: {exc}; {then}")
