# SPDX-License-Identifier: Apache-2.0
"""The model `router` in a real tritonserver, over two real vLLM workers; in the end one of them is killed.

It knows them by etcd, or by a folder where etcd is not installed.
"""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from calls import PARIS_PROMPT, Call, begin_streams, collect, connect, responses, text_of
from etcds import BINARY, Etcd
from servers import Server, engine_of, get_json, serve, tandem, wait_for
from tandem_protocol.discovery.interface import LEASE_TTL_S

GREEDY = {"temperature": 0, "max_tokens": 48, "ignore_eos": True}
STREAMS = 8


@dataclass(frozen=True)
class Pair:
    """Two servers with a worker each; the router is in the first."""

    front: Server
    back: Server

    def fleet(self) -> list[dict[str, Any]]:
        """The workers as the router sees them."""
        return list(get_json(f"{self.front.state['router_urls'][0]}/fleet")["workers"])

    def placed(self) -> list[str]:
        """gRPC addresses of the workers in placement."""
        return [worker["grpc_url"] for worker in self.fleet() if worker["placed"]]


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd | None]:
    """That of both servers; None where it is not installed."""
    if BINARY is None:
        yield None
        return
    server = Etcd(tmp_path_factory.mktemp("etcd"))
    try:
        server.start()
        yield server
    finally:
        server.kill(wipe=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, etcd: Etcd | None) -> Iterator[Pair]:
    """Two servers that share one discovery, as two hosts would."""
    run, cores = tmp_path_factory.mktemp("routed"), sorted(os.sched_getaffinity(0))
    common = ["--mode", "agg", "--dtype", "float32", "--max-num-seqs", "16", "--max-num-batched-tokens", "256", "--max-model-len", "2048"]
    discovery = f"file:{run / 'discovery'}" if etcd is None else etcd.url
    with serve(run, *common, cores=str(cores[0]), TANDEM_DISCOVERY=discovery) as front, \
            serve(run, *common, "--routers", "0", cores=str(cores[-1]), TANDEM_DISCOVERY=discovery) as back:
        both = Pair(front, back)
        wait_for(lambda: len(both.placed()) == 2, 120, "both workers in placement")
        yield both


@pytest.fixture
async def router(pair: Pair) -> AsyncIterator[Any]:
    """A gRPC client."""
    async with connect(pair.front.grpc_url) as connected:
        yield connected


async def cached_tokens(client: Any, prompt: str) -> int:
    """What the worker that got the prompt says was cached."""
    [answer, *_] = await collect(client, Call("router", prompt=prompt, sampling={"max_tokens": 1}, returns=("num_cached_tokens",)))
    return int(answer["num_cached_tokens"][0])


async def test_the_router_answers_as_a_worker_does(router: Any) -> None:
    """Same tensors, same text."""
    through, direct = [await text_of(router, Call(model, prompt=PARIS_PROMPT, sampling=GREEDY)) for model in ("router", "vllm")]
    assert "Paris" in through
    assert through == direct


async def test_repeated_prefixes_go_to_the_worker_that_has_them(router: Any) -> None:
    """Four prefixes over two workers, each asked three times in turn: the workers' own counts prove it."""
    prefixes = [f"Story {i}. " + "The ship sailed on over the wide sea and nobody looked back. " * 12 for i in range(4)]
    first = [await cached_tokens(router, prefix) for prefix in prefixes]
    again = [await cached_tokens(router, f"{prefix}{tail}") for tail in ("And then", "But soon") for prefix in prefixes]
    assert max(first) < 32
    assert min(again) >= 128


async def test_a_query_says_where_and_why(router: Any) -> None:
    """Without sending the request there."""
    answer = json.loads(await text_of(router, Call("router", prompt=PARIS_PROMPT, parameters={"router_query": True})))
    assert answer["worker"]["triton_model"] == "vllm"
    assert sum(term["chosen"] for term in answer["worker"]["candidates"]) == 1
    assert {term["active_requests"] for term in answer["worker"]["candidates"]} == {0}


