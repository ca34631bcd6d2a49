# SPDX-License-Identifier: Apache-2.0
"""One server with all models for the whole session; tests that break a server start their own."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from calls import connect
from models import make_tiny_model
from servers import Server, serve


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the servers of this session keep their state."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="session")
def server(run_dir: Path) -> Iterator[Server]:
    """vllm, prefill, decode and disagg with the real model. Small batches, so that a queue can be made; small prefill
    chunks, so that a step on two slow cores is well under a second; float32, in which equal tokens mean equal mathematics
    (in bfloat16 another batch shape may turn a near tie, docs/limits.md)."""
    limits = ["--max-num-seqs", "16", "--max-num-batched-tokens", "256", "--max-model-len", "4096"]
    with serve(run_dir, "--dtype", "float32", *limits) as running:
        yield running


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Any]:
    """A gRPC client of the session's server."""
    async with connect(server.grpc_url) as connected:
        yield connected


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random layers under SmolLM2's tokenizer."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
