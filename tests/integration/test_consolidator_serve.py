# SPDX-License-Identifier: Apache-2.0
"""A worker with tiers, its consolidator beside it, and the router that hears it: the real engine, launcher and router."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

from calls import Call, collect, connect, text_of
from models import make_tiny_model
from prompts import BLOCK_SIZE, make_prompts
from servers import Server, free_ports, get_json, post_json, processes_with, serve, tandem, wait_for
from tandem_protocol.blocks import hash_blocks
from tandem_protocol.workers import EventSource, WorkerRecord
from tandem_router.feed import EventFeed
from tandem_router.index import KvIndex
from tandem_worker.shared_memory import mapped_files

pytestmark = pytest.mark.slow

PROMPT_TOKENS = 606
FULL_BLOCKS = PROMPT_TOKENS // BLOCK_SIZE
PROMPTS = make_prompts(4, PROMPT_TOKENS, PROMPT_TOKENS)
SAMPLING = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
WAIT_S = 60
TIERS = ("gpu", "cpu", "storage")


class Scene:
    """What consolidator and router say of the worker."""

    def __init__(self, server: Server, admin_port: int) -> None:
        self.server = server
        self._admin_port = admin_port

    def health(self) -> dict[str, Any]:
        """Of the consolidator; empty while there is none."""
        try:
            return dict(get_json(f"http://127.0.0.1:{self._admin_port}/health"))
        except OSError:
            return {}

    def index_blocks(self) -> int:
        """Blocks of the worker in the router's index, in any tier."""
        [worker] = get_json(f"{self.server.state['router_urls'][0]}/fleet")["workers"]
        return int(worker["index_blocks"])

    def stored(self) -> list[int]:
        """Blocks in host memory and on disk."""
        tiers = get_json(f"{self.server.admin_url('vllm')}/kvbm")["tiers"]
        return [int(tier["used_blocks"]) for tier in tiers if tier["tier"] != "G1"]

    def consolidator(self) -> psutil.Process | None:
        """The consolidator itself, without its supervisor."""
        found = [process for process in self.server.processes() if "tandem_kvbm.consolidator" in process.cmdline()]
        return found[0] if found else None

    def source(self) -> EventSource:
        """What the worker registered."""
        [path] = Path(self.server.run_dir, str(self.server.http_port), "discovery").glob("*.json")
        [source] = msgspec.convert(json.loads(path.read_bytes())["record"], WorkerRecord).event_sources
        return source


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """One worker with host and disk tiers, one router; ends with the check that nothing of the run is left."""
    run, model = tmp_path_factory.mktemp("consolidated"), make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
    admin = free_ports(30) + 25
    (run / "disk").mkdir()
    tiers = ["--connector", "kvbm", "--cpu-cache-gb", "0.05", "--disk-cache-gb", "0.2", "--disk-cache-dir", str(run / "disk"),
             "--disable-disk-offload-filter"]
    sizes = ["--mode", "agg", "--model", str(model), "--max-num-seqs", "8", "--max-num-batched-tokens", "512", "--max-model-len", "2048"]
    with serve(run, *sizes, *tiers, TANDEM_CONSOLIDATOR_ADMIN_PORT=str(admin)) as server:
        run_id = server.state["run_id"]
        yield Scene(server, admin)
        shared = mapped_files(process.pid for process in server.processes())
    assert processes_with(f"TANDEM_RUN_ID={run_id}") == []
    assert [path for path in shared if path.exists()] == []


@pytest.fixture
async def client(scene: Scene) -> AsyncIterator[Any]:
    """Of its gRPC."""
    async with connect(scene.server.grpc_url) as connected:
        yield connected


async def _ask(client: Any, prompt: list[int]) -> None:
    await collect(client, Call("router", prompt=prompt, sampling=SAMPLING, returns=("output_ids",)))


async def _overlap(client: Any, prompt: list[int]) -> dict[str, int]:
    """What the router knows the worker to hold of a prompt, by tier."""
    answer = json.loads(await text_of(client, Call("router", prompt=prompt, parameters={"router_query": True})))
    return dict(answer["worker"]["overlap_blocks"])


async def _until_overlap(client: Any, prompt: list[int], **wanted: int) -> None:
    found: dict[str, int] = {}
    async with asyncio.timeout(WAIT_S):
        while found != dict.fromkeys(TIERS, 0) | wanted:
            found = await _overlap(client, prompt)


def _reset(scene: Scene, level: str) -> None:
    assert post_json(f"{scene.server.admin_url('vllm')}/kvbm", {"reset": level})["reset"]


