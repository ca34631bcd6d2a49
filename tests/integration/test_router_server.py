# SPDX-License-Identifier: Apache-2.0
"""The router in a real tritonserver over mock workers: two instances share their books, and a stub that dies takes the server with it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from calls import Call, collect, connect
from models import make_tiny_model
from router_server import RouterServer, router_server
from routers import mocks
from servers import post_json, wait_for

EXIT_S = 5.0
"""What the guard grants the server here."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's."""
    return make_tiny_model(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Path) -> Iterator[RouterServer]:
    """So many instances (`request.param`) over two workers."""
    store, settings = tmp_path / "discovery", {"DYN_ROUTER_REPLICA_SYNC": "true", "TANDEM_SERVER_EXIT_TIMEOUT_S": str(EXIT_S)}
    with mocks(store, "--workers", "2"), router_server(tmp_path, store, 2, tokenizer, instances=request.param, **settings) as running:
        yield running


@pytest.mark.parametrize("server", [1, pytest.param(2, marks=pytest.mark.slow)], indirect=True)
async def test_a_killed_stub_ends_the_server(server: RouterServer) -> None:
    """So that a supervisor restarts it: Triton would keep the model dead for ever. Another instance ends, too."""
    async with connect(server.grpc_url) as client:
        for i in range(4):
            assert await collect(client, Call("router", prompt=f"Tell me tale {i}.", sampling={"max_tokens": 8}))
    one = post_json(f"http://127.0.0.1:{server.http_port}/v2/models/router/generate", {"text_input": "One more tale.", "max_tokens": 8})
    assert one["text_output"], "HTTP's generate takes exactly one response, and the end that follows it is none"
    server.stubs()[0].kill()
    wait_for(lambda: server.process.poll() is not None, EXIT_S + 5, "the server to end")
    wait_for(lambda: server.processes() == [], 10, "nothing to be left")
    assert "the stub died: ending tritonserver" in server.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("server", [2], indirect=True)
def test_instances_of_one_model_are_replicas(server: RouterServer) -> None:
    """They share their books as routers of different servers do."""
    wait_for(lambda: all([one["synced"] for one in server.fleet(i)["replicas"]] == [True] for i in (0, 1)), 10, "both to follow each other")


@pytest.mark.slow
@pytest.mark.parametrize("server", [2], indirect=True)
def test_a_killed_server_leaves_no_stub(server: RouterServer) -> None:
    """The guards end them, and themselves."""
    assert len(server.stubs()) == 2
    server.process.kill()
    server.process.wait(10)
    wait_for(lambda: server.processes() == [], 10, "nothing to be left")


@pytest.mark.slow
@pytest.mark.parametrize("server", [1], indirect=True)
def test_a_server_that_is_told_to_stop_does_so_in_peace(server: RouterServer) -> None:
    """The guard hears goodbye: it doesn't say that somebody died."""
    server.process.terminate()
    wait_for(lambda: server.process.poll() is not None, 40, "the server to end")
    wait_for(lambda: server.processes() == [], 10, "nothing to be left")
    assert "tandem guard" not in server.log.read_text()
