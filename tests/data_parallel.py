# SPDX-License-Identifier: Apache-2.0
"""A worker of several data-parallel ranks, looked at rank by rank."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil

from calls import Call, collect, connect, responses
from servers import Server, command_of, get_text
from tandem_protocol.workers import WorkerRecord

WAIT_S = 60.0
SAMPLING = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
ENDLESS = {"temperature": 0, "max_tokens": 1900, "ignore_eos": True}


def record(server: Server) -> WorkerRecord:
    """What the worker registered."""
    [path] = Path(server.run_dir, str(server.http_port), "discovery").glob("*.json")
    return msgspec.convert(json.loads(path.read_bytes())["record"], WorkerRecord)


def core(server: Server, rank: int) -> psutil.Process:
    """A rank's EngineCore, by its title."""
    [stub] = [process for process in server.processes()
              if "triton_python_backend_stub" in (command := command_of(process)) and "/vllm/" in command]
    return next(child for child in stub.children() if f"EngineCore_DP{rank}" in command_of(child))


def of_rank(server: Server, name: str, rank: int) -> float:
    """A metric of vLLM's, which names its ranks `engine`."""
    lines = get_text(f"{server.admin_url('vllm')}/metrics").splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{") and f'engine="{rank}"' in line)


def on_rank(prompt: list[int], rank: int | None, **sampling: Any) -> Call:
    """A request to the worker itself, perhaps for a rank."""
    named = {} if rank is None else {"data_parallel_rank": rank}
    return Call("vllm", prompt, {**SAMPLING, **sampling, **named}, returns=("num_cached_tokens",))


async def cached(client: Any, call: Call) -> int:
    """Prompt tokens that were found in the prefix cache."""
    return max(int(part["num_cached_tokens"][0]) for part in await collect(client, call) if "num_cached_tokens" in part)


@asynccontextmanager
async def streaming(server: Server, ranks: tuple[int | None, ...]) -> AsyncIterator[list["asyncio.Task[None]"]]:
    """A request in mid-stream for each of the ranks; None leaves the choice to the worker."""
    async with connect(server.grpc_url) as client:
        begun = [asyncio.Event() for _ in ranks]

        async def consume(rank: int | None, event: asyncio.Event) -> None:
            async for _ in responses(client, on_rank([7, 8, 9], rank, **ENDLESS)):
                event.set()

        tasks = [asyncio.create_task(consume(rank, event)) for rank, event in zip(ranks, begun, strict=True)]
        for event in begun:
            await asyncio.wait_for(event.wait(), WAIT_S)
        yield tasks
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
