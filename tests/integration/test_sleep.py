# SPDX-License-Identifier: Apache-2.0
"""Workers sleep and wake behind a router, on real engines. A CPU has level 0 only, which goes the same way as the others but for memory."""

import asyncio
import time
from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from calls import Call, collect, connect, prefill, text_of
from servers import Server, get_json, post_json, wait_for

PROMPT = "The ship sailed on over the wide sea. " * 20
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
pytestmark = pytest.mark.slow
WAIT_S = 30.0
CALM_S = 45.0
"""Until blocks that nobody pulled are given up: their lease of 30 s."""


async def ask(server: Server, worker: str, path: str, **body: Any) -> dict[str, Any]:
    """POST to a worker's admin port."""
    return dict(await asyncio.to_thread(post_json, f"{server.admin_url(worker)}{path}", body))


def fleet(server: Server) -> dict[str, dict[str, Any]]:
    """What the router says of each worker, by its Triton model."""
    return {worker["triton_model"]: worker for worker in get_json(f"{server.state['router_urls'][0]}/fleet")["workers"]}


async def placed(server: Server, worker: str, wanted: bool) -> None:
    """Waits for the router to place on the worker, or not to."""
    await asyncio.to_thread(wait_for, lambda: fleet(server)[worker]["placed"] is wanted, WAIT_S, f"{worker} placed: {wanted}")


async def test_a_decode_worker_sleeps_while_the_router_goes_on(server: Server, client: Any) -> None:
    """Every request is answered meanwhile; who asks the sleeping worker itself is refused; awake it is placed on again."""
    call = Call("router", PROMPT, GREEDY)
    wanted = await text_of(client, call)
    going_on = asyncio.create_task(_stream_of_requests(server, call))
    assert await ask(server, "decode", "/engine/sleep", level=0, drain_timeout_s=60) == {"status": "ok", "message": "asleep at level 0"}
    assert (fleet(server)["decode"]["state"], fleet(server)["decode"]["placed"]) in {("asleep", False), ("draining", False)}
    assert server.health("decode")["status"] == "asleep"
    assert get_json(f"{server.admin_url('decode')}/live") == {"status": "asleep", "reason": "level 0; POST /engine/wake_up wakes it"}
    assert get_json(f"{server.admin_url('decode')}/engine/is_sleeping") == {"is_sleeping": True, "level": 0, "tags": ["scheduling"]}
    assert (await ask(server, "decode", "/engine/sleep", level=0))["message"] == "already asleep at level 0"
    with pytest.raises(InferenceServerException, match="the worker is asleep: retry on another worker"):
        await text_of(client, Call("decode", PROMPT, GREEDY))
    assert await text_of(client, call) == wanted  # of the aggregated worker, in float32
    assert await ask(server, "decode", "/engine/wake_up") == {"status": "ok", "message": "awake"}
    await placed(server, "decode", True)
    assert await ask(server, "decode", "/engine/wake_up") == {"status": "ok", "message": "already awake"}
    going_on.cancel()
    assert await _answers(going_on) == {wanted}
    assert await text_of(client, call) == wanted


async def _stream_of_requests(server: Server, call: Call) -> set[str]:
    answers: set[str] = set()
    async with connect(server.grpc_url) as client:
        try:
            while True:
                answers.add(await text_of(client, call))
        except asyncio.CancelledError:
            return answers


async def _answers(task: "asyncio.Task[set[str]]") -> set[str]:
    return await asyncio.wait_for(task, WAIT_S)


async def test_a_prefill_worker_with_blocks_that_nobody_pulls_serves_on(server: Server, client: Any) -> None:
    """It is rolled back after its bound; once the lease has ended, it sleeps. The decode worker prefills by itself meanwhile."""
    call = Call("router", PROMPT, GREEDY)
    wanted = await text_of(client, call)
    await prefill(client, Call("prefill", "An orphan. " + PROMPT, GREEDY))
    refused = await ask(server, "prefill", "/engine/sleep", level=0, blocks_timeout_s=1)
    assert refused["status"] == "error"
    assert "still held blocks or requests after 1 s" in refused["message"]
    assert refused["message"].endswith("it serves again")
    assert server.health("prefill")["status"] == "ready"
    await placed(server, "prefill", True)
    assert await prefill(client, Call("prefill", PROMPT[:60], GREEDY))
    started = time.monotonic()
    assert (await ask(server, "prefill", "/engine/sleep", level=0))["status"] == "ok"
    assert time.monotonic() - started < CALM_S
    assert await text_of(client, call) == wanted
    assert (await ask(server, "prefill", "/engine/wake_up"))["status"] == "ok"
    await placed(server, "prefill", True)
    assert await text_of(client, call) == wanted


def test_a_cpu_has_no_sleep_mode(server: Server) -> None:
    """501 with what is possible; the worker serves on."""
    answer = post_json(f"{server.admin_url('vllm')}/engine/sleep", {"level": 1})
    assert answer == {"status": "error", "message": "the platform cpu has no sleep mode: use level 0, which pauses and keeps all memory"}
    assert server.health("vllm")["status"] == "ready"


async def test_blocks_are_cleared_on_one_worker_and_on_all(server: Server, client: Any) -> None:
    """The next request finds nothing cached, and the router's index knows: of one worker, then of the whole fleet."""
    cached = Call("vllm", PROMPT + "Cleared.", GREEDY, returns=("num_cached_tokens",))
    await _cached_tokens(client, cached)
    assert await _cached_tokens(client, cached) > 0
    await asyncio.to_thread(wait_for, lambda: fleet(server)["vllm"]["index_blocks"] > 0, WAIT_S, "blocks in the index")
    assert await ask(server, "vllm", "/clear_kv_blocks") == {"status": "success", "message": "KV cache cleared"}
    await asyncio.to_thread(wait_for, lambda: fleet(server)["vllm"]["index_blocks"] == 0, WAIT_S, "an empty index")
    assert await _cached_tokens(client, cached) == 0
    assert await _cached_tokens(client, cached) > 0
    await asyncio.to_thread(wait_for, lambda: _clear_fleet(server)["status"] == "success", CALM_S, "all workers idle and cleared")
    assert await _cached_tokens(client, cached) == 0


async def _cached_tokens(client: Any, call: Call) -> int:
    return next(int(response["num_cached_tokens"][0]) for response in await collect(client, call) if "num_cached_tokens" in response)


def _clear_fleet(server: Server) -> dict[str, Any]:
    answer = dict(post_json(f"{server.state['router_urls'][0]}/clear_kv_blocks", {}))
    assert {worker["worker"].split("-")[0] for worker in answer["workers"]} == {"vllm", "prefill", "decode"}
    return answer
