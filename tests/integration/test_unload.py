# SPDX-License-Identifier: Apache-2.0
"""After whatever clients did, no request is kept: models can be unloaded, and the server ends at once.

tritonserver 2.51 never frees a request whose client cancels between the final response and the end of its stream; one such request, of
the router's or of a test's, and the model stays UNLOADING and the server's exit takes its timeout of 30 s.
"""

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc.aio as grpcclient

from calls import Call, collect, connect, gather_bounded, prefill, responses
from mock_models import MockServer, mock_fleet
from models import make_tiny_model
from servers import wait_for

AT_A_TIME = 32
UNLOADED_S, ENDED_S = 2.0, 10.0
MANY_TOKENS, TOO_MANY_TOKENS = 5_000, 10_000
MODELS = {"mock_0": "--no-events --speedup 5 --max-model-len 8192",
          "prefill_0": "--role prefill --no-events --speedup 5 --max-model-len 64"}

Kind = Callable[[Any, str, str], Awaitable[None]]


async def good(client: Any, model: str, name: str) -> None:
    """Several responses and an end."""
    tokens = [token for response in await collect(client, call(model, name, 4)) for token in response["output_ids"]]
    assert len(tokens) == 4


async def refused(client: Any, model: str, name: str) -> None:
    """An error in place of the first response."""
    with pytest.raises(grpcclient.InferenceServerException, match="exceed the model's"):
        await collect(client, call(model, name, TOO_MANY_TOKENS))


async def left(client: Any, model: str, name: str) -> None:
    """The client cancels in the middle."""
    async with aclosing(responses(client, call(model, name, MANY_TOKENS))) as stream:  # type: ignore[type-var]
        await anext(stream)


async def aborted(client: Any, model: str, name: str) -> None:
    """An error after the first responses."""

    async def follow() -> None:
        async for _ in responses(client, call(model, name, MANY_TOKENS)):
            await collect(client, Call("mock_0", None, stream=None, parameters={"abort": name}))

    with pytest.raises(grpcclient.InferenceServerException, match="aborted"):
        await follow()


async def prefilled(client: Any, model: str, name: str) -> None:
    """One response of a model that is not decoupled."""
    assert await prefill(client, call("prefill_0", name, 4), "prefill_0")


async def not_prefilled(client: Any, model: str, name: str) -> None:
    """And an error of it."""
    with pytest.raises(grpcclient.InferenceServerException, match="exceed the model's"):
        await prefill(client, Call("prefill_0", [1] * 100, {"max_tokens": 4}, request_id=name), "prefill_0")


KINDS: tuple[Kind, ...] = (good, refused, left, aborted, prefilled, not_prefilled)


def call(model: str, name: str, max_tokens: int) -> Call:
    return Call(model, [1, 2, 3, 4], {"max_tokens": max_tokens}, returns=("output_ids",), request_id=name)


async def stress(server: MockServer, count: int) -> None:
    """`count` requests of every kind, half of them through the router."""
    async with connect(server.grpc_url) as client:
        await gather_bounded(AT_A_TIME, *(kind(client, "mock_0" if number % 2 else "router", f"{kind.__name__}-{number}")
                                          for number in range(count) for kind in KINDS))


async def unload(server: MockServer, model: str) -> None:
    """Asks for it; Triton answers before it is done."""
    async with connect(server.grpc_url) as client:
        await client.unload_model(model)


@pytest.mark.slow
@pytest.mark.parametrize("count", [pytest.param(50, id="short"), pytest.param(1000, id="long")])
async def test_models_unload_and_the_server_ends_at_once_after_answers_errors_and_cancellations(count: int, tmp_path: Path) -> None:
    """Of each kind so many, 32 at a time, of models that are decoupled and that are not, directly and through the router."""
    with mock_fleet(tmp_path, MODELS, ("mock_0", "prefill_0"), make_tiny_model(tmp_path / "tokenizer"), DYN_ROUTER_MODE="round-robin",
                    TANDEM_ROUTER_ADMIN_HOST="127.0.0.1") as server:
        await stress(server, count)
        for model in MODELS:
            await unload(server, model)
            wait_for(lambda model=model: model not in server.loaded(), UNLOADED_S, f"{model} is unloaded")  # type: ignore[misc]
        server.process.terminate()
        assert server.process.wait(ENDED_S) == 0  # with the router, which forwarded half of it
