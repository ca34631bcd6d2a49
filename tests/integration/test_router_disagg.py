# SPDX-License-Identifier: Apache-2.0
"""One prefill and two decode engines behind the router, all real. Three engines are slow on two cores: part of the long suite."""

from pathlib import Path

import pytest

from calls import Call, connect, gather_bounded, ids_of
from servers import serve

PROMPTS = [f"Chapter {i}. " + "The ship sailed on over the wide sea. " * 20 for i in range(8)]
GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
BYTES = "vllm:nixl_bytes_transferred_sum"


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_one_prefill_and_two_decode_workers(tmp_path: Path, tiny_model: Path) -> None:
    """The router's answers equal the ensemble's, both decode workers took part, and blocks travelled to both."""
    limits = ["--max-model-len", "2048", "--max-num-seqs", "16", "--dtype", "float32"]
    with serve(tmp_path, "--mode", "disagg", "--decode", "2", "--model", str(tiny_model), *limits) as server:
        async with connect(server.grpc_url) as client:
            calls = [Call("router", prompt=prompt, sampling=GREEDY, returns=("output_ids",)) for prompt in PROMPTS]
            routed = await gather_bounded(4, *(ids_of(client, call) for call in calls))
            moved = [server.metric(name, BYTES) for name in ("decode", "decode_1")]
            ensemble = [await ids_of(client, Call("disagg", call.prompt, call.sampling, returns=call.returns)) for call in calls]
        assert routed == ensemble
        assert min(moved) > 0
