# SPDX-License-Identifier: Apache-2.0
"""A running omni worker seen from outside: its processes, files, figures and record, and requests in mid-stream to it."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from calls import Call, connect, responses
from expositions import Exposition
from omni_rig import OmniServer, serve_omni
from servers import processes_with, wait_for
from tandem_protocol import workers
from tandem_protocol.discovery import open_discovery
from tandem_worker.shared_memory import mapped_files

ENDLESS = {"temperature": 0, "max_tokens": 4000, "ignore_eos": True}
CLIENT_S = 60.0
FREED_WITHIN_S = 5.0
GONE_WITHIN_S = 45.0
"""Triton's own exit timeout of 30 s and the guard's work after it."""


@dataclass(frozen=True)
class Running:
    """A server with what tells whether anything of it is left."""

    server: OmniServer
    folder: Path
    mark: str
    """NAME=VALUE in the environment of its processes; those that vLLM renames may have lost it."""

    @property
    def metrics(self) -> Exposition:
        """One scrape."""
        return Exposition(self.server.metrics())

    def family(self) -> list[psutil.Process]:
        """tritonserver and all below it."""
        server = psutil.Process(self.server.process.pid)
        return [server, *server.children(recursive=True)]

    def traces(self) -> "Traces":
        """To be taken while it runs."""
        family = self.family()
        return Traces(self, family, mapped_files(one.pid for one in family))

    def is_gone(self, family: Sequence[psutil.Process]) -> bool:
        """Whether none of these is left, nor any other with the mark; killed ones that nobody reaped count as gone."""
        self.server.process.poll()
        return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family) and not processes_with(self.mark)

    async def states(self) -> list[workers.WorkerState]:
        """Of all workers in discovery."""
        discovery = open_discovery(f"file:{self.folder / 'discovery'}")
        try:
            return [record.state for record in await discovery.list()]
        finally:
            await discovery.close()


@dataclass(frozen=True)
class Traces:
    """What a running server has on this host: its processes, and the files in /dev/shm that they map (others run engines, too)."""

    running: Running
    family: Sequence[psutil.Process]
    shm: Collection[Path]

    async def vanish(self) -> None:
        """Fails the test unless nothing of it is left in time."""
        assert self.shm, "nothing would be tested"
        await until(lambda: self.running.is_gone(self.family), GONE_WITHIN_S, "no process left")
        assert [path for path in self.shm if path.exists()] == []


@contextmanager
def serving(environment: Path, folder: Path, arguments: dict[str, Any], **variables: str) -> Iterator[Running]:
    """A server whose model.json has these arguments."""
    run = uuid.uuid4().hex
    given = {"dtype": "float32", **arguments}
    with serve_omni(environment, folder, given, {"TANDEM_RUN_ID": run, "TANDEM_SERVER_EXIT_TIMEOUT_S": "10", **variables}) as server:
        yield Running(server, folder, f"TANDEM_RUN_ID={run}")


def text(model: Path) -> dict[str, Any]:
    """A pipeline of one text stage."""
    return {"model": str(model), "enforce_eager": True, "max_model_len": 4096}


@asynccontextmanager
async def streaming(url: str, count: int, **given: Any) -> AsyncIterator[list["asyncio.Task[int]"]]:
    """So many requests in mid-stream; each tells how many tokens it got."""
    async with connect(url) as client:
        started = asyncio.Semaphore(0)

        async def consume(call: Call) -> int:
            tokens = 0
            async for response in responses(client, call):
                if not tokens:
                    started.release()
                tokens += sum(response["num_output_tokens"])
            return tokens

        calls = [Call("omni", **{"sampling": ENDLESS, "returns": ("num_output_tokens",), **given}) for _ in range(count)]
        tasks = [asyncio.create_task(consume(call)) for call in calls]
        for task in tasks:
            task.add_done_callback(lambda _: started.release())  # one that was refused shows where it is waited for
            await asyncio.wait_for(started.acquire(), CLIENT_S)
        yield tasks
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(holds: Callable[[], bool], within_s: float, what: str) -> float:
    """How long it took."""
    return await asyncio.to_thread(wait_for, holds, within_s, what)


async def freed(running: Running) -> None:
    """Neither the worker nor the stage has a request left."""
    await until(lambda: running.server.health()["active"] == 0, FREED_WITHIN_S, "the worker's end of the request")
    await until(lambda: running.metrics.sum_of("vllm_omni:num_requests_running") == 0, FREED_WITHIN_S, "the pipeline's")


def errors(running: Running, code: str) -> float:
    """How many requests ended with it so far."""
    return running.metrics.sum_of("dynamo_component_errors_total", f'error_type="{code}"')
