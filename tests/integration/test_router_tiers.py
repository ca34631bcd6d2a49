# SPDX-License-Identifier: Apache-2.0
"""A prefix that is left on one worker's disk draws its request there rather than to a cold worker. Two real engines with KV tiers."""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from calls import Call, collect, connect, text_of
from models import make_lively_model
from prompts import BLOCK_SIZE, make_prompts
from servers import Server, get_json, post_json, serve, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROMPT_TOKENS = 606
FULL_BLOCKS = PROMPT_TOKENS // BLOCK_SIZE
SAMPLING = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}
WAIT_S = 30.0
POLL_S = 0.05


@dataclass(frozen=True)
class Worker:
    """One of the two, as server and router know it."""

    server: Server
    name: str
    id: str

    def metric(self, name: str) -> float:
        """Of its admin port."""
        return self.server.metric(self.name, name)

    def reset(self, level: str) -> None:
        """Empties a tier."""
        assert post_json(f"{self.server.admin_url(self.name)}/kvbm", {"reset": level})["reset"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two aggregated workers with host and disk tiers, which take every block, and a router."""
    run, model = tmp_path_factory.mktemp("tiers"), make_lively_model(tmp_path_factory.mktemp("lively") / "model")
    (run / "disk").mkdir()
    tiers = ["--connector", "kvbm", "--cpu-cache-gb", "0.2", "--disk-cache-gb", "0.5", "--disk-cache-dir", str(run / "disk"),
             "--disable-disk-offload-filter"]
    limits = ["--max-num-seqs", "8", "--max-num-batched-tokens", "512", "--max-model-len", "2048", "--dtype", "float32"]
    with serve(run, "--mode", "agg", "--workers", "2", "--model", str(model), *tiers, *limits) as running:
        wait_for(lambda: len(fleet(running)) == 2, 120, "both workers in placement")
        yield running


def fleet(server: Server) -> dict[str, str]:
    """Triton model -> worker id, of those in placement."""
    workers = get_json(f"{server.state['router_urls'][0]}/fleet")["workers"]
    return {worker["triton_model"]: worker["id"] for worker in workers if worker["placed"]}


async def ask(client: Any, prompt: list[int], **parameters: Any) -> tuple[list[int], int]:
    """Token ids of the router's answer, and how many tokens of the prompt were not computed."""
    call = Call("router", prompt=prompt, sampling=SAMPLING, returns=("output_ids", "num_cached_tokens"), parameters=parameters)
    parts = await collect(client, call)
    return [token for part in parts for token in part["output_ids"]], max(part["num_cached_tokens"][0] for part in parts)


async def query(client: Any, prompt: list[int]) -> dict[str, Any]:
    """Which worker it would be, and why."""
    return dict(json.loads(await text_of(client, Call("router", prompt=prompt, parameters={"router_query": True})))["worker"])


async def leave_on_disk_only(client: Any, worker: Worker, prompt: list[int]) -> list[int]:
    """Has the worker compute the prompt and then empties the tiers above its disk; returns the text."""
    ids, cached = await ask(client, prompt, router_worker_id=worker.id)
    assert cached == 0
    wait_for(lambda: worker.metric("kvbm_tier_stored_total") >= FULL_BLOCKS, WAIT_S, "the prompt's blocks on disk")
    for level in ("G1", "G2"):
        worker.reset(level)
    return ids


async def overlap_becomes(client: Any, prompt: list[int], expected: dict[str, int]) -> dict[str, Any]:
    """The query's answer once the router knows this overlap; fails the test if that takes longer than `WAIT_S`."""
    deadline, found = time.monotonic() + WAIT_S, await query(client, prompt)
    while found["overlap_blocks"] != expected:
        assert time.monotonic() < deadline, f"the router knows {found['overlap_blocks']}"
        await asyncio.sleep(POLL_S)
        found = await query(client, prompt)
    return found


async def test_a_prefix_on_disk_wins_over_a_cold_worker(server: Server) -> None:
    """On either worker in turn: its events say STORAGE, the router goes there, and the engine loads instead of computing."""
    workers = [Worker(server, name, worker_id) for name, worker_id in sorted(fleet(server).items())]
    async with connect(server.grpc_url) as client:
        for worker, prompt in zip(workers, make_prompts(2, PROMPT_TOKENS, PROMPT_TOKENS), strict=True):
            text = await leave_on_disk_only(client, worker, prompt)
            found = await overlap_becomes(client, prompt, {"gpu": 0, "cpu": 0, "storage": FULL_BLOCKS})
            assert found["id"] == worker.id
            [cold] = [terms for terms in found["candidates"] if terms["worker_id"] != worker.id]
            assert tuple(cold["hits"]) == (0, 0, 0)
            loaded, computed = worker.metric("kvbm_tier_loaded_total"), [one.metric("vllm:prompt_tokens_total") for one in workers]
            again, cached = await ask(client, prompt)
            assert again == text
            assert cached >= 0.95 * FULL_BLOCKS * BLOCK_SIZE
            assert worker.metric("kvbm_tier_loaded_total") - loaded >= 0.95 * FULL_BLOCKS
            now = [one.metric("vllm:prompt_tokens_total") for one in workers]
            assert {one.name for one, before, after in zip(workers, computed, now, strict=True) if after > before} == {worker.name}
