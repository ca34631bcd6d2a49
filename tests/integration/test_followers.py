# SPDX-License-Identifier: Apache-2.0
"""Two hosts played on one: a worker whose second rank runs without endpoints in a `tandem serve --headless` of its own."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from grpc.aio import AioRpcError
from tritonclient.utils import InferenceServerException

from calls import Call, collect, connect, text_of
from data_parallel import SAMPLING, cached, of_rank, record, streaming
from models import make_tiny_model
from prompts import BLOCK_SIZE, make_prompts
from servers import Server, command_of, free_ports, get_json, get_text, processes_with, serve, tandem, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

HANG_S = 6.0
SEEN_WITHIN_S = HANG_S + 10.0
GONE_WITHIN_S = 60.0
RANKS = (0, 1)
_LEADERS_PORTS = 40
"""The follower's begin above these."""


@dataclass
class Pair:
    """A leader of ranks 0 and 1, and the follower that runs rank 1."""

    leader: Server
    follower: Server
    serving: "subprocess.Popen[bytes]"
    """`tandem serve --headless` in the foreground."""
    admin: str

    def core(self) -> psutil.Process:
        """The follower's engine."""
        return next(process for process in self.follower.processes() if "EngineCore_DP1" in command_of(process))

    def marks(self) -> list[str]:
        """What the environment of all processes of both says."""
        return [f"TANDEM_RUN_ID={server.state['run_id']}" for server in (self.leader, self.follower)]


