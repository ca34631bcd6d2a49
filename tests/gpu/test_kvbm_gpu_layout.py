# SPDX-License-Identifier: Apache-2.0
"""vLLM's `canonical_layout` under KvbmSpec: a block in host memory is the same for any number of tensor-parallel ranks.

The ranks of an engine stand side by side on one GPU here; their mappings are those that vLLM derives for them.
"""

import uuid
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.canonical_mapping import _layer_mapping, _RankContext  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402

from copy_contract import Image, Rig, Shape, caches_of, offloading_config  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

TOKENS, HEAD, BLOCKS = 16, 64, 12


def shards(heads: int, ranks: int, tokens_first: bool) -> list[Any]:
    """Each rank's KV cache of one layer as vLLM sees it, (blocks, heads, tokens, 2 x head): parts of one random whole."""
    whole = torch.randint(-(1 << 15), 1 << 15, (BLOCKS, heads, TOKENS, 2 * HEAD), dtype=torch.int16,
                          generator=torch.Generator().manual_seed(2)).view(torch.bfloat16)
    each = max(1, heads // ranks)
    parts = [whole[:, rank * heads // ranks : rank * heads // ranks + each] for rank in range(ranks)]
    if tokens_first:
        return [part.permute(0, 2, 1, 3).contiguous().to("cuda").permute(0, 2, 1, 3) for part in parts]
    return [part.contiguous().to("cuda") for part in parts]


def canonical_rigs(heads: int, ranks: int, tokens_first: bool, per_chunk: int) -> list[Rig]:
    """The ranks of one engine over one host tier, with the mappings that vLLM derives for them."""
    rigs, engine_id = [], f"test-{uuid.uuid4()}"
    for rank, cache in enumerate(shards(heads, ranks, tokens_first)):
        spec = FullAttentionSpec(block_size=TOKENS, num_kv_heads=cache.shape[1], head_size=HEAD, dtype=torch.bfloat16)
        context = _RankContext(tp_size=ranks, dcp_size=1, pcp_size=1, interleave=1, total_kv_heads=heads, rank=rank)
        mapping = _layer_mapping(spec, cache, BLOCKS, context)
        assert mapping is not None
        flat = (cache.permute(0, 2, 1, 3) if tokens_first else cache).reshape(BLOCKS, -1).view(torch.int8)
        assert flat.data_ptr() == cache.data_ptr(), "the worker must copy from the cache itself"
        shape = Shape(pages=(flat.shape[1],), groups=((0,),), blocks=BLOCKS, chunks=8, blocks_per_chunk=per_chunk)
        config = offloading_config(shape, engine_id, rank=rank, ranks=ranks, canonical=True)
        rigs.append(Rig(shape, caches_of([flat], [[(0, flat.shape[1], mapping)]]), config))
    return rigs


def exchanged(given: list[Rig], taking: list[Rig]) -> tuple[list[Image], list[Image]]:
    """Five blocks of one engine through a tier to another engine's: what those ranks have then, and what they should have."""
    size = given[0].shape.blocks_per_chunk
    chunks, sent, got = [5, 0, 3, 7, 2][: -(-5 // size)], [0, 1, 2, 3, 4], [11, 9, 10, 8, 7]
    expected = [rig.device()[0] for rig in taking]
    for image in expected:
        image[got] = image[sent]
    for rig in given:
        rig.store([sent], chunks)
    for rig in taking:
        rig.kv.tensors[0].tensor[:] = rig.kv.tensors[0].tensor  # what the load must leave alone is written, too
    width = min(given[0].host.shape[1], taking[0].host.shape[1])
    taking[0].host[:, :width] = given[0].host[:, :width]
    for rig in taking:
        rig.load([got], chunks)
    return [rig.device()[0] for rig in taking], expected


@pytest.mark.parametrize("per_chunk", [1, 3], ids="{} blocks per chunk".format)
@pytest.mark.parametrize("tokens_first", [True, False], ids=["tokens first", "heads first"])
@pytest.mark.parametrize(("heads", "ranks_from", "ranks_to"), [(4, 2, 1), (4, 1, 2), (4, 4, 2), (1, 2, 1), (1, 1, 2)])
def test_a_canonical_block_is_the_same_for_any_number_of_ranks(heads: int, ranks_from: int, ranks_to: int, tokens_first: bool,
                                                               per_chunk: int) -> None:  # fmt: skip
    """Ranks that hold parts of the heads (or all the one head) store one page together, which ranks of another number load."""
    given, taking = (canonical_rigs(heads, ranks, tokens_first, per_chunk) for ranks in (ranks_from, ranks_to))
    try:
        got, expected = exchanged(given, taking)
    finally:
        for rig in (*given, *taking):
            rig.close()
    assert all(np.array_equal(one, other) for one, other in zip(got, expected, strict=True))
