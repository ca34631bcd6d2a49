# SPDX-License-Identifier: Apache-2.0
"""The client against a server that misbehaves in every way that a client must survive."""

import asyncio
import logging
from contextlib import aclosing
from typing import Any

import grpc  # type: ignore[import-untyped]  # grpcio ships no types
import pytest

from fake_triton import FakeModel, FakeTriton, Script, abort_with, answer, delta, failure, silence_after
from tandem_cli import client as client_module
from tandem_cli.client import GenerationClient
from tandem_cli.messages import Delta, GenerationRequest
from tandem_protocol.errors import ConfigError, EngineError, RequestCancelledError, RequestError, TandemError, UnavailableError

TIMEOUT_S = 10.0


def request(model: str = "vllm", **options: Any) -> GenerationRequest:
    """A request whose id the tests know."""
    return GenerationRequest(**{"model": model, "prompt": "hi", "request_id": "r1", "timeout_s": TIMEOUT_S, **options})


def fleet(script: Script) -> dict[str, FakeModel]:
    """An ensemble whose own stream follows `script`, and its two workers, which confirm an abort."""
    confirm = answer(delta(final=True))
    return {"disagg": FakeModel(script, steps=("prefill", "decode")), "prefill": FakeModel(confirm), "decode": FakeModel(confirm)}


def aborted_ids(model: FakeModel) -> list[str]:
    """Ids that a worker was told to abort, by requests without inputs."""
    return [message.parameters["abort"].string_param for message in model.requests if not message.inputs]


async def consume(server: FakeTriton, ask: GenerationRequest) -> list[Delta]:
    """All deltas of an answer."""
    async with GenerationClient(server.url) as client:
        return [item async for item in client.stream(ask)]


async def test_deltas_come_in_order_and_the_last_one_is_final() -> None:
    """A stream yields what the server sent, with the FINAL flag on the last delta alone."""
    model = FakeModel(answer(delta("Hel"), delta("lo", finish_reason="stop"), delta(final=True)))
    async with FakeTriton({"vllm": model}) as server:
        deltas = await consume(server, request())
    assert [item.text for item in deltas] == ["Hel", "lo", ""]
    assert [item.final for item in deltas] == [False, False, True]
    assert [item.finish_reason for item in deltas] == [None, "stop", None]
    assert model.requests[0].id == "r1"
    assert model.requests[0].parameters["triton_enable_empty_final_response"].bool_param


async def test_error_in_mid_stream_comes_after_the_deltas_before_it() -> None:
    """What was generated before the engine failed is not lost, and the failure is not taken for the end."""
    seen: list[str] = []
    async with FakeTriton({"vllm": FakeModel(answer(delta("a"), failure("CUDA error")))}) as server, GenerationClient(server.url) as client:
        with pytest.raises(EngineError, match="CUDA error"):  # noqa: PT012 - the loop is what raises
            async for item in client.stream(request()):
                seen.append(item.text)  # noqa: PERF401 - a comprehension would lose what came before the error
    assert seen == ["a"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, RequestError),
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.CANCELLED, RequestCancelledError),
        (grpc.StatusCode.INTERNAL, EngineError),
    ],
)
async def test_status_of_the_stream_decides_the_error(code: Any, error: type[TandemError]) -> None:
    """A gRPC status becomes the error of the same meaning, with the server's own sentence."""
    async with FakeTriton({"vllm": FakeModel(abort_with(code, "because of X"))}) as server:
        with pytest.raises(error, match="because of X"):
            await consume(server, request())


async def test_stream_that_ends_without_final_response_is_an_error() -> None:
    """A server that closes early has not finished the answer, even if it says OK."""
    async with FakeTriton({"vllm": FakeModel(answer(delta("half")))}) as server:
        with pytest.raises(UnavailableError, match="before the answer was complete"):
            await consume(server, request())


async def test_silence_ends_at_the_deadline_and_aborts_the_ensembles_workers() -> None:
    """A deadline is kept against a silent server, whose engines are told to stop."""
    models = fleet(silence_after(delta("a")))
    async with FakeTriton(models) as server:
        with pytest.raises(UnavailableError, match="--timeout-s"):
            await consume(server, request("disagg", timeout_s=0.3))
    assert aborted_ids(models["prefill"]) == aborted_ids(models["decode"]) == ["r1"]


async def test_cancelling_an_ensemble_cancels_the_stream_and_aborts_its_workers() -> None:
    """Both ways out are taken: Triton hears of the cancellation, and the running steps of the abort."""
    models = fleet(silence_after(delta("a")))
    started = asyncio.Event()

    async def read(client: GenerationClient) -> None:
        async for _ in client.stream(request("disagg")):
            started.set()

    async with FakeTriton(models) as server, GenerationClient(server.url) as client, asyncio.timeout(TIMEOUT_S):
        task = asyncio.create_task(read(client))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await models["disagg"].cancelled.wait()
    assert aborted_ids(models["prefill"]) == aborted_ids(models["decode"]) == ["r1"]


