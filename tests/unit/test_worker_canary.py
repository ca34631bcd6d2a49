# SPDX-License-Identifier: Apache-2.0
"""What a canary is, and what its answer, lateness or failure makes of the worker."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from fakes import WAIT_S
from tandem_protocol.errors import ConfigError
from tandem_worker.canary import Canary, Patience, canary_request
from tandem_worker.config import load_settings

AT_ONCE = Patience(wait_s=0.01, timeout_s=0.01, give_up_s=60.0)
LONG = Patience(wait_s=0.01, timeout_s=60.0, give_up_s=60.0)


def canary(send: Callable[[], Awaitable[None]], told: list[str | None], patience: Patience, idle_s: float = 1e9) -> Canary:
    """A canary of a worker that has been idle for so long."""
    return Canary(send, lambda: idle_s, told.append, patience)


def test_the_request_of_a_worker_that_takes_text() -> None:
    """One token, greedy, no stream, no handoff."""
    request = canary_request("", takes_text=True, bos=7)
    assert (request.prompt, request.sampling) == ("Test", {"temperature": 0.0, "max_tokens": 1, "ignore_eos": True})
    assert (request.stream, request.handoff, request.images) == (False, None, ())


@pytest.mark.parametrize(("bos", "prompt"), [(7, [7]), (None, [1])])
def test_the_request_of_a_worker_that_takes_ids_only(bos: int | None, prompt: list[int]) -> None:
    """The model's first token, or 1."""
    assert canary_request("", takes_text=False, bos=bos).prompt == prompt


def test_a_payload_of_ones_own() -> None:
    """In Dynamo's form; what it leaves out stays as it is."""
    payload = {"token_ids": [5, 6], "sampling_options": {"temperature": 0.5}, "stop_conditions": {"max_tokens": 2}}
    request = canary_request(json.dumps(payload), takes_text=True, bos=None)
    assert request.prompt == [5, 6]
    assert request.sampling == {"temperature": 0.5, "max_tokens": 2, "ignore_eos": True}


def test_every_canary_has_an_id_of_its_own() -> None:
    """vLLM refuses an id that it has already."""
    assert canary_request("", takes_text=True, bos=None).request_id != canary_request("", takes_text=True, bos=None).request_id


@pytest.mark.parametrize("payload", ["{", "[]", "{}", '{"prompt": "a", "token_ids": [1]}', '{"prompt": 3}', '{"token_ids": []}',
                                     '{"token_ids": ["a"]}'])
def test_a_wrong_payload_stops_the_start(payload: str) -> None:
    """With the variable's name."""
    with pytest.raises(ConfigError, match="DYN_HEALTH_CHECK_PAYLOAD"):
        load_settings({}, {"DYN_HEALTH_CHECK_PAYLOAD": payload})


async def test_an_answer_in_time_makes_well() -> None:
    """Also after something else had been said."""
    told: list[str | None] = []

    async def send() -> None:
        """Answers at once."""

    await canary(send, told, LONG).check()
    assert told == [None]


async def test_a_failure_makes_unwell() -> None:
    """With the engine's words."""
    told: list[str | None] = []

    async def send() -> None:
        raise RuntimeError("out of memory")

    await canary(send, told, LONG).check()
    assert told == ["the engine failed on a canary request: out of memory"]


async def test_a_late_answer_makes_unwell_until_it_comes() -> None:
    """The request stays in the engine meanwhile."""
    told: list[str | None] = []
    late = asyncio.Event()

    class Waiting(Canary):
        """Lets the answer come as soon as its lateness was told."""

        def _note(self, reason: str | None) -> None:
            super()._note(reason)
            late.set()

    async def send() -> None:
        await late.wait()

    await asyncio.wait_for(Waiting(send, lambda: 1e9, told.append, AT_ONCE).check(), WAIT_S)
    assert told == ["the engine did not answer a canary request within 0.01 s (DYN_HEALTH_CHECK_REQUEST_TIMEOUT)", None]


async def test_a_canary_that_is_given_up_is_aborted_and_leaves_the_worker_unwell() -> None:
    """The next one tries again."""
    told: list[str | None] = []
    aborted = asyncio.Event()

    async def send() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            aborted.set()

    await canary(send, told, Patience(wait_s=0.01, timeout_s=0.01, give_up_s=0.01)).check()
    await asyncio.wait_for(aborted.wait(), WAIT_S)
    assert len(told) == 1
    assert told[0] is not None


async def test_a_busy_worker_is_left_alone_and_an_idle_one_asked_again_and_again() -> None:
    """Traffic is a better canary."""
    asked = asyncio.Semaphore(0)
    idle_s = 0.0

    async def send() -> None:
        asked.release()

    running = asyncio.create_task(Canary(send, lambda: idle_s, lambda _: None, LONG).run())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asked.acquire(), 0.1)
    idle_s = 1.0
    for _ in range(3):
        await asyncio.wait_for(asked.acquire(), WAIT_S)
    running.cancel()
