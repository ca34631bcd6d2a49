# SPDX-License-Identifier: Apache-2.0
"""The whole circle: load on a real router, seen by a real Prometheus, decided by the planner's process, done by tritonserver."""

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from calls import Call, connect, responses
from mock_models import MockServer, mock_fleet, mock_server
from models import make_tiny_model
from planner_process import PlannerProcess, planner
from prometheuses import BINARY, RealPrometheus
from servers import wait_for

CYCLES = 5
WAIT_S = 90.0
MANY, PROMPT, TOKENS = 16, 64, 32
"""Streams under load, and the tokens of their requests: 96 blocks, which are 45 % of one worker's and 22 % of two's."""
BLOCKS = 213
FEW = 2
SLOWLY = "0.1"
"""Times are ten times those of an 8B model: what counts here is not speed, and a slow core must keep up."""
DECIDES = ("--adjustment-interval", "3", "--load-interval", "3", "--scale-down-window", "4", "--decode-scale-up-kv-rate", "30",
           "--decode-scale-down-kv-rate", "25")
AGGREGATED = ("--mode", "agg", "--max-gpu-budget", "2", "--triton-aggregated", "mock*", "--prefill-scale-up-queue-tokens", "1e9",
              "--prefill-scale-down-queue-tokens", "1e9")
DISAGGREGATED = ("--mode", "disagg", "--max-gpu-budget", "4", "--triton-prefill", "prefill*", "--triton-decode", "decode*",
                 "--prefill-scale-up-queue-tokens", "400", "--prefill-scale-down-queue-tokens", "300")
PREFILL = f"--role prefill --no-events --speedup 0.02 --max-num-batched-tokens {PROMPT}"
"""One prompt after the other, so slow that 16 streams queue."""
DECODE = f"--role decode --no-events --speedup {SLOWLY} --blocks 60"
SMALL, LARGE = ["decode_0", "prefill_0"], ["decode_0", "decode_1", "prefill_0", "prefill_1"]


@dataclass
class Clients:
    """Streams that send one request after another, as many at a time as the test says."""

    url: str
    wanted: int = FEW
    done: int = 0
    failures: list[str] = field(default_factory=list)
    stopping: bool = False

    async def run(self) -> None:
        """Until `stopping`."""
        async with connect(self.url) as client, asyncio.TaskGroup() as group:
            for number in range(MANY):
                group.create_task(self._one(client, number))

    async def _one(self, client: Any, number: int) -> None:
        prompts = random.Random(number)
        for turn in itertools.count():
            while number >= self.wanted and not self.stopping:  # noqa: ASYNC110 - told by a plain number
                await asyncio.sleep(0.05)
            if self.stopping:
                return
            call = Call("router", [prompts.randrange(30_000) for _ in range(PROMPT)], {"max_tokens": TOKENS}, returns=("output_ids",),
                        request_id=f"{number}-{turn}")
            await self._ask(client, call)

    async def _ask(self, client: Any, call: Call) -> None:
        try:
            tokens = [token async for response in responses(client, call) for token in response.get("output_ids", ())]
        except Exception as exc:
            self.failures.append(f"{call.request_id}: {exc}")
        else:
            self.done += 1
            if len(tokens) != TOKENS:
                self.failures.append(f"{call.request_id}: {len(tokens)} tokens")


def planner_of(folder: Path, server: MockServer, prometheus: RealPrometheus, *flags: str) -> AbstractContextManager[PlannerProcess]:
    """The planner over the server's mock models."""
    return planner(folder, *DECIDES, *flags, "--connector", "triton", "--triton-url", server.http_url, "--prometheus-endpoint",
                   prometheus.url, "--start-delay-s", "1", "--scale-check-s", "0.25", TANDEM_DISCOVERY=server.discovery)


@contextmanager
def scraped(folder: Path, server: MockServer) -> Iterator[RealPrometheus]:
    """The Prometheus that scrapes the server's router and workers."""
    prometheus = RealPrometheus(folder / "prometheus", (server.router_metrics, *server.worker_metrics))  # its port is free only now
    try:
        prometheus.start()
        yield prometheus
    finally:
        prometheus.kill()


@contextmanager
def circle(folder: Path) -> Iterator[tuple[MockServer, RealPrometheus]]:
    """A server with two models, one loaded, and the Prometheus that scrapes it."""
    arguments = f"--no-events --speedup {SLOWLY} --blocks {BLOCKS}"
    with mock_server(folder, 2, ("mock_0",), make_tiny_model(folder / "tokenizer"), arguments, DYN_ROUTER_MODE="least-loaded",
                     TANDEM_ROUTER_ADMIN_HOST="127.0.0.1") as server, scraped(folder, server) as prometheus:
        yield server, prometheus


