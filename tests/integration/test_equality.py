# SPDX-License-Identifier: Apache-2.0
"""Disaggregated equals aggregated, token for token, and the KV blocks really travel."""

import random
from dataclasses import replace
from typing import Any

import pytest

from calls import Call, gather_bounded, ids_of
from servers import Server

BLOCK_SIZE = 32
CPU_MODEL_BYTES_PER_TOKEN = 2 * 30 * 3 * 64 * 4
"""K and V, 30 layers, 3 heads of 64, float32: what SmolLM2-135M keeps per token."""
WORDS = ("river", "stone", "lantern", "harbour", "copper", "winter", "letter", "garden", "signal", "mountain", "paper", "violin")


def make_prompts(count: int, shortest: int, longest: int) -> list[list[int]]:
    """Seeded prompts of `shortest` to `longest` tokens: ids of ordinary text, all different from the first block on."""
    from transformers import AutoTokenizer

    from tandem_cli.serve.embedded_model import embedded_model

    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    rng = random.Random(7)
    prompts = []
    for i in range(count):
        length = shortest + (longest - shortest) * i // max(1, count - 1)
        text = f"Chapter {i}. " + " ".join(rng.choice(WORDS) for _ in range(longest))
        prompts.append(list(tokenizer(text)["input_ids"][:length]))
    return prompts


@pytest.mark.parametrize(
    "count",
    [pytest.param(12, id="12 prompts"), pytest.param(50, id="50 prompts", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
async def test_disagg_equals_aggregated(server: Server, client: Any, count: int) -> None:
    """Greedy token ids are the same, and NIXL's own counters show the bytes of every prompt's blocks."""
    prompts = make_prompts(count, 10, 1500)
    before = server.metric("decode", "vllm:nixl_bytes_transferred_sum")
    call = Call("vllm", sampling={"temperature": 0, "max_tokens": 64, "ignore_eos": True}, returns=("output_ids",))
    aggregated = await gather_bounded(1, *(ids_of(client, replace(call, prompt=prompt)) for prompt in prompts))
    disagg = await gather_bounded(1, *(ids_of(client, replace(call, model="disagg", prompt=prompt)) for prompt in prompts))
    assert all(len(ids) == 64 for ids in aggregated)
    different = [i for i, (one, other) in enumerate(zip(aggregated, disagg, strict=True)) if one != other]
    assert different == []
    moved = server.metric("decode", "vllm:nixl_bytes_transferred_sum") - before
    full_blocks = sum(len(prompt) // BLOCK_SIZE for prompt in prompts)
    assert moved >= full_blocks * BLOCK_SIZE * CPU_MODEL_BYTES_PER_TOKEN
    assert server.metric("decode", "vllm:nixl_num_failed_transfers_total") == 0
