# SPDX-License-Identifier: Apache-2.0
"""Tiers never change a text: many prompts through four tiers, each too small for them, against an engine without tiers.

Every tier must store, give up and serve blocks while that happens, by its own counters; else the test has shown nothing.
"""

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvbm_engine import BLOCK_SIZE, Answer, Engine
from models import make_lively_model
from s3s import S3, s3_server, tier_settings

pytestmark = pytest.mark.slow
log = logging.getLogger(__name__)

TIE_LOGPROB = 1e-3
TOKENS = 16
DOCUMENT_BLOCKS = 6
VOCABULARY = (1000, 40_000)


@dataclass(frozen=True)
class Scale:
    """How much of everything, in prompts and blocks."""

    prompts: int
    documents: int
    device: int
    host: int
    disk: int
    objects: int
    at_random: bool = False
    """Whether a document comes up again after any time, so that each tier is the one to have it; else in turn, which suits small tiers."""


SMALL = Scale(prompts=24, documents=8, device=40, host=16, disk=24, objects=40)
FULL = Scale(prompts=200, documents=40, device=64, host=32, disk=64, objects=160, at_random=True)


def make_prompts(scale: Scale) -> list[list[int]]:
    """Seeded: each begins with the first blocks of one of the documents, and goes on by itself; all documents come up again and again."""
    rng = random.Random(11)
    documents = [[rng.randrange(*VOCABULARY) for _ in range(DOCUMENT_BLOCKS * BLOCK_SIZE)] for _ in range(scale.documents)]
    prompts = []
    for i in range(scale.prompts):
        shared = BLOCK_SIZE * rng.randint(DOCUMENT_BLOCKS // 2, DOCUMENT_BLOCKS)
        document = rng.choice(documents) if scale.at_random else documents[i % scale.documents]
        prompts.append(document[:shared] + [rng.randrange(*VOCABULARY) for _ in range(rng.randint(1, 40))])
    return prompts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under which each token depends on all before it."""
    return make_lively_model(tmp_path_factory.mktemp("lively") / "model")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """Where the objects go."""
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The reference: no tiers, no prefix cache, nothing that could go stale."""
    with Engine(model, tmp_path_factory.mktemp("plain") / "engine.log", enable_prefix_caching=False) as engine:
        yield engine


def at_a_tie(engine: Engine, prompt: list[int], one: Answer, other: Answer) -> bool:
    """Whether the reference holds both tokens, where the texts first differ, for equally likely (see test_equality)."""
    same = next(i for i, (a, b) in enumerate(zip(one.ids, other.ids, strict=True)) if a != b)
    chances = engine.logprobs([*prompt, *one.ids[:same]])
    pair = [chances.get(answer.ids[same], float("-inf")) for answer in (one, other)]
    return abs(pair[0] - pair[1]) < TIE_LOGPROB


def check_that_texts_tell(engine: Engine, prompts: list[list[int]], texts: list[Answer]) -> None:
    """A wrong block must show: texts differ between prompts, and with the first block alone."""
    assert len({text.ids for text in texts}) > 0.9 * len(texts)
    for prompt, text in list(zip(prompts, texts, strict=True))[:8]:
        altered = [*prompts[-1][:BLOCK_SIZE], *prompt[BLOCK_SIZE:]]
        assert altered == prompt or engine.generate([altered], TOKENS)[0].ids != text.ids


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scale", [pytest.param(SMALL, id="24 prompts"), pytest.param(FULL, id="200 prompts", marks=pytest.mark.slow)])
def test_texts_are_those_without_tiers(plain: Engine, model: Path, s3: S3, tmp_path: Path, scale: Scale) -> None:
    """Greedy token ids, eight at a time, twice over, while every tier runs over. The counts are logged (`-o log_cli_level=INFO`)."""
    prompts = make_prompts(scale)
    expected = plain.generate(prompts, TOKENS)
    check_that_texts_tell(plain, prompts, expected)
    bucket = s3.make_bucket(f"determinism-{scale.prompts}")
    tiers = {
        "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": str(scale.host), "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": str(scale.disk),
        "DYN_KVBM_DISK_CACHE_DIR": str(tmp_path), "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "true",
        **tier_settings(s3.url, bucket), "DYN_KVBM_OBJECT_NUM_BLOCKS": str(scale.objects),
    }
    with Engine(model, tmp_path / "engine.log", tiers, num_gpu_blocks_override=scale.device, max_model_len=512) as engine:
        for turn in range(2):
            answers = engine.generate(prompts, TOKENS)
            differing = [trio for trio in zip(prompts, expected, answers, strict=True) if trio[1].ids != trio[2].ids]
            log.info("turn %d: %d of %d texts differ by a tie", turn, len(differing), len(prompts))
            for prompt, one, other in differing:
                assert at_a_tie(plain, prompt, one, other), f"{len(prompt)} tokens: {one} != {other}"
        check_that_every_tier_worked(engine, scale)
        assert len(s3.names(bucket)) <= scale.objects + 1 + engine.metric("kvbm_bucket_delete_failures")  # one for the ledger


def check_that_every_tier_worked(engine: Engine, scale: Scale) -> None:
    """Stored, evicted and served. The device and the host evicted if they took more blocks than they have."""
    counts = {name: engine.metric(name) for name in ("vllm:prefix_cache_hits", "kvbm_offload_blocks_d2h", "kvbm_onboard_blocks_h2d",
                                                     "kvbm_onboard_blocks_d2d", "kvbm_onboard_blocks_o2d")}
    for tier in ("DiskTier", "ObjectTier"):
        counts |= {f"{tier} {what}": engine.metric(f"kvbm_tier_{what}", tier=tier) for what in ("stored", "evicted", "loaded")}
    log.info("%s", counts)
    assert all(count > 0 for count in counts.values()), counts
    assert counts["kvbm_offload_blocks_d2h"] > max(scale.device, scale.host), counts
    assert engine.metric("kvbm_tier_corrupt") == 0