async def until(condition: Callable[[], bool], what: str) -> None:
    """`wait_for` beside running clients."""
    await asyncio.to_thread(wait_for, condition, WAIT_S, what)


@pytest.mark.slow
@pytest.mark.skipif(BINARY is None, reason="there is no Prometheus")
async def test_load_adds_a_worker_and_its_end_removes_it_without_a_failed_request(tmp_path: Path) -> None:
    """Five times; between two of them Prometheus goes away and comes back, and the planner is restarted: nothing moves."""
    with circle(tmp_path) as (server, prometheus), planner_of(tmp_path, server, prometheus, *AGGREGATED) as first:
        clients = Clients(server.grpc_url)
        running = asyncio.create_task(clients.run())
        await until(lambda: sees_everything(first), "the planner sees everything")
        for _ in range(2):
            await cycle(clients, server)
        done = 'tandem_planner_changes_total{outcome="done",role="aggregated"}'
        await until(lambda: first.metric(done) >= 4, "the planner knows of its four changes")
        await away_and_back(first, server, prometheus)
        await asyncio.to_thread(first.stop)
        with planner_of(tmp_path, server, prometheus, *AGGREGATED) as second:
            await until(lambda: sees_everything(second), "the restarted planner sees everything")
            assert server.loaded() == ["mock_0"]
            assert second.metric("tandem_planner_gpu_hours") > 0  # counted on
            for _ in range(CYCLES - 2):
                await cycle(clients, server)
            clients.stopping = True
            async with asyncio.timeout(WAIT_S):
                await running
            assert second.metric('tandem_planner_changes_total{outcome="failed",role="aggregated"}') == 0
            await asyncio.to_thread(second.stop)
        assert clients.failures == []
        assert clients.done > 10 * CYCLES
        assert server.loaded() == ["mock_0"]  # the fleet stays when the planner ends


def sees_everything(one: PlannerProcess) -> bool:
    """Whether it has decided, and missed nothing for it."""
    health = one.health()
    return health.get("status") == "ready" and health.get("missing") == []


async def cycle(clients: Clients, server: MockServer) -> None:
    """Many streams: a second worker serves. Few: it is gone."""
    clients.wanted = MANY
    await until(lambda: server.placed() == ["mock_0", "mock_1"], "a second worker is placed")
    clients.wanted = FEW
    await until(lambda: server.loaded() == ["mock_0"], "the second worker is unloaded")


async def away_and_back(one: PlannerProcess, server: MockServer, prometheus: RealPrometheus) -> None:
    """Without figures the planner says so, and the fleet stays."""
    prometheus.kill()
    await until(lambda: any("can't be asked" in sentence for sentence in one.health()["missing"]), "the planner misses Prometheus")
    assert server.loaded() == ["mock_0"]
    await asyncio.to_thread(prometheus.start)
    await until(lambda: one.health()["missing"] == [], "the planner sees again")


@contextmanager
def disaggregated(folder: Path) -> Iterator[tuple[MockServer, RealPrometheus]]:
    """A server with two models of either role, one of each loaded, and its Prometheus."""
    models = {"prefill_0": PREFILL, "prefill_1": PREFILL, "decode_0": DECODE, "decode_1": DECODE}
    with mock_fleet(folder, models, tuple(SMALL), make_tiny_model(folder / "tokenizer"), DYN_ROUTER_MODE="least-loaded",
                    TANDEM_ROUTER_ADMIN_HOST="127.0.0.1") as server, scraped(folder, server) as prometheus:
        yield server, prometheus


@pytest.mark.slow
@pytest.mark.skipif(BINARY is None, reason="there is no Prometheus")
async def test_pools_of_prefill_and_decode_grow_and_shrink_without_a_failed_request(tmp_path: Path) -> None:
    """Twice. A prefill worker that drains hands its KV over before it is unloaded, so no handoff is lost either."""
    with disaggregated(tmp_path) as (server, prometheus), planner_of(tmp_path, server, prometheus, *DISAGGREGATED) as one:
        clients = Clients(server.grpc_url, wanted=1)
        running = asyncio.create_task(clients.run())
        await until(lambda: sees_everything(one), "the planner sees everything")
        for _ in range(2):
            clients.wanted = MANY
            await until(lambda: server.placed() == LARGE, "a second worker of each role is placed")
            clients.wanted = 1
            await until(lambda: server.loaded() == SMALL, "the second workers are unloaded")
        clients.stopping = True
        async with asyncio.timeout(WAIT_S):
            await running
        failed = [line for line in one.log.read_text().splitlines() if "planner.scale_failed" in line]
        assert [line for line in failed if "the repository has 2 models" not in line] == []  # the budget may ask for a third, too
        assert clients.failures == []
        assert clients.done > 20
        assert "prefill.fell_back" not in server.log.read_text()
