# SPDX-License-Identifier: Apache-2.0
"""An engine that is stopped in mid-stream, by SIGSTOP: seen within its bound, or not at all if it goes on in time."""

import asyncio
import contextlib
import signal
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tritonclient.utils import InferenceServerException

from calls import Call, collect, connect, responses
from servers import Server, processes_with, serve, wait_for

pytestmark = pytest.mark.slow

HANG_S = 6.0
SEEN_WITHIN_S = HANG_S + 3.0
"""Two looks and the answer."""
GONE_WITHIN_S = 45.0
ENDLESS = {"temperature": 0, "max_tokens": 3000, "ignore_eos": True}
SETTINGS = {"TANDEM_HANG_TIMEOUT_S": f"{HANG_S:g}"}


def engine(server: Server) -> psutil.Process:
    """The EngineCore, by its parent."""
    commands = [(process, " ".join(process.cmdline())) for process in server.processes()]
    stub = next(process for process, command in commands if "triton_python_backend_stub" in command and "/vllm/" in command)
    return next(child for child in stub.children() if "EngineCor" in f"{child.name()} {' '.join(child.cmdline())}")


def live(server: Server) -> int:
    """The status code of /live; 0 if nobody answers."""
    try:
        with urllib.request.urlopen(f"{server.admin_url('vllm')}/live", timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as exc:
        return exc.code
    except OSError:
        return 0


@contextlib.asynccontextmanager
async def streaming(server: Server, count: int) -> AsyncIterator[list["asyncio.Task[Any]"]]:
    """So many requests in mid-stream."""
    async with connect(server.grpc_url) as client:
        started = asyncio.Semaphore(0)

        async def consume() -> None:
            first = True
            async for _ in responses(client, Call("vllm", sampling=ENDLESS)):
                if first:
                    started.release()
                first = False

        tasks = [asyncio.create_task(consume()) for _ in range(count)]
        for _ in tasks:
            await asyncio.wait_for(started.acquire(), 60)
        yield tasks
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_stopped_engine(tmp_path: Path, tiny_model: Path) -> None:
    """Continued in time it goes on as if nothing had been; else its requests fail within the bound, /live says why, stacks are in
    the log, discovery forgets the worker, and the server exits without leaving anything."""
    arguments = ["--mode", "agg", "--model", str(tiny_model), "--max-model-len", "4096"]
    with serve(tmp_path, *arguments, **SETTINGS) as server:
        run_id = f"TANDEM_RUN_ID={server.state['run_id']}"
        discovery = tmp_path / str(server.http_port) / "discovery"
        async with connect(server.grpc_url) as client:
            answer = asyncio.create_task(collect(client, Call("vllm", sampling={**ENDLESS, "max_tokens": 1500})))
            await asyncio.to_thread(wait_for, lambda: server.health("vllm")["running"] == 1, 60, "a running request")
            engine(server).send_signal(signal.SIGSTOP)
            await asyncio.sleep(HANG_S / 2)  # the pause is the subject of the test
            engine(server).send_signal(signal.SIGCONT)
            assert len(await answer) > 0
            assert (live(server), server.health("vllm")["status"]) == (200, "ready")
        async with streaming(server, 4) as tasks:
            engine(server).send_signal(signal.SIGSTOP)
            stopped = time.monotonic()
            for task in tasks:
                with pytest.raises(InferenceServerException, match="the engine hangs"):
                    await asyncio.wait_for(task, SEEN_WITHIN_S)
            assert HANG_S - 2 < time.monotonic() - stopped < SEEN_WITHIN_S
            assert await asyncio.to_thread(live, server) == 503
            assert "neither a step nor computation" in (await asyncio.to_thread(server.health, "vllm"))["reason"]
        await asyncio.to_thread(wait_for, lambda: not list(discovery.glob("*.json")), 10, "the record is gone")
        await asyncio.to_thread(wait_for, lambda: not processes_with(run_id), GONE_WITHIN_S, "no process left")
        assert "state=stopped" in server.log
        assert "host.py" in server.log.partition("engine.hangs")[2], "the stub's stacks"


async def test_a_step_longer_than_the_timeout_is_no_hang(tmp_path: Path) -> None:
    """A prompt of 4,000 tokens in one step of a real model takes seconds on two cores."""
    arguments = ["--mode", "agg", "--max-model-len", "8192", "--max-num-batched-tokens", "8192"]
    with serve(tmp_path, *arguments, TANDEM_HANG_TIMEOUT_S="1") as server:
        async with connect(server.grpc_url) as client:
            started = time.monotonic()
            prompt = [1000 + i % 7000 for i in range(8000)]
            assert await collect(client, Call("vllm", prompt=prompt, sampling={"max_tokens": 1}))
            taken = time.monotonic() - started
        assert taken > 3, f"the step was too short to show anything: {taken:.1f} s"
        assert (live(server), server.health("vllm")["status"]) == (200, "ready")
