# SPDX-License-Identifier: Apache-2.0
"""Gives handoffs back to the prefill workers that hold their blocks. Runs on the event loop.

vLLM's NIXL connector tells a prefill worker so in a step of this engine. To a prefill worker that it hasn't met yet it connects in the
background, and tells in its next step after that; an engine without requests makes none, and the blocks would stay until their lease of
30 s ends. So an idle engine is made to step a few times after a handoff was given back.
"""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Protocol

from prometheus_client import Counter

from tandem_worker.load import EngineLoads

log = logging.getLogger(__name__)

KEPT = Counter("tandem_worker_unreturned_handoffs",
               "Handoffs that could not be given back, so that their prefill workers hold the blocks until the lease ends")

_TIMEOUT_S = 5.0
_PAUSES_S = (0.1, 0.4, 1.5, 4.0)
"""Between the steps; connections take milliseconds to a second, and a lease of 30 s is the last resort."""


class TellsEngine(Protocol):
    """What an engine's client has for it; vLLM's AsyncLLM."""

    @property
    def errored(self) -> bool:
        """It is dead."""

    async def notify_kv_transfer_request_rejected(self, request_id: str, kv_transfer_params: dict[str, Any], *,
                                                  data_parallel_rank: int | None = None) -> None:
        """Submits a request that is aborted at once. It makes the engine step, and with the params of a handoff gives that back."""


class HandoffReturns:
    """For one engine; at most one task at a time makes it step."""

    def __init__(self, engine: TellsEngine, loads: EngineLoads, pauses_s: tuple[float, ...] = _PAUSES_S) -> None:
        self._engine = engine
        self._loads = loads
        self._pauses_s = pauses_s
        self._stepping: asyncio.Task[None] | None = None

    async def give_back(self, request_id: str, handoff: Mapping[str, Any]) -> None:
        """Never raises: what fails is logged, counted, and left to the lease."""
        _, place = self._loads.choose(None)
        if not await self._tell(request_id, handoff, place):
            KEPT.inc()
            return
        if self._stepping is not None:
            self._stepping.cancel()  # the new pauses are long enough for both
        self._stepping = asyncio.ensure_future(self._step(request_id))

    async def _step(self, request_id: str) -> None:
        for number, pause_s in enumerate(self._pauses_s):
            await asyncio.sleep(pause_s)
            for place, load in enumerate(self._loads.by_rank.values()):
                if load.in_engine == 0 and not self._loads.asleep:
                    await self._tell(f"{request_id}-step-{number}", {}, place)

    async def _tell(self, request_id: str, params: Mapping[str, Any], place: int) -> bool:
        if self._engine.errored:
            return False
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await self._engine.notify_kv_transfer_request_rejected(request_id, dict(params), data_parallel_rank=place)
        except Exception:  # whatever it is, the request is over, and the lease is the last resort; say that it is needed
            log.exception("handoff.release_failed request_id=%s", request_id)
            return False
        return True
