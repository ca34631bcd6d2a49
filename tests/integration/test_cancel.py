# SPDX-License-Identifier: Apache-2.0
"""Cancelling frees the engine's slot and the transferred blocks, within a second on a quiet machine: phase by path.

Phases: queued, prefill, transfer, decode. Paths: gRPC cancel, HTTP disconnect, abort by request id (admin port, and as a
Triton request). What Triton itself cannot see is in docs/limits.md: an HTTP client that leaves before its first token, and
any client of a running ensemble step; there the abort is the way.
"""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from calls import Call, collect, prefill, responses
from servers import Server, post_json, wait_for

WITHIN_S = float(os.environ.get("TANDEM_TEST_FREED_WITHIN_S", "15"))
"""`./build.sh test --full` asks for the promised second; on a shared CI machine any process may stand still for longer."""
CLIENT_S = 60.0
"""For tokens or an error to reach a client on a busy machine; what must be quick is the freeing."""
LONG = {"temperature": 0, "max_tokens": 2000, "ignore_eos": True}
LONG_PROMPT = "The ship sailed on and on over the wide sea. " * 340


def idle(server: Server, worker: str) -> bool:
    """Whether neither the worker nor its engine has anything."""
    health = server.health(worker)
    return (health["active"], health["running"], health["waiting"]) == (0, 0, 0)


async def freed(server: Server, worker: str) -> None:
    """Waits, off the event loop, until the worker is idle; fails after `WITHIN_S`."""
    await asyncio.to_thread(wait_for, lambda: idle(server, worker), WITHIN_S, f"{worker} to be free: {server.health(worker)}")


async def until(condition: Callable[[], bool], what: str) -> None:
    """Waits, off the event loop."""
    await asyncio.to_thread(wait_for, condition, CLIENT_S, what)


@asynccontextmanager
async def in_phase(server: Server, client: Any, phase: str, request_id: str) -> AsyncIterator[tuple[str, "asyncio.Task[Any]"]]:
    """A request held in a phase: the worker that has it, and the task that consumes its stream."""
    starters = {"queued": _queued, "prefill": _prefilling, "transfer": _transferring, "decode": _decoding}
    worker, task, others = await starters[phase](server, client, request_id)
    try:
        yield worker, task
    finally:
        for one in (task, *others):
            one.cancel()
        await asyncio.gather(task, *others, return_exceptions=True)
        await until(lambda: idle(server, worker), f"{worker} to be idle after the test")


def _stream(client: Any, call: Call) -> "asyncio.Task[Any]":
    return asyncio.create_task(collect(client, call))


async def _queued(server: Server, client: Any, request_id: str) -> tuple[str, "asyncio.Task[Any]", list["asyncio.Task[Any]"]]:
    """All 16 slots of the engine are taken, so one more waits."""
    others = [_stream(client, Call("vllm", prompt=f"Tale {i}", sampling=LONG)) for i in range(16)]
    await until(lambda: server.health("vllm")["running"] == 16, "16 running requests")
    task = _stream(client, Call("vllm", sampling=LONG, request_id=request_id))
    await until(lambda: server.health("vllm")["waiting"] == 1, "a waiting request")
    return "vllm", task, others


async def _prefilling(server: Server, client: Any, request_id: str) -> tuple[str, "asyncio.Task[Any]", list["asyncio.Task[Any]"]]:
    """A prompt of many chunks."""
    task = _stream(client, Call("vllm", prompt=f"{request_id} {LONG_PROMPT}", sampling=LONG, request_id=request_id))
    # The engine's own count may still be that of the test before: the worker's is of this moment.
    await until(lambda: (server.health("vllm")["active"], server.health("vllm")["running"]) == (1, 1), "a running request")
    assert not task.done()
    return "vllm", task, []


