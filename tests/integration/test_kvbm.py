# SPDX-License-Identifier: Apache-2.0
"""KV blocks come back from host memory, on an aggregated worker and on the prefill worker of a disaggregated pair.

The model is random and small, with weights under which every token depends on all before it, so that a wrong block shows in the text.
"""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from calls import Call, collect, connect, gather_bounded
from models import make_lively_model
from prompts import BLOCK_SIZE, make_prompts
from servers import Server, get_json, post_json, serve, wait_for

pytestmark = pytest.mark.slow

PROMPT_TOKENS = 606
FULL_BLOCKS = PROMPT_TOKENS // BLOCK_SIZE
HOST_BLOCKS = 120
SIZES = ["--dtype", "float32", "--max-num-seqs", "16", "--max-num-batched-tokens", "256",
         "--cpu-cache-override-num-blocks", str(HOST_BLOCKS)]  # fmt: skip
SAMPLING: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
WAIT_S = 30
PAIR_TOKENS = 736
"""The longest request of the disaggregated pair, and what its devices hold: 23 blocks."""
BYTES = "vllm:nixl_bytes_transferred_sum"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model's folder."""
    return str(make_lively_model(tmp_path_factory.mktemp("lively") / "model"))


@pytest.fixture(scope="module")
def aggregated(run_dir: Path, model: str) -> Iterator[Server]:
    """One worker with a host tier."""
    with serve(run_dir, "--mode", "agg", "--model", model, "--connector", "kvbm", "--max-model-len", "2048", "--routers", "0",
               *SIZES) as running:
        yield running


@pytest.fixture
async def agg_client(aggregated: Server) -> AsyncIterator[Any]:
    """Its client."""
    async with connect(aggregated.grpc_url) as connected:
        yield connected


async def answer(client: Any, prompt: list[int], model: str = "vllm") -> tuple[list[int], int]:
    """Token ids of the answer, and how many tokens of the prompt were not computed."""
    parts = await collect(client, Call(model, prompt=prompt, sampling=SAMPLING, returns=("output_ids", "num_cached_tokens")))
    return [token for part in parts for token in part["output_ids"]], max(part["num_cached_tokens"][0] for part in parts)


def tier(server: Server, worker: str, level: str) -> dict[str, Any]:
    """What `/kvbm` says of a tier."""
    return {one["tier"]: one for one in get_json(f"{server.admin_url(worker)}/kvbm")["tiers"]}[level]


def offloaded(server: Server, worker: str, blocks: int) -> None:
    """Waits until so many blocks have reached the host tier: they are copied after the answer."""
    wait_for(lambda: tier(server, worker, "G2")["offloaded_blocks"] >= blocks, WAIT_S, f"{blocks} blocks in the host tier")


def reset(server: Server, worker: str, level: str) -> dict[str, Any]:
    """Empties a tier."""
    return dict(post_json(f"{server.admin_url(worker)}/kvbm", {"reset": level}))


async def test_a_prompt_comes_back_from_host_memory(aggregated: Server, agg_client: Any) -> None:
    """After the device's cache is emptied, at least 95 % of the full blocks are loaded, and the text is the same."""
    [prompt] = make_prompts(1, PROMPT_TOKENS, PROMPT_TOKENS)
    text, cached = await answer(agg_client, prompt)
    assert cached == 0
    offloaded(aggregated, "vllm", FULL_BLOCKS)
    assert reset(aggregated, "vllm", "G1") == {"tier": "G1", "reset": True}
    again, cached = await answer(agg_client, prompt)
    assert cached >= 0.95 * FULL_BLOCKS * BLOCK_SIZE
    assert again == text
    assert aggregated.metric("vllm", "kvbm_matched_tokens") == cached
    assert aggregated.metric("vllm", "kvbm_onboard_blocks_h2d") == cached // BLOCK_SIZE


async def test_an_emptied_host_tier_has_nothing(aggregated: Server, agg_client: Any) -> None:
    """Both caches reset, the prompt is computed anew: the same text."""
    prompt = make_prompts(2, PROMPT_TOKENS, PROMPT_TOKENS)[1]
    text, _ = await answer(agg_client, prompt)
    used = tier(aggregated, "vllm", "G2")["used_blocks"]
    assert used >= FULL_BLOCKS
    assert reset(aggregated, "vllm", "G2")["blocks"] >= used
    assert reset(aggregated, "vllm", "G1")["reset"]
    assert tier(aggregated, "vllm", "G2")["used_blocks"] == 0
    again, cached = await answer(agg_client, prompt)
    assert (again, cached) == (text, 0)