def test_the_record_names_the_consolidated_stream(scene: Scene) -> None:
    """The router's one source of this worker is the consolidator's port, not the engine's."""
    consolidator = scene.consolidator()
    assert consolidator is not None
    listens = {one.laddr.port for one in consolidator.net_connections() if one.status == psutil.CONN_LISTEN}
    source = scene.source()
    assert {int(endpoint.rpartition(":")[2]) for endpoint in (source.endpoint, source.replay_endpoint)} < listens


async def test_a_block_counts_in_the_fastest_tier_that_is_left(scene: Scene, client: Any) -> None:
    """On the device, then in host memory, then on disk; and nothing is counted as wrong on the way."""
    prompt, before = PROMPTS[0], scene.stored()
    await _ask(client, prompt)
    await _until_overlap(client, prompt, gpu=FULL_BLOCKS)
    await asyncio.to_thread(wait_for, lambda: all(now >= then + FULL_BLOCKS for now, then in zip(scene.stored(), before, strict=True)),
                            WAIT_S, "the prompt in both tiers")
    _reset(scene, "G1")
    await _until_overlap(client, prompt, cpu=FULL_BLOCKS)
    _reset(scene, "G2")
    await _until_overlap(client, prompt, storage=FULL_BLOCKS)
    counts = scene.health()["lanes"][0]["counts"]
    assert [counts[what] for what in ("mismatched", "refused", "expired", "unknown_removed")] == [0, 0, 0, 0]


async def test_a_killed_consolidator_comes_back_and_the_index_with_it(scene: Scene, client: Any) -> None:
    """No request notices. What the router knows then is what a newcomer is told: in every tier, by tokens."""
    await _ask(client, PROMPTS[1])
    await _until_overlap(client, PROMPTS[1], gpu=FULL_BLOCKS)
    victim = scene.consolidator()
    assert victim is not None
    victim.send_signal(signal.SIGKILL)
    await asyncio.to_thread(wait_for, lambda: not victim.is_running(), WAIT_S, "its end")
    await _ask(client, PROMPTS[2])
    await asyncio.to_thread(wait_for, lambda: bool(scene.health().get("ready")), WAIT_S, "another one")
    await _ask(client, PROMPTS[3])
    for prompt in PROMPTS[1:]:
        await _until_overlap(client, prompt, gpu=FULL_BLOCKS)
    await _until_overlap(client, PROMPTS[0], storage=FULL_BLOCKS)
    newcomer = _Newcomer(scene.source())
    try:
        for prompt in PROMPTS:
            wanted = tuple((await _overlap(client, prompt)).values())
            await asyncio.to_thread(wait_for, lambda prompt=prompt, wanted=wanted: newcomer.overlap(prompt) == wanted, WAIT_S, "the same")
        await asyncio.to_thread(wait_for, lambda: newcomer.blocks() == scene.index_blocks(), WAIT_S, "as many blocks, and no other ones")
    finally:
        newcomer.close()


class _Newcomer:
    """A router's feed and index, fresh: it asks for the whole state."""

    def __init__(self, source: EventSource) -> None:
        self._index = KvIndex()
        self._slot = self._index.add_worker("worker", source.dp_rank)
        self._feed = EventFeed(self._index)
        self._feed.start()
        self._feed.add("worker", source, self._slot)

    def overlap(self, prompt: list[int]) -> tuple[int, ...]:
        return tuple(self._index.match(hash_blocks(np.array(prompt, np.int32), BLOCK_SIZE)).blocks[:, self._slot].tolist())

    def blocks(self) -> int:
        return int(self._index.size(self._slot))

    def close(self) -> None:
        self._feed.close()


def test_a_port_of_a_consolidator_that_is_taken_is_said(scene: Scene, tmp_path: Path) -> None:
    """By a second run: exit code 2, one sentence, before any engine starts."""
    taken = int(scene.source().endpoint.rpartition(":")[2])
    first = free_ports(20)
    ports = ["--http-port", str(first), "--grpc-port", str(first + 1), "--metrics-port", str(first + 2), "--kv-event-port", str(first + 8),
             "--admin-port", str(first + 3), "--router-admin-port", str(first + 16)]
    done = tandem(tmp_path, "serve", "--detach", "--mode", "agg", "--connector", "kvbm", "--cpu-cache-gb", "0.01", *ports, timeout_s=60,
                  TANDEM_CONSOLIDATOR_PORT=str(taken), TANDEM_CONSOLIDATOR_ADMIN_PORT="0")
    assert done.returncode == 2, done.stderr
    assert f"port {taken} for consolidated KV events of worker 0 is in use by process" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