async def test_the_command_line_asks_the_router_and_can_go_direct(pair: Pair, router: Any) -> None:
    """`tandem route` explains, `tandem generate --direct` calls the worker itself: same answer as through the router."""
    url = ("--url", pair.front.grpc_url)
    explained = await asyncio.to_thread(tandem, pair.front.run_dir, "route", PARIS_PROMPT, *url)
    assert "generate on vllm at 127.0.0.1" in explained.stdout, explained.stderr
    through, direct = [await asyncio.to_thread(tandem, pair.front.run_dir, "generate", "Where is Paris?", *url, "--max-tokens", "8", *how)
                       for how in ((), ("--direct",))]
    assert (direct.returncode, direct.stdout) == (0, through.stdout), direct.stderr
    assert "tokens cached" in direct.stderr


async def test_bad_input_gets_its_error_through_the_router(router: Any) -> None:
    """From the router itself or from the worker; the next good request works."""
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"max_tokens": -1}, "max_tokens"), ({"lora_name": "none"}, "LoRA adapter"), ({"tempreture": 1}, "did you mean"))
    for sampling, message in cases:
        with pytest.raises(InferenceServerException, match=message):
            await collect(router, Call("router", sampling=sampling))
    with pytest.raises(InferenceServerException, match="unknown routing parameter"):
        await collect(router, Call("router", parameters={"router_wish": 1}))
    assert "Paris" in await text_of(router, Call("router", sampling=GREEDY))


async def test_a_cancelled_stream_frees_the_worker(pair: Pair, router: Any) -> None:
    """gRPC cancel at the router reaches the engine."""
    async for _ in responses(router, Call("router", sampling={**GREEDY, "max_tokens": 1500})):
        break
    servers = (pair.front, pair.back)
    await asyncio.to_thread(wait_for, lambda: all(one.health("vllm")["active"] == 0 for one in servers), 15, "both workers to be idle")


@pytest.mark.skipif(BINARY is None, reason="etcd is not installed (Debian: apt-get install etcd-server)")
async def test_no_request_is_lost_while_etcd_is_away(pair: Pair, router: Any, etcd: Etcd) -> None:
    """Killed in the middle of streams, away for longer than a lease, started again empty: answers go on, and nobody is forgotten."""
    running = await begin_streams(router, [Call("router", prompt=f"Tell me story {i}.", sampling=GREEDY) for i in range(STREAMS)])
    etcd.kill(wipe=True)
    away = time.monotonic()
    while time.monotonic() - away < LEASE_TTL_S + 2:
        assert "Paris" in await text_of(router, Call("router", sampling={**GREEDY, "max_tokens": 8}))
        assert len(pair.placed()) == 2
    assert all(await asyncio.gather(*running))
    await asyncio.to_thread(etcd.start)
    again = await begin_streams(router, [Call("router", prompt=f"Tell me fable {i}.", sampling=GREEDY) for i in range(STREAMS)])
    assert all(await asyncio.gather(*again))
    assert len(pair.placed()) == 2


async def test_streams_survive_the_death_of_their_engine(pair: Pair, router: Any) -> None:
    """kill -9 of one engine with eight streams running: every text equals the unbroken one."""
    calls = [Call("router", prompt=f"Tell me tale {i}.", sampling=GREEDY) for i in range(STREAMS)]
    running = await begin_streams(router, calls)
    assert pair.back.health("vllm")["active"] > 0
    engine_of(pair.back).send_signal(signal.SIGKILL)
    texts = await asyncio.gather(*running)
    async with connect(pair.front.grpc_url) as direct:
        assert texts == [await text_of(direct, replace(call, model="vllm")) for call in calls]
    await asyncio.to_thread(wait_for, lambda: pair.placed() == [pair.front.grpc_url], 60, "the dead worker to leave placement")
