# SPDX-License-Identifier: Apache-2.0
"""One prefill and two decode engines behind the router, all real; in the end one decode engine is killed.

Three engines are slow on two cores: part of the long suite.
"""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from calls import Call, begin_streams, collect, connect, gather_bounded, ids_of, text_of
from models import make_lively_model
from prompts import BLOCK_SIZE, make_prompts
from servers import Server, engine_of, get_json, serve, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

THRESHOLD = 150
"""Tokens from which on a prompt is prefilled remotely."""
GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
BYTES, PREFILLED = "vllm:nixl_bytes_transferred_sum", "vllm:prompt_tokens_total"
STREAMS = 8
WAIT_S = 30.0
POLL_S = 0.05


@dataclass(frozen=True)
class Trio:
    """Two servers: prefill, decode and the router in the first, another decode worker in the second."""

    front: Server
    back: Server

    def placed(self) -> list[str]:
        """gRPC addresses of the workers in placement."""
        return [worker["grpc_url"] for worker in get_json(f"{self.front.state['router_urls'][0]}/fleet")["workers"] if worker["placed"]]

    @property
    def prefilled(self) -> int:
        """Prompt tokens that the prefill worker was sent."""
        return int(self.front.metric("prefill", PREFILLED))

    @property
    def pulled(self) -> tuple[int, int]:
        """Bytes that each decode worker pulled over NIXL."""
        return int(self.front.metric("decode", BYTES)), int(self.back.metric("decode", BYTES))


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    """Conditional disaggregation: decode workers publish what they hold, and the router leaves short prompts to them."""
    run, model = tmp_path_factory.mktemp("trio"), make_lively_model(tmp_path_factory.mktemp("lively") / "model")
    common = ["--model", str(model), "--conditional-disagg", "--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "16"]
    settings = {"TANDEM_DISCOVERY": f"file:{run / 'discovery'}", "DYN_ROUTER_CONDITIONAL_DISAGG": "true",
                "TANDEM_CONDITIONAL_DISAGG_TOKENS": str(THRESHOLD)}
    with serve(run, "--mode", "disagg", *common, **settings) as front, serve(run, "--is-decode-worker", *common, **settings) as back:
        both = Trio(front, back)
        wait_for(lambda: len(both.placed()) == 3, 120, "all workers in placement")
        yield both


@pytest.fixture
async def client(trio: Trio) -> AsyncIterator[Any]:
    """Of the server with the router."""
    async with connect(trio.front.grpc_url) as connected:
        yield connected


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Above the threshold, all different."""
    return make_prompts(8, 180, 400)


def call(prompt: list[int], model: str = "router") -> Call:
    """One greedy request."""
    return Call(model, prompt=prompt, sampling=GREEDY, returns=("output_ids",))


async def query(client: Any, prompt: list[int]) -> dict[str, Any]:
    """Where the request would go, and why."""
    return dict(json.loads(await text_of(client, Call("router", prompt=prompt, parameters={"router_query": True}))))


async def test_long_prompts_are_prefilled_remotely(trio: Trio, client: Any, prompts: list[list[int]]) -> None:
    """All on the prefill worker, pulled by both decode workers; the text is that of the ensemble and of one worker alone."""
    before, prefilled = trio.pulled, trio.prefilled
    routed = await gather_bounded(4, *(ids_of(client, call(prompt)) for prompt in prompts))
    assert trio.prefilled - prefilled == sum(len(prompt) for prompt in prompts)
    assert all(now > then for now, then in zip(trio.pulled, before, strict=True))
    assert routed == [await ids_of(client, call(prompt, "disagg")) for prompt in prompts]
    async with connect(trio.back.grpc_url) as direct:
        assert routed == [await ids_of(direct, call(prompt, "decode")) for prompt in prompts]


async def test_a_short_prompt_is_prefilled_by_its_decode_worker(trio: Trio, client: Any, prompts: list[list[int]]) -> None:
    """Nothing reaches the prefill worker, nothing travels, and the text is one worker's."""
    short = prompts[0][-THRESHOLD + 1:]
    answer = await query(client, short)
    assert not answer["prefill"]["remote"]
    assert f"149 of 149 tokens are not cached on the decode worker: < {THRESHOLD}" in answer["prefill"]["reason"]
    before = trio.prefilled, trio.pulled
    routed = await ids_of(client, call(short))
    assert (trio.prefilled, trio.pulled) == before
    async with connect(trio.back.grpc_url) as direct:
        assert routed == await ids_of(direct, call(short, "decode"))


async def test_a_prompt_that_a_decode_worker_holds_is_not_prefilled_again(trio: Trio, client: Any) -> None:
    """However long: its decode worker's events told the router, and its own count of cached tokens proves it."""
    [prompt] = make_prompts(1, 500, 500)[::-1]
    prompt = prompt[100:]
    full = len(prompt) // BLOCK_SIZE * BLOCK_SIZE
    prefilled = trio.prefilled
    first = await collect(client, call(prompt))
    assert trio.prefilled - prefilled == len(prompt)
    turn = [*prompt, *(token for part in first for token in part["output_ids"]), *prompt[:40]]
    deadline = time.monotonic() + WAIT_S
    while (await query(client, turn))["prefill"]["remote"]:
        assert time.monotonic() < deadline, "the router never heard that a decode worker holds the prompt"
        await asyncio.sleep(POLL_S)
    before = trio.prefilled, trio.pulled
    again = await collect(client, Call("router", prompt=turn, sampling=GREEDY, returns=("output_ids", "num_cached_tokens")))
    assert (trio.prefilled, trio.pulled) == before
    assert max(part["num_cached_tokens"][0] for part in again) >= full
    async with connect(trio.back.grpc_url) as direct:
        assert [token for part in again for token in part["output_ids"]] == await ids_of(direct, call(turn, "decode"))


async def test_streams_survive_the_death_of_a_decode_engine(trio: Trio, client: Any) -> None:
    """kill -9 with eight streams running on both: every text equals the unbroken one."""
    calls = [Call("router", prompt=prompt, sampling={**GREEDY, "max_tokens": 1000}) for prompt in make_prompts(STREAMS, 160, 200)]
    running = await begin_streams(client, calls)
    assert min(server.health("decode")["active"] for server in (trio.front, trio.back)) > 0
    engine_of(trio.back).send_signal(signal.SIGKILL)
    texts = await asyncio.gather(*running)
    async with connect(trio.front.grpc_url) as direct:
        assert texts == await gather_bounded(STREAMS, *(text_of(direct, replace(one, model="decode")) for one in calls))
    await asyncio.to_thread(wait_for, lambda: trio.back.grpc_url not in trio.placed(), 60, "the dead worker to leave placement")
