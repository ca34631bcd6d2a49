# SPDX-License-Identifier: Apache-2.0
"""A fleet that meets in Kubernetes' API: the router in a real tritonserver, mock workers, an API server that is played (`lease_double`)."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from calls import Call, collect, connect
from kubernetes_double import NAMESPACE
from kubernetes_server import KubernetesServer
from models import make_tiny_model
from router_server import RouterServer, router_server
from routers import Mocks, mocks
from servers import wait_for

LEASE_S = 4
SAMPLING = {"max_tokens": 16, "ignore_eos": True}
URL = f"kubernetes://{NAMESPACE}/fleet?lease_s={LEASE_S}"


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    """The API server, over TLS with a token; workers and router have the kubeconfig."""
    server = KubernetesServer(tmp_path / "kubernetes").begin()
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    yield server
    assert server.double.leases.invalid == []
    server.end()


@dataclass
class Load:
    """Requests that follow one another."""

    answers: int = 0
    failures: list[str] = field(default_factory=list)

    async def run(self, client: Any) -> None:
        """Until cancelled."""
        while True:
            try:
                got = await collect(client, Call("router", prompt=f"Tell me tale {self.answers}.", sampling=SAMPLING))
            except Exception as exc:  # whatever it is, it counts
                self.failures.append(repr(exc))
            else:
                self.answers += bool(got)


@asynccontextmanager
async def load(server: RouterServer, streams: int = 4) -> AsyncIterator[Load]:
    """So many at a time, while the context is open; none may fail."""
    total = Load()
    async with connect(server.grpc_url) as client:
        running = [asyncio.create_task(total.run(client)) for _ in range(streams)]
        try:
            yield total
        finally:
            for one in running:
                one.cancel()
            await asyncio.gather(*running, return_exceptions=True)
    assert total.failures == []
    assert total.answers > streams


def listed(server: RouterServer) -> int:
    """Workers that discovery shows to the router."""
    return len(server.fleet()["workers"])


@pytest.mark.slow
async def test_a_fleet_lives_by_kubernetes_alone(kubernetes: KubernetesServer, tmp_path: Path) -> None:
    """Workers and router find each other; one that dies without a word is gone after its lease; an API server that is away for longer than
    that costs no request, whichever worker it goes to; and a worker that comes afterwards is found.
    """
    tokenizer = make_tiny_model(tmp_path / "model")
    with ExitStack() as stack:
        first, second = (stack.enter_context(mocks(URL, "--name", name)) for name in ("first", "second"))
        server = stack.enter_context(router_server(tmp_path, tmp_path, 2, tokenizer, TANDEM_DISCOVERY=URL))
        async with load(server):
            await _outage(kubernetes, server)
            await _death(second, server)
            stack.enter_context(mocks(URL, "--name", "third"))
            await asyncio.to_thread(wait_for, lambda: server.placed() == 2, 20, "the newcomer to be placed")
        assert first.process.poll() is None
    assert kubernetes.double.leases.invalid == []


async def _outage(kubernetes: KubernetesServer, server: RouterServer) -> None:
    kubernetes.stop()
    await asyncio.sleep(1.5 * LEASE_S)  # the outage itself
    assert (listed(server), server.placed()) == (2, 2)
    since = len(kubernetes.double.calls)
    kubernetes.start()
    renewed = lambda: sum(call.startswith("patch") for call in kubernetes.double.calls[since:]) >= 4 * 2  # noqa: E731 - a condition
    await asyncio.to_thread(wait_for, renewed, 20, "both workers to go on for longer than a lease")
    assert (listed(server), server.placed()) == (2, 2)


async def _death(worker: Mocks, server: RouterServer) -> None:
    worker.process.kill()
    died = time.monotonic()
    await asyncio.to_thread(wait_for, lambda: listed(server) == 1, 20, "the dead worker to be left out")
    assert time.monotonic() - died < 2 * LEASE_S
