# SPDX-License-Identifier: Apache-2.0
"""Blocks that come back from host memory and, after a restart, from disk to a real engine on a GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from kvbm_engine import Answer, Engine  # noqa: E402
from prompts import make_prompts  # noqa: E402
from servers import wait_for  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

WAIT_S = 60.0
PROMPT_TOKENS = 606
BLOCK = 16
FULL_TOKENS = PROMPT_TOKENS // BLOCK * BLOCK
MODELS: dict[str, dict[str, str]] = {"smollm2": {}, "8b": {"load_format": "dummy"}}
"""Blocks of SmolLM2's layers are 12 KiB (the kernel's way), those of the 8B shape 64 KiB (the driver's)."""


def model_folder(name: str, folder: Path) -> Path:
    """SmolLM2, or an 8B model's shape."""
    from benchmarks.shapes import make_8b_shape

    from tandem_cli.serve.embedded_model import embedded_model

    return embedded_model() if name == "smollm2" else make_8b_shape(embedded_model(), folder / "model")


def engine(model: Path, name: str, folder: Path, run: str) -> Engine:
    """With 1.5 GB of host memory and 3 GB of disk, which takes every block."""
    tiers = {"DYN_KVBM_CPU_CACHE_GB": "1.5", "DYN_KVBM_DISK_CACHE_GB": "3", "DYN_KVBM_DISK_CACHE_DIR": str(folder),
             "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "true"}
    sizes = {"dtype": "bfloat16", "block_size": BLOCK, "gpu_memory_utilization": 0.4, "max_model_len": 2048}
    return Engine(model, folder / f"{run}.log", tiers, **sizes, **MODELS[name])


def near(one: dict[int, float], other: dict[int, float]) -> bool:
    """Whether the same tokens are the likeliest, by the same chances but for the last bits of bfloat16."""
    best = max(one, key=lambda token: one[token])
    return best in other and abs(one[best] - other[best]) < 0.02


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_comes_back_from_host_memory_and_after_a_restart_from_disk(name: str, tmp_path: Path, note: Callable[[str], None]) -> None:
    """The text with blocks of the device's own cache, in batches of the same shape, is what the tiers must give."""
    [prompt] = make_prompts(1, PROMPT_TOKENS, PROMPT_TOKENS)
    model = model_folder(name, tmp_path)
    with engine(model, name, tmp_path, "first") as first:
        [computed] = first.generate([prompt], 40)
        [own] = first.generate([prompt], 40)
        chances = first.logprobs(prompt)
        assert (computed.cached, own.cached) == (0, FULL_TOKENS)
        wait_for(lambda: first.metric("kvbm_tier_stored", tier="DiskTier") * BLOCK >= FULL_TOKENS, WAIT_S, "the prompt's blocks on disk")
        first.reset_device()
        again, there = first.generate([prompt], 40)[0], first.logprobs(prompt)
        note(line(name, "host memory", again, own))
        assert again.cached >= 0.95 * FULL_TOKENS
        assert first.metric("kvbm_onboard_blocks_h2d") * BLOCK >= 0.95 * FULL_TOKENS
        assert near(chances, there)
        assert again.ids == own.ids
    with engine(model, name, tmp_path, "second") as second:
        again, there = second.generate([prompt], 40)[0], second.logprobs(prompt)
        note(line(name, "disk", again, own))
        assert again.cached >= 0.95 * FULL_TOKENS
        assert second.metric("kvbm_tier_loaded", tier="DiskTier") * BLOCK >= 0.95 * FULL_TOKENS
        assert second.metric("kvbm_tier_corrupt") == 0
        assert near(chances, there)
        assert again.ids == own.ids


def line(name: str, tier: str, again: Answer, own: Answer) -> str:
    """For the summary."""
    return (f"reuse {name} from {tier}: {again.cached} of {PROMPT_TOKENS} tokens not computed, {again.seconds:.3f} s with 40 tokens of "
            f"answer; {own.seconds:.3f} s from the device's own cache")
