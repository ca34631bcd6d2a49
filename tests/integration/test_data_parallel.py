# SPDX-License-Identifier: Apache-2.0
"""A worker of two data-parallel ranks behind the router: real engines, two random layers each. Both share the test machine's cores."""

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tritonclient.utils import InferenceServerException

from calls import Call, collect, connect, text_of
from data_parallel import SAMPLING, WAIT_S, cached, core, of_rank, on_rank, record, streaming
from models import make_tiny_model
from prompts import BLOCK_SIZE, make_prompts
from servers import Server, command_of, get_json, processes_with, serve, tandem, wait_for
from tandem_worker.shared_memory import mapped_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

HANG_S = 6.0
SEEN_WITHIN_S = HANG_S + 5.0
GONE_WITHIN_S = 45.0
RANKS = (0, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Starts and steps fast."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def serve_ranks(folder: Path, model: Path) -> Any:
    """One aggregated worker of two ranks, and a router."""
    arguments = ["--mode", "agg", "--model", str(model), "--data-parallel-size", "2", "--max-model-len", "2048", "--max-num-seqs", "16"]
    return serve(folder, *arguments, TANDEM_HANG_TIMEOUT_S=f"{HANG_S:g}", DYN_HEALTH_CHECK_ENABLED="1", DYN_CANARY_WAIT_TIME="2",
                 DYN_HEALTH_CHECK_REQUEST_TIMEOUT="30")


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Server]:
    """For all tests but those that kill."""
    with serve_ranks(tmp_path_factory.mktemp("ranked"), model) as server:
        yield server


@pytest.fixture
async def client(ranked: Server) -> AsyncIterator[Any]:
    """Of its gRPC."""
    async with connect(ranked.grpc_url) as connected:
        yield connected


def test_every_rank_is_announced(ranked: Server) -> None:
    """With event ports of its own in the record, and each with its share of the blocks in the router and of the metrics."""
    known = record(ranked)
    ports = [int(source.endpoint.rpartition(":")[2]) for source in known.event_sources]
    assert [source.dp_rank for source in known.event_sources] == list(RANKS)
    assert ports == [ports[0], ports[0] + 1]
    listening = {one.laddr.port for rank in RANKS for one in core(ranked, rank).net_connections() if one.status == psutil.CONN_LISTEN}
    assert {*ports, *(port + 1000 for port in ports)} <= listening
    [worker] = get_json(f"{ranked.state['router_urls'][0]}/fleet")["workers"]
    assert worker["placed"]
    blocks = [_blocks_of_rank(ranked, rank) for rank in RANKS]
    assert min(blocks) > 0
    assert sum(blocks) == known.total_blocks
    assert [rank["dp_rank"] for rank in ranked.health("vllm")["ranks"]] == list(RANKS)
    assert all(of_rank(ranked, "vllm:iteration_tokens_total_count", rank) > 0 for rank in RANKS), "the router's probe went to each"


def _blocks_of_rank(server: Server, rank: int) -> int:
    """As its EngineCore logs them; vLLM's metric repeats the sum for each rank."""
    [tokens] = re.findall(rf"\(EngineCore_DP{rank} .*CPU KV cache size: ([\d,]+) tokens", server.log)
    return int(tokens.replace(",", "")) // BLOCK_SIZE


async def test_a_prefix_is_sent_to_the_rank_that_has_it(ranked: Server, client: Any) -> None:
    """The rank's own count of cached tokens proves it, of eight prompts that lie on both ranks."""
    prompts = make_prompts(8, 200, 400)
    before = [of_rank(ranked, "vllm:prompt_tokens_total", rank) for rank in RANKS]
    for prompt in prompts:
        await text_of(client, Call("router", prompt, SAMPLING))
    computed = [of_rank(ranked, "vllm:prompt_tokens_total", rank) - then for rank, then in zip(RANKS, before, strict=True)]
    assert min(computed) > 0, f"one rank got everything: {computed}"
    for prompt in prompts:
        turn = Call("router", [*prompt, 5, 6, 7], SAMPLING, returns=("num_cached_tokens",))
        assert await cached(client, turn) == len(prompt) // BLOCK_SIZE * BLOCK_SIZE


async def test_a_named_rank_serves_the_request(client: Any) -> None:
    """Its cache is its own; a rank that isn't there is refused with those that are."""
    [prompt] = make_prompts(9, 300, 300)[8:]
    assert [await cached(client, on_rank(prompt, rank)) for rank in (0, 1, 0, 1)] == [0, 0, 288, 288]
    with pytest.raises(InferenceServerException, match="data_parallel_rank 2 is not served by this worker: its ranks are 0 to 1"):
        await cached(client, on_rank(prompt, 2))


async def test_sequences_of_one_request_share_its_rank(ranked: Server, client: Any) -> None:
    """And so its prompt's blocks: the other rank computes nothing."""
    [prompt] = make_prompts(10, 300, 300)[9:]
    before = [of_rank(ranked, "vllm:generation_tokens_total", rank) for rank in RANKS]
    await collect(client, Call("vllm", prompt, {**SAMPLING, "n": 4, "temperature": 1.0, "max_tokens": 50}))
    tokens = [of_rank(ranked, "vllm:generation_tokens_total", rank) - then for rank, then in zip(RANKS, before, strict=True)]
    assert max(tokens) >= 200
    assert min(tokens) < 10, "a canary at most"