async def _transferring(server: Server, client: Any, request_id: str) -> tuple[str, "asyncio.Task[Any]", list["asyncio.Task[Any]"]]:
    """A handoff whose prefill worker takes connections and never answers: the pull hangs in its handshake."""
    listener = socket.create_server(("127.0.0.1", 0))
    handoff = json.loads(await prefill(client, Call("prefill", prompt="Some words. " * 40)))
    handoff |= {"remote_host": "127.0.0.1", "remote_port": listener.getsockname()[1], "remote_engine_id": f"silent-{request_id}"}
    call = Call("decode", prompt="Some words. " * 40, sampling=LONG, handoff=json.dumps(handoff).encode(), request_id=request_id)
    task = _stream(client, call)
    task.add_done_callback(lambda _: listener.close())
    await until(lambda: server.health("decode")["active"] == 1, "a request in transfer")
    return "decode", task, []


async def _decoding(server: Server, client: Any, request_id: str) -> tuple[str, "asyncio.Task[Any]", list["asyncio.Task[Any]"]]:
    """Tokens are coming."""
    first = asyncio.Event()

    async def consume() -> None:
        async for _ in responses(client, Call("vllm", sampling=LONG, request_id=request_id)):
            first.set()

    task = asyncio.create_task(consume())
    await asyncio.wait_for(first.wait(), CLIENT_S)
    return "vllm", task, []


PHASES = pytest.mark.parametrize("phase", ["queued", "prefill", "transfer", "decode"])


@PHASES
async def test_grpc_cancel(server: Server, client: Any, phase: str) -> None:
    """A client that cancels its gRPC stream frees the engine."""
    async with in_phase(server, client, phase, f"grpc-{phase}") as (worker, task):
        before = server.health(worker)["active"]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.to_thread(wait_for, lambda: server.health(worker)["active"] < before, WITHIN_S, "the request to be gone")
        if phase != "queued":
            await freed(server, worker)


@PHASES
async def test_abort_on_the_admin_port(server: Server, client: Any, phase: str) -> None:
    """An abort by request id ends the stream with CANCELLED and frees the engine."""
    request_id = f"admin-{phase}"
    async with in_phase(server, client, phase, request_id) as (worker, task):
        assert post_json(f"{server.admin_url(worker)}/engine/abort", {"request_id": request_id}) == {"aborted": 1}
        with pytest.raises(InferenceServerException, match="aborted"):
            await asyncio.wait_for(task, CLIENT_S)
        if phase != "queued":
            await freed(server, worker)


async def test_abort_as_a_triton_request(server: Server, client: Any) -> None:
    """A request with the parameter `abort` does the same through the inference port."""
    async with in_phase(server, client, "decode", "abort-me") as (worker, task):
        assert await collect(client, Call(worker, prompt=None, stream=None, parameters={"abort": "abort-me"})) == []
        with pytest.raises(InferenceServerException, match="aborted"):
            await asyncio.wait_for(task, CLIENT_S)
        await freed(server, worker)


async def test_http_disconnect_while_decoding(server: Server) -> None:
    """A client that drops its HTTP stream frees the engine at the next token."""
    body = json.dumps({"text_input": "Tell me a long story", "stream": True, **LONG})
    reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
    writer.write(f"POST /v2/models/vllm/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    while b"data:" not in await asyncio.wait_for(reader.readline(), CLIENT_S):
        pass
    writer.transport.abort()
    await freed(server, "vllm")


async def test_abort_reaches_a_running_ensemble(server: Server, client: Any) -> None:
    """The way out of Triton's blind spot: the decode worker knows the ensemble's request by the client's id."""
    task = _stream(client, Call("disagg", sampling=LONG, request_id="ensemble-1"))
    await until(lambda: server.health("decode")["running"] == 1, "the ensemble to decode")
    assert post_json(f"{server.admin_url('decode')}/engine/abort", {"request_id": "ensemble-1"}) == {"aborted": 1}
    with pytest.raises(InferenceServerException, match="aborted"):
        await asyncio.wait_for(task, CLIENT_S)
    await freed(server, "decode")
    await freed(server, "prefill")


async def test_the_request_timeout_of_triton_is_a_deadline(server: Server, client: Any) -> None:
    """A request's own timeout ends it with UNAVAILABLE, after the tokens it got."""
    with pytest.raises(InferenceServerException, match="timed out"):
        await collect(client, Call("vllm", sampling=LONG, timeout_us=700_000))
    await freed(server, "vllm")
