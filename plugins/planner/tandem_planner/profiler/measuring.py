# SPDX-License-Identifier: Apache-2.0
"""One point of the grid on a running server.

Prefill: one prompt at a time, never seen before, so that nothing of it is cached; the median of several.
Decode: all prompts are sent once for a single token, so that prefix caching has them (many do already, since the points of one context
share their prompts); then all at once. ITL and throughput are those of the window in which every request generates: from the last one's
first token to the first one's last. Where that window is short, since nothing is cached, answers are made longer.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from tandem_planner.profiler.grid import DecodePoint, PrefillPoint
from tandem_protocol.errors import EngineError

TokenTimes = Sequence[tuple[float, int]]
"""(seconds, tokens so far), rising."""
Batch = Sequence[npt.NDArray[np.int32]]
"""Prompts as token ids."""
LEAST_WINDOW = 0.5
"""Of an answer's tokens that must come while all requests generate."""
MOST_STRETCH = 8
"""Times the wanted length to which an answer may be made longer."""
_WARM_AT_ONCE = 16


class PrefillResult(msgspec.Struct, frozen=True):
    """Of one prompt length."""

    ttft_s: float
    """Median."""


class DecodeResult(msgspec.Struct, frozen=True):
    """Of one steady batch."""

    itl_s: float
    """Mean."""
    tokens_per_s: float
    context: float
    """Tokens per request, mean over the window."""


class Streams(Protocol):
    """What the measurements ask of a server."""

    async def token_times(self, prompt: npt.NDArray[np.int32], tokens: int) -> TokenTimes:
        """Sends a request; (seconds from sending, tokens so far) per response. May be called concurrently."""


@dataclass(frozen=True)
class Prompts:
    """Random token ids, other ones at each call, the same for the same seed."""

    vocabulary: int
    rng: np.random.Generator

    def draw(self, tokens: int) -> npt.NDArray[np.int32]:
        """INT32 [tokens]. The lowest ids are left out: models keep them for special tokens."""
        return self.rng.integers(min(100, self.vocabulary // 2), self.vocabulary, tokens, dtype=np.int32)


async def measure_prefill(point: PrefillPoint, streams: Streams, prompts: Prompts, repeats: int) -> PrefillResult:
    """Medians of `repeats`, after one that is not counted."""
    ttft = []
    for _ in range(repeats + 1):
        times = await streams.token_times(prompts.draw(point.isl), 1)
        ttft.append(times[0][0])
    return PrefillResult(float(np.median(ttft[1:])))


async def measure_decode(point: DecodePoint, streams: Streams, batch: Batch) -> DecodeResult:
    """`batch` holds the point's prompts, one per request. Raises EngineError if no steady window could be had."""
    await _warm(batch, streams)
    for stretch in (1, 2, MOST_STRETCH):
        tokens = point.osl * stretch
        began = asyncio.get_running_loop().time()
        found = steady(await _together([_shifted(streams, prompt, tokens, began) for prompt in batch]), point.isl)
        if found is not None and found.tokens >= LEAST_WINDOW * point.osl:
            return found.result
    raise EngineError(f"{point.requests} requests with prompts of {point.isl} tokens never generated together: turn prefix caching on")


async def _warm(batch: Batch, streams: Streams) -> None:
    gate = asyncio.Semaphore(_WARM_AT_ONCE)

    async def one(prompt: npt.NDArray[np.int32]) -> TokenTimes:
        async with gate:
            return await streams.token_times(prompt, 1)

    await _together([one(prompt) for prompt in batch])


async def _together(requests: Sequence[Coroutine[Any, Any, TokenTimes]]) -> list[TokenTimes]:
    """All at once; the first failure cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(request) for request in requests]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return [task.result() for task in tasks]


async def _shifted(streams: Streams, prompt: npt.NDArray[np.int32], tokens: int, began: float) -> TokenTimes:
    """Times from a common beginning instead of from the sending."""
    sent = asyncio.get_running_loop().time() - began
    return [(at + sent, count) for at, count in await streams.token_times(prompt, tokens)]


@dataclass(frozen=True)
class Window:
    """The time in which all requests generate."""

    result: DecodeResult
    tokens: float
    """Per request, mean."""


def steady(streams: Sequence[TokenTimes], isl: int) -> Window | None:
    """Figures of the window that all streams share; None if there is none. Pure."""
    begin = max(times[0][0] for times in streams)
    end = min(times[-1][0] for times in streams)
    if end <= begin:
        return None
    before = np.array([_count_at(times, begin) for times in streams])
    after = np.array([_count_at(times, end) for times in streams])
    tokens = after - before
    if tokens.min() <= 0:
        return None
    seconds = end - begin
    result = DecodeResult(float(np.mean(seconds / tokens)), float(tokens.sum() / seconds), float(isl + np.mean(before + after) / 2))
    return Window(result, float(tokens.mean()))


def _count_at(times: TokenTimes, at_s: float) -> float:
    """Tokens at a moment; between two responses in proportion, since a response may carry several tokens."""
    return float(np.interp(at_s, [at for at, _ in times], [count for _, count in times]))
