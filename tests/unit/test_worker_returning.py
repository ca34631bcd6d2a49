# SPDX-License-Identifier: Apache-2.0
"""Handoffs that are given back: which rank is told, and that an idle engine is made to step until the prefill worker knows."""

import asyncio
from typing import Any

from prometheus_client import REGISTRY

from fakes import WAIT_S
from tandem_worker.load import EngineLoads
from tandem_worker.returning import HandoffReturns

PAUSES_S = (0.001, 0.002, 0.003)
HANDOFF = {"do_remote_prefill": True, "remote_request_id": "there"}


class Engine:
    """As vLLM's with NIXL: the first step that is told of a handoff begins to connect, and a later one gives it back."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any], int | None]] = []
        self.errored = False
        self.failure: Exception | None = None
        self.heard = asyncio.Semaphore(0)

    async def notify_kv_transfer_request_rejected(self, request_id: str, kv_transfer_params: dict[str, Any], *,
                                                  data_parallel_rank: int | None = None) -> None:
        self.told.append((request_id, kv_transfer_params, data_parallel_rank))
        self.heard.release()
        if self.failure is not None:
            raise self.failure

    async def is_told(self, times: int) -> None:
        """Until it was told so often since the last question."""
        async with asyncio.timeout(WAIT_S):
            for _ in range(times):
                await self.heard.acquire()


async def others() -> None:
    """Whatever a task that is cancelled or done could still do."""
    pending = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.wait_for(asyncio.gather(*pending, return_exceptions=True), WAIT_S)


def kept() -> float:
    """Handoffs that were counted as not given back."""
    return REGISTRY.get_sample_value("tandem_worker_unreturned_handoffs_total") or 0.0


async def test_an_idle_engine_steps_after_it_was_told() -> None:
    """Each step under an id of its own, and without a handoff: it is given back once."""
    engine = Engine()
    await HandoffReturns(engine, EngineLoads(), PAUSES_S).give_back("r", HANDOFF)
    assert engine.told == [("r", HANDOFF, 0)]
    await others()
    assert engine.told[1:] == [(f"r-step-{number}", {}, 0) for number in range(3)]


async def test_a_busy_engine_steps_by_itself() -> None:
    engine, loads = Engine(), EngineLoads()
    loads.of(0).in_engine = 1
    await HandoffReturns(engine, loads, PAUSES_S).give_back("r", HANDOFF)
    await others()
    assert len(engine.told) == 1


async def test_a_sleeping_engine_is_left_alone() -> None:
    engine, loads = Engine(), EngineLoads()
    returns = HandoffReturns(engine, loads, PAUSES_S)
    await returns.give_back("r", HANDOFF)
    loads.asleep = True
    await others()
    assert len(engine.told) == 1


async def test_the_least_loaded_rank_gives_back_and_all_idle_ones_step() -> None:
    engine, loads = Engine(), EngineLoads()
    loads.of(4).in_engine = 2
    loads.of(5)
    await HandoffReturns(engine, loads, PAUSES_S).give_back("r", HANDOFF)
    await others()
    assert {place for _, _, place in engine.told} == {1}


async def test_one_task_at_a_time() -> None:
    """The newest handoff's steps serve all that were given back before."""
    engine = Engine()
    returns = HandoffReturns(engine, EngineLoads(), (60.0,))
    for number in range(50):
        await returns.give_back(str(number), HANDOFF)
    assert len(engine.told) == 50
    living = [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and not task.cancelling()]
    assert len(living) == 1
    living[0].cancel()
    await others()


async def test_a_failure_is_left_to_the_lease(caplog: Any) -> None:
    engine = Engine()
    engine.failure = RuntimeError("no")
    before = kept()
    await HandoffReturns(engine, EngineLoads(), PAUSES_S).give_back("r", HANDOFF)
    assert len(asyncio.all_tasks()) == 1
    assert "handoff.release_failed request_id=r" in caplog.text
    assert kept() == before + 1


async def test_a_dead_engine_is_told_nothing_and_ends_the_steps() -> None:
    engine = Engine()
    returns = HandoffReturns(engine, EngineLoads(), PAUSES_S)
    engine.errored = True
    await returns.give_back("r", HANDOFF)
    assert engine.told == []
    engine.errored = False
    await returns.give_back("s", HANDOFF)
    await engine.is_told(2)
    engine.errored = True
    await others()
    assert len(engine.told) == 2
