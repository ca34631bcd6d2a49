# SPDX-License-Identifier: Apache-2.0
"""Streams of responses are left when the server has ended them, or after a bound."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from tandem_protocol.stream_end import read_to_end


class StreamError(Exception):
    """As a client library raises it."""


async def responses(read: list[int], then: Exception | None = None) -> AsyncIterator[int]:
    """Two late responses, and an end or an error."""
    for number in range(2):
        read.append(number)
        yield number
    if then is not None:
        raise then


@pytest.mark.parametrize("then", [None, StreamError("the status of the error that came before")])
async def test_what_is_left_is_read(then: Exception | None) -> None:
    """An end by the error that the stream was known to have is an end, too."""
    read: list[int] = []
    await read_to_end(responses(read, then), StreamError)
    assert read == [0, 1]


async def test_other_errors_are_not_hidden() -> None:
    """They are mistakes of ours."""
    with pytest.raises(KeyError):
        await read_to_end(responses([], KeyError("ours")), StreamError)


async def test_a_server_that_never_ends_it_costs_a_bound() -> None:
    """The stream is cancelled then by whoever opened it."""

    async def silent() -> AsyncIterator[int]:
        await asyncio.Event().wait()
        yield 0

    began = time.monotonic()
    await read_to_end(silent(), StreamError, 0.05)
    assert 0.05 <= time.monotonic() - began < 5