async def test_leaving_the_loop_early_is_a_cancellation() -> None:
    """A consumer that has had enough closes the stream, and that aborts as well."""
    models = fleet(silence_after(delta("a")))
    async with FakeTriton(models) as server, GenerationClient(server.url) as client, asyncio.timeout(TIMEOUT_S):
        async with aclosing(client.stream(request("disagg"))) as deltas:
            await anext(deltas)
        await models["disagg"].cancelled.wait()
    assert aborted_ids(models["decode"]) == ["r1"]


async def test_cancelling_a_worker_needs_no_abort() -> None:
    """Triton passes a cancellation on to a model that was called directly."""
    model = FakeModel(silence_after(delta("a")))
    async with FakeTriton({"vllm": model}) as server, GenerationClient(server.url) as client, asyncio.timeout(TIMEOUT_S):
        async with aclosing(client.stream(request())) as deltas:
            await anext(deltas)
        await model.cancelled.wait()
    assert len(model.requests) == 1


@pytest.mark.parametrize("script", [answer(delta("a", final=True)), answer(failure("bad")), abort_with(grpc.StatusCode.INTERNAL, "bad")])
async def test_request_that_the_server_ended_is_not_aborted(script: Script) -> None:
    """An abort after the end would be noise, and the id might be in use again."""
    models = fleet(script)
    async with FakeTriton(models) as server, GenerationClient(server.url) as client:
        try:
            async for _ in client.stream(request("disagg")):
                pass
        except EngineError:
            pass
    assert models["prefill"].requests == models["decode"].requests == []


async def test_abort_is_bounded_when_workers_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that hangs can't hold the client that wants to leave."""
    monkeypatch.setattr(client_module, "ABORT_TIMEOUT_S", 0.2)
    models = {**fleet(silence_after(delta("a"))), "prefill": FakeModel(silence_after())}
    async with FakeTriton(models) as server, GenerationClient(server.url) as client:
        deltas = client.stream(request("disagg"))
        await anext(deltas)
        async with asyncio.timeout(TIMEOUT_S):
            await deltas.aclose()
    assert aborted_ids(models["decode"]) == ["r1"]


async def test_worker_that_refuses_the_abort_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A failed abort leaves a trace, and the other workers are still told."""
    models = {**fleet(answer()), "prefill": FakeModel(answer(failure("no such parameter")))}
    async with FakeTriton(models) as server, GenerationClient(server.url) as client:
        with caplog.at_level(logging.WARNING):
            await client.abort("disagg", "r1")
    assert "model prefill did not abort request r1: no such parameter" in caplog.text
    assert aborted_ids(models["decode"]) == ["r1"]


async def test_abort_reaches_the_workers_of_nested_ensembles() -> None:
    """Only workers are told, at any depth, each once."""
    confirm = answer(delta(final=True))
    models = {
        "outer": FakeModel(steps=("inner", "b")), "inner": FakeModel(steps=("a", "b")),
        "a": FakeModel(confirm), "b": FakeModel(confirm),
    }
    async with FakeTriton(models) as server, GenerationClient(server.url) as client:
        await client.abort("outer", "r9")
    assert [aborted_ids(models[name]) for name in ("a", "b", "inner")] == [["r9"], ["r9"], []]


async def test_server_that_keeps_the_stream_open_after_final_is_left() -> None:
    """After the final response nothing is owed, so a stream that stays open ends the wait within a second and without an error."""
    async with FakeTriton({"vllm": FakeModel(silence_after(delta("a", final=True)))}) as server:
        assert [item.text for item in await consume(server, request())] == ["a"]


async def test_no_server_says_what_to_do() -> None:
    """A refused connection names the command that starts a server."""
    async with FakeTriton({}) as server:
        url = server.url
    async with GenerationClient(url) as client:
        with pytest.raises(UnavailableError, match="tandem serve"):
            await client.index()


async def test_unknown_model_says_where_the_models_are_listed() -> None:
    """A model that isn't there is the client's mistake."""
    async with FakeTriton({}) as server, GenerationClient(server.url) as client:
        with pytest.raises(RequestError, match="tandem status"):
            await client.info("nope")


@pytest.mark.parametrize("url", ["localhost", "http://localhost:8000"])
def test_url_that_is_not_host_and_port_is_refused(url: str) -> None:
    """Triton's HTTP address is the usual mistake."""
    with pytest.raises(ConfigError, match="host:port"):
        GenerationClient(url)


async def test_index_is_sorted_and_says_why_a_model_is_not_ready() -> None:
    """Triton's reason is kept; a model that was never loaded has none of its own."""
    models = {"b": FakeModel(state="UNAVAILABLE", reason="out of memory"), "a": FakeModel(state="")}
    async with FakeTriton(models) as server, GenerationClient(server.url) as client:
        index = await client.index()
    assert [(entry.name, entry.ready, entry.reason) for entry in index] == [("a", False, "not loaded"), ("b", False, "out of memory")]
