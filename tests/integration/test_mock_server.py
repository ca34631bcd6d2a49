# SPDX-License-Identifier: Apache-2.0
"""The mock process as routers see it: real gRPC, real ZMQ, real signals."""

import asyncio
import contextlib
import json
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as grpcclient
import zmq
import zmq.asyncio

from calls import Call, collect, connect, ids_of, prefill, responses, text_of
from tandem_protocol import kv_events
from tandem_protocol.discovery import open_discovery
from tandem_protocol.kv_events import BlockRemoved, BlockStored
from tandem_protocol.roles import Role

START_TIMEOUT_S = 60
WAIT_S = 20


@dataclass
class Mock:
    """A running process and what it said of itself."""

    process: asyncio.subprocess.Process
    ready: dict[str, Any]

    @property
    def grpc(self) -> str:
        return str(self.ready["grpc"])

    async def post(self, path: str) -> dict[str, Any]:
        async with aiohttp.ClientSession() as session, session.post(f"http://{self.ready['admin']}{path}") as answer:
            return dict(await answer.json())

    async def metrics(self) -> str:
        async with aiohttp.ClientSession() as session, session.get(f"http://{self.ready['admin']}/metrics") as answer:
            return await answer.text()


@contextlib.asynccontextmanager
async def mock(*arguments: str) -> AsyncIterator[Mock]:
    """`python -m tandem_worker.mock`, stopped at the end."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "tandem_worker.mock", *arguments, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            line = await process.stdout.readline()
        yield Mock(process, json.loads(line))
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(WAIT_S):
            assert await process.wait() == 0


def tokens(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 1000, length)]


def call(model: str, prompt: list[int] | str, max_tokens: int = 8, **more: Any) -> Call:
    return Call(model, prompt, {"max_tokens": max_tokens}, **more)


async def until(condition: Any, what: str) -> None:
    """Polls an async condition until it holds."""
    try:
        async with asyncio.timeout(WAIT_S):
            while not await condition():  # noqa: ASYNC110 - the state is another process's
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {WAIT_S} s: {what}") from None


async def test_it_answers_like_a_worker_and_reuses_its_prefix_cache() -> None:
    everything = ("output_ids", "num_input_tokens", "num_output_tokens", "num_cached_tokens", "finish_reason")
    async with mock("--workers", "2", "--speedup", "20") as server, connect(server.grpc) as client:
        assert await client.is_server_ready()
        assert await client.is_model_ready("mock_1")
        assert not await client.is_model_ready("mock_2")
        prompt = tokens(100)
        first = await collect(client, call("mock_0", prompt, 40, returns=everything))
        again = await collect(client, call("mock_0", prompt, 40, returns=everything))
        elsewhere = await collect(client, call("mock_1", prompt, 40, returns=everything))
        assert [item["num_cached_tokens"][0] for item in (first[0], again[0], elsewhere[0])] == [0, 96, 0]
        ids = [token for item in first for token in item["output_ids"]]
        assert len(ids) == sum(item["num_output_tokens"][0] for item in first) == 40
        assert [token for item in elsewhere for token in item["output_ids"]] == ids
        assert "".join(item["text_output"][0] for item in again) == "".join(f"t{token} " for token in ids)
        assert (first[0]["num_input_tokens"], first[-1]["finish_reason"]) == ([100], ["length"])
        whole = await collect(client, call("mock_0", prompt, 40, stream=False, exclude_input_in_output=True, returns=("output_ids",)))
        assert [item["output_ids"] for item in whole] == [ids]
        with_input = await collect(client, call("mock_0", "words", 2, stream=False))
        assert with_input[0]["text_output"][0].startswith("words")


async def test_a_request_moved_to_another_worker_continues_where_it_was() -> None:
    async with mock("--workers", "2", "--speedup", "20") as server, connect(server.grpc) as client:
        prompt = tokens(33)
        ids = await ids_of(client, call("mock_0", prompt, 30, returns=("output_ids",)))
        moved = await ids_of(client, call("mock_1", prompt + ids[:11], 19, returns=("output_ids",)))
        assert moved == ids[11:]
        text = await text_of(client, call("mock_0", prompt, 11)) + await text_of(client, call("mock_1", prompt + ids[:11], 19))
        assert text == await text_of(client, call("mock_1", prompt, 30))


async def test_events_and_replay_tell_what_the_caches_hold() -> None:
    async with mock("--speedup", "50", "--blocks", "30") as server, connect(server.grpc) as client:
        source = server.ready["workers"][0]["event_sources"][0]
        with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as live, context.socket(zmq.DEALER) as replay:
            live.subscribe(b"")
            live.connect(source["endpoint"])
            replay.connect(source["replay_endpoint"])
            for seed in range(6):
                await collect(client, call("mock_0", tokens(100, seed)))
            seen = await _replayed(replay)
            assert [number for number, _ in seen] == list(range(len(seen)))
            batches = [kv_events.decode(payload) for _, payload in seen]
            held: Counter[int] = Counter()
            for event in (event for batch in batches for event in batch.events):
                if isinstance(event, BlockStored):
                    assert (len(event.tokens), event.block_size) == (16 * len(event.hashes), 16)
                    held.update(event.hashes.tolist())
                elif isinstance(event, BlockRemoved):
                    held.subtract(event.hashes.tolist())
            assert set(held.values()) <= {0, 1}
            assert 0 < sum(held.values()) <= 30
            assert 0 in held.values()  # some were evicted
            await collect(client, call("mock_0", tokens(100, 77)))
            async with asyncio.timeout(WAIT_S):
                topic, number, payload = await live.recv_multipart()
                while int.from_bytes(number, "big") < len(seen):  # what came between connecting and the replay
                    topic, number, payload = await live.recv_multipart()
            assert (topic, int.from_bytes(number, "big")) == (b"", len(seen))
            assert kv_events.decode(payload).dp_rank == 0


async def _replayed(socket: Any, first: int = 0) -> list[tuple[int, bytes]]:
    await socket.send_multipart((b"", first.to_bytes(8, "big")))
    batches: list[tuple[int, bytes]] = []
    async with asyncio.timeout(WAIT_S):
        while True:
            _, _, number, payload = await socket.recv_multipart()
            if int.from_bytes(number, "big", signed=True) == -1:
                return batches
            batches.append((int.from_bytes(number, "big"), payload))


async def test_prefill_hands_over_to_decode_in_another_process_and_frees_its_blocks() -> None:
    async with mock("--role", "prefill", "--name", "p", "--speedup", "20") as p, mock("--role", "decode", "--speedup", "20") as d:  # noqa: SIM117 - two kinds of things
        async with connect(p.grpc) as prefiller, connect(d.grpc) as decoder:
            prompt = tokens(200)
            handoff = await prefill(prefiller, call("p_0", prompt, 20), "p_0")
            assert json.loads(handoff)["remote_num_tokens"] == 200
            assert "tandem_mock_held_handoffs{model_name=\"p_0\"} 1.0" in await p.metrics()
            ids = await ids_of(decoder, call("mock_0", prompt, 20, handoff=handoff, returns=("output_ids",)))
            alone = await ids_of(decoder, call("mock_0", prompt, 20, returns=("output_ids",)))
            assert ids == alone
            assert "tandem_mock_transferred_tokens_total{model_name=\"mock_0\"} 200.0" in await d.metrics()
            assert "tandem_mock_held_handoffs{model_name=\"p_0\"} 0.0" in await p.metrics()
            with pytest.raises(grpcclient.InferenceServerException, match="decoupled"):
                await prefill(decoder, call("mock_0", prompt), "mock_0")


async def test_leaving_a_stream_or_aborting_by_id_frees_the_engine() -> None:
    async with mock("--speedup", "1") as server, connect(server.grpc) as client:

        async def idle() -> bool:
            return "vllm:num_requests_running{model_name=\"mock_0\"} 0.0" in await server.metrics()

        stream = responses(client, call("mock_0", tokens(20), 20_000))
        await anext(stream)
        assert not await idle()
        await stream.aclose()
        await until(idle, "a cancelled request leaves the engine")
        stream = responses(client, call("mock_0", tokens(20), 20_000, request_id="mine"))
        await anext(stream)
        assert await collect(client, Call("mock_0", None, stream=None, parameters={"abort": "mine"})) == []
        with pytest.raises(grpcclient.InferenceServerException, match="aborted"):
            async for _ in stream:
                pass
        await until(idle, "an aborted request leaves the engine")


async def test_a_wrong_request_is_answered_with_its_own_error_and_others_go_on() -> None:
    async with mock("--speedup", "20") as server, connect(server.grpc) as client:
        for wrong, message in ((Call("mock_0", [], {}), "input_ids is empty"), (call("other", tokens(5)), "unknown model"),
                               (Call("mock_0", tokens(5), {"n": 2}), "n=2"), (call("mock_0", tokens(5), 10**7), "exceed")):
            with pytest.raises(grpcclient.InferenceServerException, match=message):
                await collect(client, wrong)
        assert len(await ids_of(client, call("mock_0", tokens(5), 3, returns=("output_ids",)))) == 3


async def test_a_killed_worker_breaks_its_streams_off_and_leaves_discovery_after_its_lease(tmp_path: Path) -> None:
    url = f"file:{tmp_path}"
    async with mock("--workers", "2", "--discovery", url, "--speedup", "1") as server, connect(server.grpc) as client:
        discovery = open_discovery(url)
        assert [(record.triton_model, record.role) for record in await discovery.list()] == [("mock_0", Role.AGGREGATED),
                                                                                             ("mock_1", Role.AGGREGATED)]
        doomed, healthy = (responses(client, call(f"mock_{index}", tokens(20), 60)) for index in (0, 1))
        await anext(doomed)
        await anext(healthy)
        assert await server.post("/mock/kill?worker=0") == {"killed": "mock_0"}
        with pytest.raises(grpc.aio.AioRpcError, match="Socket closed"):
            async for _ in doomed:
                pass
        assert [item async for item in healthy]
        assert not await client.is_model_ready("mock_0")

        async def gone() -> bool:
            return [record.triton_model for record in await discovery.list()] == ["mock_1"]

        await until(gone, "the dead worker is not listed any more")
        await discovery.close()


async def test_die_after_ends_a_worker_in_mid_stream() -> None:
    async with mock("--die-after", "5", "--speedup", "20") as server, connect(server.grpc) as client:
        seen: list[int] = []
        with pytest.raises(grpc.aio.AioRpcError, match="Socket closed"):  # noqa: PT012 - what came before the end counts
            async for item in responses(client, call("mock_0", tokens(10), 100, returns=("output_ids",))):
                seen += item["output_ids"]
        assert len(seen) <= 5


async def test_a_wrong_setting_exits_with_2_and_a_sentence() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tandem_worker.mock", "--blocks", "0", stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL)
    async with asyncio.timeout(START_TIMEOUT_S):
        _, errors = await process.communicate()
    assert process.returncode == 2
    assert b"must be at least 1" in errors
