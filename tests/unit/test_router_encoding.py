# SPDX-License-Identifier: Apache-2.0
"""The router's encode leg: the least loaded worker, and whatever goes wrong with it costs no request."""

import asyncio
from typing import Any, cast

import numpy as np
import pytest

from router_fleet import placement, worker
from tandem_protocol.errors import RequestError, TandemError, UnavailableError
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.roles import Role
from tandem_protocol.spans import NoSpan
from tandem_router.config import RouterSettings
from tandem_router.connections import Connections, WorkerLostError
from tandem_router.encoding import Encoding
from tandem_router.metrics import RouterMetrics
from tandem_router.placement import Placement, RouteRequest

REQUEST = GenerationRequest(request_id="r", prompt=[1, 2, 3], images=(b"aGk=",), stream=True, prepend_input=False, sampling={},
                            returns=frozenset(), handoff=None, priority=0, timeout_s=None)
ROUTE = RouteRequest(isl=3, keys=np.array([7], np.uint64), lora="fr", worker_id="elsewhere", exclude=frozenset({"e0"}))


class Calls:
    """In place of connections: notes who is asked, and answers or raises."""

    def __init__(self, error: TandemError | None = None) -> None:
        self.error = error
        self.asked: list[str] = []
        self.aborted: list[str] = []
        self.waits = False

    async def infer(self, url: str, message: Any, timeout_s: float) -> None:
        """One unary call."""
        assert timeout_s > 0
        assert {tensor.name for tensor in message.inputs} >= {"input_ids", "image"}
        self.asked.append(url)
        if self.waits:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error

    async def abort(self, url: str, model: str, request_id: str) -> None:
        """Of a call that was given up."""
        del model, request_id
        self.aborted.append(url)


@pytest.fixture
def pool() -> Placement:
    """Two encode workers."""
    return placement([worker(f"e{at}", role=Role.ENCODE, ranks=0) for at in range(2)])


def encoding(calls: Calls, metrics: RouterMetrics | None = None) -> Encoding:
    """Over these calls."""
    return Encoding(cast("Connections", calls), RouterSettings(), metrics or RouterMetrics())


def fallbacks(metrics: RouterMetrics) -> float:
    """As counted."""
    return next(sample.value for family in metrics.families() for sample in family.samples
                if sample.name == "tandem_router_encode_fallbacks_total")


async def encode(calls: Calls, pool: Placement, metrics: RouterMetrics | None = None) -> None:
    """One request."""
    await encoding(calls, metrics).encode(pool, ROUTE, REQUEST, NoSpan({}))


async def test_workers_take_turns_and_what_the_request_says_of_workers_is_not_about_them(pool: Placement) -> None:
    """Adapter, named and excluded workers belong to the generating pool; the books are even afterwards."""
    calls = Calls()
    for _ in range(4):
        await encode(calls, pool)
    assert sorted(calls.asked) == ["e0:8001", "e0:8001", "e1:8001", "e1:8001"]
    assert [load.active_requests for load in pool.loads()] == [0, 0]


@pytest.mark.parametrize("error", [UnavailableError("busy"), WorkerLostError("gone")])
async def test_a_failing_worker_costs_nothing_but_time(pool: Placement, error: TandemError) -> None:
    """It is counted; a lost one gets nothing for a while."""
    calls, metrics = Calls(error), RouterMetrics()
    await encode(calls, pool, metrics)
    assert fallbacks(metrics) == 1
    assert len(pool.workers) == (1 if isinstance(error, WorkerLostError) else 2)
    assert [load.active_requests for load in pool.loads()] == [0, 0]


async def test_a_bad_image_is_the_requests_error(pool: Placement) -> None:
    """Nobody else needs to read it."""
    with pytest.raises(RequestError, match="no image"):
        await encode(Calls(RequestError("no image")), pool)
    assert len(pool.workers) == 2


async def test_a_cancelled_request_is_aborted_on_its_worker(pool: Placement) -> None:
    """And its ticket given back."""
    calls = Calls()
    calls.waits = True
    task = asyncio.create_task(encode(calls, pool))
    async with asyncio.timeout(5):
        while not calls.asked:  # noqa: ASYNC110 - the call is made in the task's first step
            await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert calls.aborted == calls.asked
    assert [load.active_requests for load in pool.loads()] == [0, 0]


async def test_without_a_worker_the_request_goes_on() -> None:
    """The last one left between the look and the choice."""
    metrics = RouterMetrics()
    empty = placement([worker("e0", role=Role.ENCODE, ranks=0)])
    empty.set_workers([])
    await encode(Calls(), empty, metrics)
    assert fallbacks(metrics) == 1
