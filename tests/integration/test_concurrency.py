# SPDX-License-Identifier: Apache-2.0
"""Many streams at once: all complete, in order, with the right text."""

import asyncio
from typing import Any

import pytest

from calls import Call, collect
from servers import Server, wait_for


@pytest.mark.parametrize("model", ["vllm", "disagg"])
async def test_64_concurrent_streams(server: Server, client: Any, model: str) -> None:
    """64 streams over 16 engine slots complete, and each one's token counts add up."""
    calls = [
        Call(model, prompt=f"Story number {i} begins.", sampling={"temperature": 0, "max_tokens": 8, "ignore_eos": True},
             returns=("num_output_tokens",))
        for i in range(64)
    ]
    streams = await asyncio.wait_for(asyncio.gather(*(collect(client, call) for call in calls)), 240)
    assert [sum(response["num_output_tokens"][0] for response in stream) for stream in streams] == [8] * 64
    wait_for(lambda: server.health("decode" if model == "disagg" else "vllm")["active"] == 0, 5, "nothing in flight")