async def test_generated_blocks_are_offloaded_too(aggregated: Server, agg_client: Any) -> None:
    """The next turn sends the answer back, and finds it."""
    prompt = make_prompts(3, PROMPT_TOKENS, PROMPT_TOKENS)[2]
    before = tier(aggregated, "vllm", "G2")["offloaded_blocks"]
    text, _ = await answer(agg_client, prompt)
    turn = [*prompt, *text]
    full = (len(turn) - 1) // BLOCK_SIZE  # the last token's KV was never computed
    assert full > FULL_BLOCKS
    offloaded(aggregated, "vllm", before + full)
    assert reset(aggregated, "vllm", "G1")["reset"]
    _, cached = await answer(agg_client, [*turn, *prompt[:40]])
    assert cached == full * BLOCK_SIZE


async def test_eight_streams_with_a_host_tier_that_is_too_small(aggregated: Server, agg_client: Any) -> None:
    """Prompts of more blocks than the tier holds: blocks are given up, and every text stays the same."""
    prompts = make_prompts(12, 300, 700)
    total = sum(len(prompt) // BLOCK_SIZE for prompt in prompts)
    assert total > tier(aggregated, "vllm", "G2")["blocks"]
    alone = await gather_bounded(1, *(answer(agg_client, prompt) for prompt in prompts))
    for _ in range(2):
        reset(aggregated, "vllm", "G1")
        together = await gather_bounded(8, *(answer(agg_client, prompt) for prompt in prompts))
        differing = [i for i, (one, other) in enumerate(zip(alone, together, strict=True)) if one[0] != other[0]]
        assert differing == []


def test_a_tier_that_is_not_there_is_no_tier(aggregated: Server) -> None:
    """The sentence names it."""
    assert "no tier G3" in post_json(f"{aggregated.admin_url('vllm')}/kvbm", {"reset": "G3"})["error"]


@pytest.fixture(scope="module")
def pair(run_dir: Path, model: str) -> Iterator[Server]:
    """A prefill worker that offloads and hands over, and a decode worker that only takes. Their devices hold one prompt at a time."""
    device = ["--max-model-len", str(PAIR_TOKENS), "--num-gpu-blocks-override", str(PAIR_TOKENS // BLOCK_SIZE + 1)]
    with serve(run_dir, "--mode", "disagg", "--model", model, "--prefill-connector", "kvbm", "nixl", *device, *SIZES) as running:
        yield running


async def handed_over(server: Server, client: Any, prompt: list[int], model: str) -> tuple[list[int], float]:
    """Token ids of the answer, and how many bytes the decode worker pulled for it."""
    before = server.metric("decode", BYTES)
    text, _ = await answer(client, prompt, model)
    wait_for(lambda: server.metric("decode", BYTES) > before, WAIT_S, "the count of bytes pulled")
    return text, server.metric("decode", BYTES) - before


@pytest.mark.parametrize("entrance", ["disagg", "router"])
async def test_the_prefill_worker_loads_from_host_memory_and_hands_over(pair: Server, entrance: str) -> None:
    """The text is the same, and so much travels to the decode worker, whether prefill computed the prompt or loaded it."""
    prompts = make_prompts(4, PROMPT_TOKENS, PROMPT_TOKENS)
    prompt, other = prompts[:2] if entrance == "disagg" else prompts[2:]
    longest = [*other, *range(1000, 1000 + PAIR_TOKENS - SAMPLING["max_tokens"] - PROMPT_TOKENS)]
    async with connect(pair.grpc_url) as client:
        before = tier(pair, "prefill", "G2")["offloaded_blocks"]
        text, size = await handed_over(pair, client, prompt, entrance)
        offloaded(pair, "prefill", before + FULL_BLOCKS)
        await handed_over(pair, client, longest, entrance)  # takes every block of both devices
        wait_for(lambda: reset(pair, "prefill", "G1")["reset"], WAIT_S, "prefill's device cache reset, once the handoff was taken")
        matched = pair.metric("prefill", "kvbm_matched_tokens")
        assert await handed_over(pair, client, prompt, entrance) == (text, size)
    assert pair.metric("prefill", "kvbm_matched_tokens") - matched >= 0.95 * FULL_BLOCKS * BLOCK_SIZE
    assert "serve it with --connector kvbm" in get_json(f"{pair.admin_url('decode')}/kvbm")["error"]
