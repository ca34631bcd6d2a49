# SPDX-License-Identifier: Apache-2.0
"""A served worker is found in discovery, in the state that it is in, with the engine's own figures."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from discovery_contract import ids, until
from servers import Server, post_json, serve
from tandem_protocol.discovery import Discovery, Snapshot, open_discovery
from tandem_protocol.roles import Role
from tandem_protocol.workers import EventSource, WorkerRecord, WorkerState

LEFT_WITHIN_S = 60.0
"""The end of a tritonserver with its engine, on a busy machine."""


def _discovery(server: Server) -> Discovery:
    return open_discovery(f"file:{server.run_dir / str(server.http_port) / 'discovery'}")


@contextlib.asynccontextmanager
async def watching(server: Server) -> AsyncIterator[Callable[[Callable[[Snapshot], bool]], Awaitable[Snapshot]]]:
    """Waits for a view of the run's own discovery."""
    discovery = _discovery(server)
    watch = discovery.watch()
    yield lambda wanted: until(watch, wanted, LEFT_WITHIN_S)
    await discovery.close()


def _expected(server: Server, record: WorkerRecord, model: Path) -> WorkerRecord:
    """All but the id and the size of the cache is known beforehand."""
    ports = int(os.environ.get("DYN_VLLM_KV_EVENT_PORT", server.http_port + 8))
    source = EventSource(dp_rank=0, endpoint=f"tcp://127.0.0.1:{ports}", replay_endpoint=f"tcp://127.0.0.1:{ports + 1000}")
    return WorkerRecord(
        id=record.id, role=Role.AGGREGATED, state=WorkerState.READY, model=str(model), grpc_url=server.grpc_url, triton_model="vllm",
        admin_url=server.admin_url("vllm"), event_sources=(source,), block_size=32, total_blocks=record.total_blocks, max_num_seqs=16,
        max_num_batched_tokens=256,
    )


async def test_a_worker_registers_drains_and_leaves(tmp_path: Path, tiny_model: Path) -> None:
    """Its record appears with its engine's figures, follows the admin port, and goes with the server."""
    limits = ["--max-num-seqs", "16", "--max-num-batched-tokens", "256", "--max-model-len", "4096"]
    with serve(tmp_path, "--mode", "agg", "--model", str(tiny_model), *limits) as server:
        async with watching(server) as view:
            record = (await view(lambda snapshot: len(snapshot.records) == 1)).records[0]
            assert record == _expected(server, record, tiny_model)
            assert record.id.startswith("vllm-")
            assert record.total_blocks > 100
            assert server.health("vllm")["registration"] == "registered"
            assert server.metric("vllm", "tandem_discovery_registered") == 1
            assert await asyncio.to_thread(post_json, f"{server.admin_url('vllm')}/engine/drain", {"timeout_s": 5}) == {"aborted": 0}
            await view(lambda snapshot: [one.state for one in snapshot.records] == [WorkerState.DRAINING])
            os.kill(server.pid, signal.SIGTERM)
            await view(lambda snapshot: ids(snapshot) == [])
            assert not list((tmp_path / str(server.http_port) / "discovery").iterdir())
    assert not (tmp_path / str(server.http_port)).exists()
