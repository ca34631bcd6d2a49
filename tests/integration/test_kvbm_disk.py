# SPDX-License-Identifier: Apache-2.0
"""KV blocks come back from disk after a restart, and a damaged or full disk costs a prompt its hit, never its text.

The model is random and small, with weights under which every token depends on all before it, so that a wrong block shows in the text.
"""

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from calls import Call, collect, connect
from kvbm_engine import BLOCK_SIZE, Answer, Engine
from models import make_lively_model
from prompts import make_prompts
from servers import Server, serve, wait_for

pytestmark = pytest.mark.slow

PROMPT_TOKENS = 606
FULL_BLOCKS = PROMPT_TOKENS // BLOCK_SIZE
SAMPLING = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
BLOCKS = 20
TOKENS = 8
HOST_BLOCKS, DISK_BLOCKS = 64, 60
SIZES = {"max_model_len": 1024, "num_gpu_blocks_override": 96}
WAIT_S = 30
ANSWER_S = 20.0
"""Far more than a request takes that computes all by itself on a busy machine."""
MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder."""
    return make_lively_model(tmp_path_factory.mktemp("lively") / "model")


@contextmanager
def worker(run_dir: Path, model: Path, folder: Path) -> Iterator[Server]:
    """One worker with a host and a disk tier, which takes every block."""
    tiers = ["--connector", "kvbm", "--cpu-cache-override-num-blocks", str(HOST_BLOCKS), "--disk-cache-dir", str(folder),
             "--disk-cache-override-num-blocks", str(DISK_BLOCKS), "--disable-disk-offload-filter"]
    sizes = ["--dtype", "float32", "--max-num-seqs", "16", "--max-num-batched-tokens", "256", "--max-model-len", "1024", "--routers", "0"]
    with serve(run_dir, "--mode", "agg", "--model", str(model), *tiers, *sizes) as running:
        yield running


async def answer(server: Server, prompt: list[int]) -> tuple[list[int], int]:
    """Token ids of the answer, and how many tokens of the prompt were not computed."""
    call = Call("vllm", prompt=prompt, sampling=SAMPLING, returns=("output_ids", "num_cached_tokens"))
    async with connect(server.grpc_url) as client:
        parts = await collect(client, call)
    return [token for part in parts for token in part["output_ids"]], max(part["num_cached_tokens"][0] for part in parts)


async def test_a_prompt_comes_back_from_disk_after_a_restart(run_dir: Path, model: Path, tmp_path: Path) -> None:
    """The first process computes and writes; the second one finds the files and reads them: at least 95 % of the full blocks."""
    [prompt] = make_prompts(1, PROMPT_TOKENS, PROMPT_TOKENS)
    with worker(run_dir, model, tmp_path) as first:
        text, cached = await answer(first, prompt)
        assert cached == 0
        wait_for(lambda: first.metric("vllm", "kvbm_tier_stored_total") >= FULL_BLOCKS, WAIT_S, "the prompt's blocks on disk")
    assert len(files(tmp_path)) >= FULL_BLOCKS
    with worker(run_dir, model, tmp_path) as second:
        again, cached = await answer(second, prompt)
        assert again == text
        assert cached >= 0.95 * FULL_BLOCKS * BLOCK_SIZE
        wait_for(lambda: second.metric("vllm", "kvbm_tier_loaded_total") * BLOCK_SIZE >= cached, WAIT_S, "the count of loaded blocks")


def files(folder: Path) -> set[Path]:
    """Block files."""
    return set(folder.rglob("*.kv"))


def flip(path: Path) -> None:
    """One byte in the middle is another."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def make_prompt(number: int) -> list[int]:
    """Seeded; of so many full blocks and a few tokens more."""
    rng = random.Random(number)
    return [rng.randrange(1000, 40_000) for _ in range(BLOCKS * BLOCK_SIZE + 5)]