@contextmanager
def lead_and_follow(folder: Path, model: Path) -> Iterator[Pair]:
    """Both, with a router beside the leader; the follower is started first, since either waits for the other."""
    first = free_ports(_LEADERS_PORTS + 20)
    base = first + _LEADERS_PORTS
    ranks = ["--mode", "agg", "--model", str(model), "--max-model-len", "2048", "--data-parallel-size", "2",
             "--data-parallel-size-local", "1", "--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(base + 19)]
    environment = {**os.environ, "TANDEM_RUN_DIR": str(folder / "follower"), "TANDEM_HANG_TIMEOUT_S": f"{HANG_S:g}"}
    own = ["--headless", "--data-parallel-start-rank", "1", "--http-port", str(base), "--admin-port", str(base + 3),
           "--kv-event-port", str(base + 8), "--leader-url", f"http://127.0.0.1:{first + 3}"]
    folder.joinpath("follower").mkdir()
    with (folder / "out").open("wb") as out:
        serving = subprocess.Popen([sys.executable, "-m", "tandem_cli.main", "serve", *ranks, *own], env=environment,
                                   stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    follower = Server(folder / "follower", base, base + 1, base + 2)
    try:
        with serve(folder / "leader", *ranks, TANDEM_HANG_TIMEOUT_S=f"{HANG_S:g}") as leader:
            assert leader.http_port == first
            yield Pair(leader, follower, serving, f"http://127.0.0.1:{base + 3}")
    finally:
        serving.terminate()
        serving.wait(GONE_WITHIN_S)
        tandem(folder / "follower", "stop", "--http-port", str(base), "--drain-timeout-s", "0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Starts and steps fast."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Pair]:
    """For the tests that leave both alive, and the last, which doesn't."""
    with lead_and_follow(tmp_path_factory.mktemp("pair"), model) as running:
        yield running


def test_the_leader_announces_the_followers_rank(pair: Pair) -> None:
    """With its events at the follower's port, in the router's placement; the follower itself announces nothing."""
    known = record(pair.leader)
    follower_port = pair.follower.http_port + 8
    ports = [int(source.endpoint.rpartition(":")[2]) for source in known.event_sources]
    assert ([source.dp_rank for source in known.event_sources], ports[1]) == ([0, 1], follower_port)
    assert {follower_port, follower_port + 1000} <= {one.laddr.port for one in pair.core().net_connections() if one.status == "LISTEN"}
    [worker] = get_json(f"{pair.leader.state['router_urls'][0]}/fleet")["workers"]
    assert worker["placed"]
    assert [rank["dp_rank"] for rank in pair.leader.health("vllm")["ranks"]] == list(RANKS)
    assert not (pair.follower.run_dir / str(pair.follower.http_port) / "discovery").exists()


def test_a_follower_tells_of_itself(pair: Pair) -> None:
    """Like a worker, at its admin port, and nothing else listens but what vLLM opens between engines."""
    health = get_json(f"{pair.admin}/health")
    assert health == {"status": "following", "ranks": "rank 1", "role": "aggregated", "leader": pair.leader.admin_url("vllm")}
    assert get_json(f"{pair.admin}/live") == {"status": "following"}
    assert "python_info" in get_text(f"{pair.admin}/metrics")
    assert any("tandem_worker.guard" in command_of(process) for process in pair.follower.processes())


async def test_prefixes_are_sent_to_the_host_that_has_them(pair: Pair) -> None:
    """Eight prompts lie on both; each comes back to its rank, whose own count of cached tokens proves it."""
    async with connect(pair.leader.grpc_url) as client:
        prompts = make_prompts(8, 200, 400)
        before = [of_rank(pair.leader, "vllm:prompt_tokens_total", rank) for rank in RANKS]
        for prompt in prompts:
            await text_of(client, Call("router", prompt, SAMPLING))
        computed = [of_rank(pair.leader, "vllm:prompt_tokens_total", rank) - then for rank, then in zip(RANKS, before, strict=True)]
        assert min(computed) > 0, f"one rank got everything: {computed}"
        for prompt in prompts:
            turn = Call("router", [*prompt, 5, 6, 7], SAMPLING, returns=("num_cached_tokens",))
            assert await cached(client, turn) == len(prompt) // BLOCK_SIZE * BLOCK_SIZE


async def test_both_end_when_the_leader_is_told_to(pair: Pair) -> None:
    """After the drain: a stream on the follower's rank comes to its end, and then the follower is let go, with 0."""
    marks = pair.marks()
    async with connect(pair.leader.grpc_url) as client:
        sampling = {**SAMPLING, "max_tokens": 300, "data_parallel_rank": 1}
        stream = asyncio.create_task(collect(client, Call("vllm", [7, 8, 9], sampling, returns=("num_output_tokens",))))
        await asyncio.to_thread(wait_for, lambda: pair.leader.health("vllm")["active"] > 0, GONE_WITHIN_S, "the stream")
        psutil.Process(pair.leader.pid).terminate()
        parts = await stream
        assert sum(int(part["num_output_tokens"][0]) for part in parts if "num_output_tokens" in part) == 300
    code = await asyncio.to_thread(pair.serving.wait, GONE_WITHIN_S)
    await asyncio.to_thread(wait_for, lambda: not any(map(processes_with, marks)), GONE_WITHIN_S, "no process left")
    unloaded = "successfully unloaded 'vllm'" in pair.leader.log  # 2.51 may keep it until its timeout, and says no goodbye
    assert code == (0 if unloaded else 1)
    assert ("follower.ends: it, or its leader, was told to" in pair.follower.log) is unloaded


FAULTS: dict[str, Callable[[Pair], Any]] = {
    "the follower's engine is stopped": lambda pair: pair.core().send_signal(signal.SIGSTOP),
    "the follower's engine is killed": lambda pair: pair.core().kill(),
    "the follower is killed": lambda pair: psutil.Process(pair.follower.pid).kill(),
    "the follower is stopped": lambda pair: psutil.Process(pair.follower.pid).send_signal(signal.SIGSTOP),
    "the leader is killed": lambda pair: psutil.Process(pair.leader.pid).kill(),
}
SEEN_AS = {"the follower's engine is stopped": "data-parallel rank 1 of the engine hangs", "the leader is killed": None}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_on_one_host_ends_both(tmp_path: Path, model: Path, fault: str) -> None:
    """In mid-stream on both ranks: seen within its bound, streams end, with a reason unless the leader was killed; nothing is left."""
    with lead_and_follow(tmp_path, model) as pair:
        marks = pair.marks()
        async with streaming(pair.leader, RANKS) as tasks:
            struck = time.monotonic()
            FAULTS[fault](pair)
            reason = SEEN_AS.get(fault, "the follower with rank 1 at 127.0.0.1 is gone")
            with pytest.raises((InferenceServerException, AioRpcError), match=reason):
                await asyncio.wait_for(tasks[1], SEEN_WITHIN_S)
            assert time.monotonic() - struck < SEEN_WITHIN_S
        if fault == "the follower is stopped":
            psutil.Process(pair.follower.pid).send_signal(signal.SIGCONT)  # nobody can end itself before
        await asyncio.to_thread(wait_for, lambda: not any(map(processes_with, marks)), GONE_WITHIN_S, "no process left")
        assert await asyncio.to_thread(pair.serving.wait, GONE_WITHIN_S) == 1
