# SPDX-License-Identifier: Apache-2.0
"""The profiler's client and a server that goes away or refuses: one sentence, no traceback of the transport."""

import grpc
import numpy as np
import pytest

from fake_triton import FakeModel, FakeTriton, abort_with, answer, delta, failure
from tandem_planner.profiler.client import StreamClient
from tandem_protocol.errors import EngineError, TandemError, UnavailableError

PROMPT = np.arange(4, dtype=np.int32)


@pytest.mark.parametrize(("script", "error", "sentence"), [
    (abort_with(grpc.StatusCode.UNAVAILABLE, "Socket closed"), UnavailableError, "vllm was lost in mid-answer .Socket closed."),
    (answer(failure("too long")), EngineError, "vllm refused a prompt of 4 tokens: too long"),
    (answer(delta("a", final=True)), EngineError, "vllm ended after 1 of 2 tokens"),
])
async def test_what_is_said_of_a_server_that_does_not_answer(script: object, error: type[TandemError], sentence: str) -> None:
    """Each with its own error."""
    async with FakeTriton({"vllm": FakeModel(script)}) as server, StreamClient(server.url, "vllm", 20.0) as client:  # type: ignore[arg-type]
        with pytest.raises(error, match=sentence):
            await client.token_times(PROMPT, 2)