async def test_requests_without_a_rank_go_to_the_least_loaded(ranked: Server) -> None:
    """Two of four on each."""
    async with streaming(ranked, (None, None, None, None)):
        ranks = (await asyncio.to_thread(ranked.health, "vllm"))["ranks"]
        assert [rank["in_engine"] for rank in ranks] == [2, 2]
        assert [rank["running"] for rank in ranks] == [2, 2]


def test_canaries_ask_every_rank(ranked: Server) -> None:
    """An idle rank that is stopped makes the worker unwell, though the other answers; continued, it is well again."""
    for rank in RANKS:
        before = of_rank(ranked, "vllm:request_success_total", rank)
        wait_for(lambda: of_rank(ranked, "vllm:request_success_total", rank) > before, WAIT_S, "a canary")  # noqa: B023 - within the iteration
    assert ranked.health("vllm")["status"] == "ready"


async def test_the_death_of_the_ranks_coordinator_is_survived(ranked: Server, client: Any) -> None:
    """vLLM's process between the ranks only passes figures on, of dense models; the worker chooses ranks by its own."""
    [stub] = {core(ranked, rank).parent() for rank in RANKS}
    coordinator = next(child for child in stub.children() if "DPCoordinator" in command_of(child))
    coordinator.kill()
    [prompt] = make_prompts(11, 300, 300)[10:]
    assert [await cached(client, on_rank(prompt, rank)) for rank in (0, 1, 0, 1)] == [0, 0, 288, 288]
    async with streaming(ranked, (None, None)):
        ranks = (await asyncio.to_thread(ranked.health, "vllm"))["ranks"]
        assert [rank["in_engine"] for rank in ranks] == [1, 1]
    assert ranked.health("vllm")["status"] == "ready"


async def test_the_steps_of_one_rank_do_not_hide_the_silence_of_another(ranked: Server) -> None:
    """SIGSTOP of rank 1 in mid-stream while rank 0 goes on: seen within its bound, named, and the server ends with all of it."""
    run_id = f"TANDEM_RUN_ID={ranked.state['run_id']}"
    async with streaming(ranked, (0, 1)) as tasks:
        steps = of_rank(ranked, "vllm:generation_tokens_total", 0)
        core(ranked, 1).send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        with pytest.raises(InferenceServerException, match="data-parallel rank 1 of the engine hangs"):
            await asyncio.wait_for(tasks[1], SEEN_WITHIN_S)
        assert time.monotonic() - stopped > HANG_S - 2
        assert of_rank(ranked, "vllm:generation_tokens_total", 0) > steps, "rank 0 went on"
    await asyncio.to_thread(wait_for, lambda: not processes_with(run_id), GONE_WITHIN_S, "no process left")


def _server(server: Server) -> psutil.Process:
    return psutil.Process(server.pid)


@pytest.mark.parametrize("victim", [lambda server: core(server, 1), _server], ids=["rank", "tritonserver"])
async def test_no_rank_outlives_its_worker(tmp_path: Path, model: Path, victim: Callable[[Server], psutil.Process]) -> None:
    """Whatever ends it, in mid-stream on both ranks: every stream ends, and neither a process nor shared memory is left."""
    with serve_ranks(tmp_path, model) as server:
        run_id = f"TANDEM_RUN_ID={server.state['run_id']}"
        engines = [process for rank in RANKS for process in (core(server, rank), *core(server, rank).children(recursive=True))]
        mapped = mapped_files(process.pid for process in server.processes())
        async with streaming(server, RANKS) as tasks:
            victim(server).kill()
            done, pending = await asyncio.wait(tasks, timeout=GONE_WITHIN_S)
            assert (len(done), len(pending)) == (2, 0)
        await asyncio.to_thread(wait_for, lambda: not processes_with(run_id), GONE_WITHIN_S, f"no process left: {processes_with(run_id)}")
        await asyncio.to_thread(wait_for, lambda: not any(map(psutil.Process.is_running, engines)), WAIT_S, "no rank left")
        assert [path for path in mapped if path.exists()] == []


def test_one_rank_of_a_dense_model_per_host_is_refused(tmp_path: Path, model: Path) -> None:
    """Which only vLLM's own configuration tells from a mixture of experts; before engines start, that would die of an assertion."""
    lonely = ["--data-parallel-size", "2", "--data-parallel-size-local", "1", "--data-parallel-hybrid-lb"]
    with pytest.raises(AssertionError, match="vLLM has no single data-parallel rank of a dense model per host"), \
            serve(tmp_path, "--mode", "agg", "--routers", "0", "--model", str(model), *lonely):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--data-parallel-size", "0"], "data_parallel_size must be a positive integer"),
     (["--data-parallel-size", "2", "--data-parallel-rank", "2"], "data_parallel_rank must be a rank below data_parallel_size"),
     (["--data-parallel-size", "2", "--data-parallel-size-local", "1"], "a leader and its followers meet at data_parallel_address"),
     (["--data-parallel-size", "2", "--data-parallel-hybrid-lb"], "data_parallel_hybrid_lb needs data_parallel_size_local"),
     (["--data-parallel-size", "2", "--headless"], "headless needs data_parallel_size_local and data_parallel_start_rank"),
     (["--data-parallel-size", "2", "--data-parallel-backend", "ray"], "its processes are not this worker's")],
)
def test_serve_refuses_in_one_sentence(tmp_path: Path, model: Path, arguments: list[str], message: str) -> None:
    """Before anything starts."""
    done = tandem(tmp_path, "serve", "--detach", "--mode", "agg", "--model", str(model), *arguments, timeout_s=60)
    assert (done.returncode, message in done.stderr, len(done.stderr.strip().splitlines())) == (2, True, 1), done.stderr
