# SPDX-License-Identifier: Apache-2.0
"""KV blocks come back from disk after a restart, and damaged files cost a prompt its hit, never its text."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from calls import Call, collect, connect
from prompts import BLOCK_SIZE, make_prompts
from servers import Server, post_json, serve, wait_for

pytestmark = pytest.mark.slow

PROMPT_TOKENS = 606
FULL_BLOCKS = PROMPT_TOKENS // BLOCK_SIZE
SIZES = ["--dtype", "float32", "--max-num-seqs", "16", "--max-num-batched-tokens", "256", "--max-model-len", "2048", "--routers", "0"]
SAMPLING = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
WAIT_S = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disk, which outlives the servers of this module."""
    return tmp_path_factory.mktemp("disk")


@contextmanager
def worker(run_dir: Path, folder: Path) -> Iterator[Server]:
    """One worker with a host and a disk tier, which takes every block."""
    disk = ["--disk-cache-gb", "1", "--disk-cache-dir", str(folder), "--disable-disk-offload-filter"]
    with serve(run_dir, "--mode", "agg", "--connector", "kvbm", "--cpu-cache-gb", "0.2", *disk, *SIZES) as running:
        yield running


async def answer(server: Server, prompt: list[int]) -> tuple[list[int], int]:
    """Token ids of the answer, and how many tokens of the prompt were not computed."""
    call: Any = Call("vllm", prompt=prompt, sampling=SAMPLING, returns=("output_ids", "num_cached_tokens"))
    async with connect(server.grpc_url) as client:
        parts = await collect(client, call)
    return [token for part in parts for token in part["output_ids"]], max(part["num_cached_tokens"][0] for part in parts)


def counted(server: Server, name: str) -> float:
    """A counter of the disk tier."""
    return server.metric("vllm", f"kvbm_tier_{name}_total")


def forget(server: Server) -> None:
    """Empties the tiers above the disk."""
    for level in ("G1", "G2"):
        assert post_json(f"{server.admin_url('vllm')}/kvbm", {"reset": level})["reset"]


def files(folder: Path) -> list[Path]:
    """Block files in the order in which they were last used."""
    return sorted(folder.rglob("*.kv"), key=lambda path: path.stat().st_mtime_ns)


def flip(path: Path) -> None:
    """One byte in the middle is another."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


async def test_a_prompt_comes_back_from_disk_after_a_restart_and_damage_changes_no_text(run_dir: Path, folder: Path) -> None:
    """The first process computes and writes; the second one reads; then files are damaged in every way while it runs."""
    [prompt] = make_prompts(1, PROMPT_TOKENS, PROMPT_TOKENS)
    with worker(run_dir, folder) as first:
        text, cached = await answer(first, prompt)
        assert cached == 0
        wait_for(lambda: counted(first, "stored") >= FULL_BLOCKS, WAIT_S, "the prompt's blocks on disk")
    assert len(files(folder)) >= FULL_BLOCKS
    with worker(run_dir, folder) as second:
        again, cached = await answer(second, prompt)
        assert again == text
        assert cached >= 0.95 * FULL_BLOCKS * BLOCK_SIZE
        wait_for(lambda: counted(second, "loaded") * BLOCK_SIZE >= cached, WAIT_S, "the count of loaded blocks")
        await damaged_files_cost_hits_only(second, folder, prompt, text)


async def damaged_files_cost_hits_only(server: Server, folder: Path, prompt: list[int], text: list[int]) -> None:
    """Every file of the tier is damaged, one way after another; each time the text is the same and a counter tells."""
    for damage, counter in ((flip, "corrupt"), (lambda path: os.truncate(path, 5000), "corrupt"), (Path.unlink, "missing")):
        before = counted(server, counter)
        wait_for(lambda: len(files(folder)) >= FULL_BLOCKS, WAIT_S, "the blocks on disk again")
        forget(server)
        for path in files(folder):
            damage(path)
        again, _ = await answer(server, prompt)
        assert again == text
        wait_for(lambda since=before, name=counter: counted(server, name) > since, WAIT_S, f"the count of {counter} blocks")
        forget(server)
        rewritten, _ = await answer(server, prompt)
        assert rewritten == text
    assert counted(server, "read_failures") == 0
