# SPDX-License-Identifier: Apache-2.0
"""A router in this process in front of mock workers in another: everything real but the engines and tritonserver."""

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from servers import free_ports, get_json, post_json, wait_for
from tandem_protocol.errors import TandemError
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.streams import Arrays
from tandem_router.config import load_settings
from tandem_router.index import warm_up
from tandem_router.overrides import Overrides
from tandem_router.router import Router

ANSWER_S = 60.0
START_S = 120.0


@dataclass
class Recorder:
    """Takes the responses of one request."""

    responses: list[Arrays] = field(default_factory=list)
    error: TandemError | None = None
    gone: bool = False
    done: threading.Event = field(default_factory=threading.Event)

    def send(self, arrays: Arrays, *, final: bool) -> None:
        """One response."""
        self.responses.append(arrays)
        if final:
            self.done.set()

    def fail(self, error: TandemError) -> None:
        """The end with an error."""
        self.error = error
        self.done.set()

    def is_cancelled(self) -> bool:
        """What the test says."""
        return self.gone

    def wait(self) -> "Recorder":
        """Until the end; fails the test if there is none."""
        assert self.done.wait(ANSWER_S), "the stream did not end"
        return self

    @property
    def text(self) -> str:
        """All text; raises the error that ended the stream."""
        if self.wait().error is not None:
            raise self.error or AssertionError
        return b"".join(arrays["text_output"][0] for arrays in self.responses if "text_output" in arrays).decode()

    def first(self, name: str) -> int:
        """The first value of an output."""
        return next(int(arrays[name][0]) for arrays in self.wait().responses if name in arrays)


@dataclass
class Mocks:
    """A mock process."""

    process: "subprocess.Popen[str]"
    admin: str

    def kill(self, worker: int) -> None:
        """The worker drops its streams and answers nobody any more."""
        post_json(f"http://{self.admin}/mock/kill?worker={worker}", {})

    def drain(self, worker: int) -> None:
        """The worker takes no more requests."""
        post_json(f"http://{self.admin}/engine/drain?worker={worker}", {})

    def metric(self, name: str) -> float:
        """A metric, summed over the process's workers."""
        with urllib.request.urlopen(f"http://{self.admin}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


@contextmanager
def mocks(store: Path | str, *arguments: str) -> Iterator[Mocks]:
    """`python -m tandem_worker.mock`, registered in the folder or at the discovery URL; killed at the end."""
    command = [sys.executable, "-m", "tandem_worker.mock", "--discovery", url_of(store), "--model", "mock", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        yield Mocks(process, ready["admin"])
    finally:
        process.kill()
        process.communicate(timeout=10)


def url_of(store: Path | str) -> str:
    """A discovery URL."""
    return f"file:{store}" if isinstance(store, Path) else store


class LocalRouter:
    """A router and calls to it."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.admin = f"http://127.0.0.1:{router.settings.router_admin_port}"

    def send(self, prompt: list[int], request_id: str = "", *, overrides: Overrides | None = None, returns: tuple[str, ...] = (),
             timeout_s: float | None = None, **sampling: Any) -> Recorder:
        """Submits a streamed request."""
        request = GenerationRequest(
            request_id=request_id or f"r{time.time_ns()}", prompt=prompt, images=(), stream=True, prepend_input=False,
            sampling={"max_tokens": 32, "ignore_eos": True, **sampling}, returns=frozenset(returns), handoff=None, priority=0,
            timeout_s=timeout_s,
        )
        recorder = Recorder()
        self.router.submit(request, overrides or Overrides(), recorder)
        return recorder

    def query(self, prompt: list[int]) -> dict[str, Any]:
        """Which worker it would be."""
        return dict(json.loads(self.send(prompt, overrides=Overrides(query=True)).text))

    def placed(self) -> list[str]:
        """Ids of the workers in placement."""
        return [worker["id"] for worker in get_json(f"{self.admin}/fleet")["workers"] if worker["placed"]]

    def metric(self, name: str) -> float:
        """A metric of the router, summed over its labels."""
        lines = self.router.metrics.exposition().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    def wait_placed(self, count: int) -> None:
        """Until so many workers are in placement."""
        wait_for(lambda: len(self.placed()) == count, START_S, f"{count} workers in placement")


@contextmanager
def router(store: Path | str, workers: int, tokenizer: Path, **settings: str) -> Iterator[LocalRouter]:
    """A router that has found so many workers."""
    warm_up()
    environment = {"TANDEM_DISCOVERY": url_of(store), "TANDEM_ROUTER_ADMIN_PORT": str(free_ports(20)),
                   "TANDEM_ROUTER_TOKENIZER": str(tokenizer), "TANDEM_ROUTER_PLACEMENT_TIMEOUT_S": "5", **settings}
    running = Router(load_settings({}, environment))
    running.start()
    try:
        local = LocalRouter(running)
        local.wait_placed(workers)
        wait_for(lambda: running.prepared, START_S, "the tokenizer")
        yield local
    finally:
        running.stop()


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits within the time that a client would."""
    wait_for(condition, ANSWER_S, what)
