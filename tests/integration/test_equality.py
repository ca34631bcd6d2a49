# SPDX-License-Identifier: Apache-2.0
"""Disaggregated equals aggregated, token for token, and the KV blocks really travel."""

import json
from dataclasses import replace
from typing import Any

import pytest

from calls import Call, collect, gather_bounded, ids_of
from prompts import BLOCK_SIZE, make_prompts
from servers import Server

TIE_LOGPROB = 1e-3
CPU_MODEL_BYTES_PER_TOKEN = 2 * 30 * 3 * 64 * 4
"""K and V, 30 layers, 3 heads of 64, float32: what SmolLM2-135M keeps per token."""
BYTES, FAILED = "vllm:nixl_bytes_transferred_sum", "vllm:nixl_num_failed_transfers_total"


async def parts_at_a_tie(client: Any, prompt: list[int], one: list[int], other: list[int]) -> bool:
    """Whether the aggregated engine holds both tokens, where two answers first differ, for equally likely.

    Greedy choice between them is then up to the order of additions, which differs with the batch's shape and the CPU.
    """
    same = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    sampling = {"temperature": 0, "max_tokens": 1, "ignore_eos": True, "logprobs": 5}
    [answer, *_] = await collect(client, Call("vllm", prompt=[*prompt, *one[:same]], sampling=sampling, returns=("logprobs",)))
    [step] = json.loads(answer["logprobs"][0])
    chances = [step[str(token)]["logprob"] for token in (one[same], other[same])]
    return abs(chances[0] - chances[1]) < TIE_LOGPROB


@pytest.mark.parametrize(
    "count",
    [pytest.param(4, id="4 prompts"), pytest.param(50, id="50 prompts", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
async def test_disagg_equals_aggregated(server: Server, client: Any, count: int) -> None:
    """Greedy token ids are the same, and NIXL's own counters show the bytes of every prompt's blocks."""
    prompts = make_prompts(count, 10, 1500)
    before, failed_before = (server.metric("decode", name) for name in (BYTES, FAILED))
    call = Call("vllm", sampling={"temperature": 0, "max_tokens": 64, "ignore_eos": True}, returns=("output_ids",))
    aggregated = await gather_bounded(1, *(ids_of(client, replace(call, prompt=prompt)) for prompt in prompts))
    disagg = await gather_bounded(1, *(ids_of(client, replace(call, model="disagg", prompt=prompt)) for prompt in prompts))
    assert all(len(ids) == 64 for ids in aggregated)
    for prompt, one, other in zip(prompts, aggregated, disagg, strict=True):
        assert one == other or await parts_at_a_tie(client, prompt, one, other), f"{len(prompt)} tokens: {one} != {other}"
    moved = server.metric("decode", BYTES) - before
    full_blocks = sum(len(prompt) // BLOCK_SIZE for prompt in prompts)
    assert moved >= full_blocks * BLOCK_SIZE * CPU_MODEL_BYTES_PER_TOKEN
    assert server.metric("decode", FAILED) == failed_before
