# SPDX-License-Identifier: Apache-2.0
"""Measures one request in the worker: from Triton's `execute` to the engine's last output, where Triton itself knows only of the first.

Threads: the event loop pushes outputs and ends requests; the outbox's thread sends, and counts bytes. Each figure has one writer.
Times are `time.monotonic`, the clock of vLLM's own time stamps of a request, which Linux keeps alike in all processes of a host.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tandem_protocol.errors import ErrorCode, TandemError
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.streams import Arrays, MergeableOutput, Outbox, ResponseStream, Sink
from tandem_protocol.tallies import Tally

OK = "ok"
OpenStream = Callable[[GenerationRequest, Sink, Outbox], ResponseStream]
"""Makes the stream of responses of a request that was just taken."""


@dataclass(frozen=True)
class WorkerTallies:
    """The histograms of a worker, in seconds."""

    time_to_first_token: Tally
    inter_token_latency: Tally
    queue: Tally
    duration: Tally


@dataclass
class WorkTotals:
    """What a worker has done since its start."""

    tallies: WorkerTallies
    requests: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    """Of what was handed to Triton; written by the outbox's thread."""
    errors: Counter[str] = field(default_factory=lambda: Counter({code_of(code): 0 for code in ErrorCode}))
    """Requests that ended with an error, by its code."""


class RequestMeter:
    """One request. Only the event loop calls it."""

    __slots__ = ("_ended", "_last", "_started", "_streamed", "_tokens", "_totals")

    def __init__(self, totals: WorkTotals, started: float, *, streamed: bool) -> None:
        self._totals, self._started, self._streamed = totals, started, streamed
        self._last = started
        self._tokens = 0
        self._ended = False

    def received(self, output: Any, now: float) -> None:
        """The engine's next output, vLLM's RequestOutput with what is new since the one before."""
        tokens = sum(len(sequence.token_ids) for sequence in output.outputs)
        if tokens and not self._tokens:
            self._first(output, tokens, now)
        elif tokens and self._streamed:
            self._totals.tallies.inter_token_latency.observe((now - self._last) * len(output.outputs) / tokens, tokens)
        self._last = now
        self._tokens += tokens
        if output.finished:
            self.ended(OK, now)

    def ended(self, outcome: str, now: float) -> None:
        """`OK` or an error's code; only the first call counts."""
        if self._ended:
            return
        self._ended = True
        self._totals.requests += 1
        if outcome != OK:
            self._totals.errors[outcome] += 1
        self._totals.tallies.duration.observe(now - self._started)

    def _first(self, output: Any, tokens: int, now: float) -> None:
        """Of an answer that comes in one piece only vLLM's time stamps tell when its tokens were made."""
        tallies, stamps = self._totals.tallies, output.metrics
        if stamps is not None and stamps.scheduled_ts > 0:
            tallies.queue.observe(max(stamps.scheduled_ts - self._started, 0.0))
        if self._streamed:
            tallies.time_to_first_token.observe(now - self._started)
        elif stamps is not None and stamps.first_token_ts > 0:
            tallies.time_to_first_token.observe(max(stamps.first_token_ts - self._started, 0.0))
            gaps = tokens - len(output.outputs)
            if gaps > 0:
                tallies.inter_token_latency.observe((stamps.last_token_ts - stamps.first_token_ts) * len(output.outputs) / gaps, gaps)


def code_of(code: ErrorCode) -> str:
    """As `ResponseStream.outcome` tells it."""
    return str(code).lower()


def plain_stream(request: GenerationRequest, sink: Sink, outbox: Outbox) -> ResponseStream:
    """One that nobody measures."""
    del request
    return ResponseStream(sink, outbox)


class MeteredSink:
    """A sink that counts what it sends."""

    def __init__(self, sink: Sink, totals: WorkTotals) -> None:
        self._sink, self._totals = sink, totals

    def send(self, arrays: Arrays, *, final: bool) -> None:
        """Sends one response; the final one closes the stream."""
        self._totals.response_bytes += size_of(arrays.values())
        self._sink.send(arrays, final=final)

    def fail(self, error: TandemError) -> None:
        """Closes the stream with an error."""
        self._sink.fail(error)

    def is_cancelled(self) -> bool:
        """Whether the client went away."""
        return self._sink.is_cancelled()


class MeteredStream(ResponseStream):
    """The responses of one request, measured as they come from the engine."""

    def __init__(self, request: GenerationRequest, sink: Sink, outbox: Outbox, totals: WorkTotals) -> None:
        super().__init__(MeteredSink(sink, totals), outbox)
        totals.request_bytes += request_bytes(request)
        self._meter = RequestMeter(totals, time.monotonic(), streamed=request.stream)

    def push(self, output: MergeableOutput) -> None:
        """Hands over the next output."""
        self._meter.received(output, time.monotonic())
        super().push(output)

    def fail(self, error: TandemError) -> None:
        """Ends the stream with an error."""
        self._meter.ended(code_of(error.code), time.monotonic())
        super().fail(error)


def request_bytes(request: GenerationRequest) -> int:
    """Size of a prompt with its images, as it came."""
    prompt = len(request.prompt.encode()) if isinstance(request.prompt, str) else 4 * len(request.prompt)
    return prompt + sum(len(image) for image in request.images)


def size_of(arrays: Iterable[Any]) -> int:
    """Size of tensors in bytes; texts by their content."""
    return sum(sum(map(len, array.flat)) if array.dtype == object else array.nbytes for array in arrays)