def tier_settings(folder: Path) -> dict[str, str]:
    """The environment of an engine whose disk tier is this folder."""
    return {"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": str(HOST_BLOCKS), "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": str(DISK_BLOCKS),
            "DYN_KVBM_DISK_CACHE_DIR": str(folder), "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "true"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the engine's disk tier."""
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def engine(model: Path, folder: Path) -> Iterator[Engine]:
    """An engine with a disk tier whose files the tests damage while it runs."""
    with Engine(model, folder.parent / f"{folder.name}.log", tier_settings(folder), **SIZES) as running:
        yield running


def counted(engine: Engine, name: str) -> float:
    """A counter of the disk tier."""
    return engine.metric(f"kvbm_tier_{name}", tier="DiskTier")


def write(engine: Engine, folder: Path, prompt: list[int], total: int) -> Answer:
    """Computes the prompt; its blocks are on disk when this returns, where there are `total` then, and nowhere else."""
    text = engine.generate([prompt], TOKENS)[0]
    wait_for(lambda: len(files(folder)) >= total, WAIT_S, f"{total} blocks on disk")
    engine.forget()
    return text


def counts_on(engine: Engine, name: str, before: float) -> None:
    """Waits for the counter to grow: it comes with an engine's step."""
    wait_for(lambda: counted(engine, name) > before, WAIT_S, f"the count of {name} blocks")


@pytest.mark.parametrize(("damage", "counter"), [(flip, "corrupt"), (lambda path: os.truncate(path, 5000), "corrupt"),
                                                (lambda path: os.truncate(path, 0), "corrupt"), (Path.unlink, "missing")],
                         ids=["flipped byte", "truncated", "empty", "removed"])  # fmt: skip
def test_damaged_files_cost_hits_only(engine: Engine, folder: Path, damage: Callable[[Path], None], counter: str) -> None:
    """Every file is damaged after the index has learned of it: the text is the same, a counter tells, and the blocks are written anew."""
    prompt = make_prompt(1)
    text, before = write(engine, folder, prompt, BLOCKS), counted(engine, counter)
    for path in files(folder):
        damage(path)
    again = engine.generate([prompt], TOKENS)[0]
    assert (again.ids, again.cached) == (text.ids, 0)
    assert again.seconds < ANSWER_S
    counts_on(engine, counter, before)
    wait_for(lambda: len(files(folder)) >= BLOCKS, WAIT_S, "whole files again")
    engine.forget()
    whole = engine.generate([prompt], TOKENS)[0]
    assert (whole.ids, whole.cached) == (text.ids, BLOCKS * BLOCK_SIZE)
    assert counted(engine, "read_failures") == 0


def test_a_load_that_fails_in_the_middle_is_recomputed_from_there(engine: Engine, folder: Path) -> None:
    """One block of twenty is damaged, and eight requests are waiting for it: what lies before it is loaded, the rest computed."""
    prompt, good = make_prompt(2), 7
    before = len(files(folder))
    write(engine, folder, prompt[:good * BLOCK_SIZE + 1], before + good)
    first = files(folder)
    write(engine, folder, prompt[:(good + 1) * BLOCK_SIZE + 1], before + good + 1)
    [eighth] = files(folder) - first
    text = write(engine, folder, prompt, before + BLOCKS)
    flip(eighth)
    corrupt = counted(engine, "corrupt")
    answers = engine.generate([prompt] * 8, TOKENS)
    assert {one.ids for one in answers} == {text.ids}
    assert min(one.cached for one in answers) == good * BLOCK_SIZE
    assert max(one.seconds for one in answers) < ANSWER_S
    counts_on(engine, "corrupt", corrupt)
    assert counted(engine, "corrupt") == corrupt + 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_costs_hits_only(model: Path, tmp_path: Path) -> None:
    """Somebody else fills it: a write fails, the tier makes do with what fits, every text is right, and the last prompt comes back."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True, timeout=WAIT_S)
    try:
        prompts = [make_prompt(10 + i) for i in range(4)]
        with Engine(model, tmp_path / "engine.log", tier_settings(disk), **SIZES) as engine:
            (disk / "filler").write_bytes(bytes(6 * MIB))  # leaves room for about thirty blocks
            texts = [engine.generate([prompt], TOKENS)[0] for prompt in prompts]
            counts_on(engine, "write_failures", 0)
            engine.forget()
            last = engine.generate([prompts[-1]], TOKENS)[0]
            assert last.ids == texts[-1].ids
            assert last.cached > 0
            engine.forget()
            assert [one.ids for one in engine.generate(prompts, TOKENS)] == [text.ids for text in texts]
            assert counted(engine, "evicted") > 0
            assert counted(engine, "corrupt") == counted(engine, "read_failures") == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True, timeout=WAIT_S)
