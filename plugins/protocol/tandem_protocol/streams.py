# SPDX-License-Identifier: Apache-2.0
"""Carries responses from an event loop to Triton, in order, without ever blocking the loop.

Threads: `ResponseStream.push`, `finish` and `fail` are called by the event loop; the sender thread of the `Outbox`
calls the sink. While a response is being sent, further outputs of that request are merged into one, so a slow sender
means fewer and larger responses, never a growing queue: each stream holds at most one pending output, and the outbox
holds each stream at most once.
"""

import contextvars
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy.typing as npt

from tandem_protocol.errors import EngineError, TandemError

log = logging.getLogger(__name__)


Arrays = dict[str, npt.NDArray[Any]]
"""The tensors of one response by name."""


class MergeableOutput(Protocol):
    """A delta of an answer: vLLM's RequestOutput in a worker, a relayed response in the router."""

    finished: bool

    def add(self, next_output: Any, aggregate: bool) -> None:
        """Merges a later output into this one."""


class Sink(Protocol):
    """Where the responses of one request go: Triton's response sender, or a recorder in tests."""

    def send(self, arrays: Arrays, *, final: bool) -> None:
        """Sends one response; `final` closes the stream."""

    def fail(self, error: TandemError) -> None:
        """Closes the stream with an error."""

    def is_cancelled(self) -> bool:
        """Whether the client went away."""


class ResponseStream:
    """The responses of one request. Exactly one of `finish` or `fail` ends it; what comes after is dropped."""

    def __init__(self, sink: Sink, outbox: "Outbox") -> None:
        self.sink = sink
        self.encode: Callable[[Any], Arrays] | None = None
        self._outbox = outbox
        self._lock = threading.Lock()
        self._pending: MergeableOutput | None = None
        self._error: TandemError | None = None
        self._ended = False
        self._queued = False
        self._closed = False
        self._context = contextvars.copy_context()  # so that the sender's logs name the request, too

    @property
    def outcome(self) -> str:
        """`ok`, or the code of the error that ended it: for metrics."""
        return "ok" if self._error is None else str(self._error.code).lower()

    def push(self, output: MergeableOutput) -> None:
        """Hands over the next output; `output.finished` ends the stream."""
        with self._lock:
            if self._ended:
                return
            if self._pending is None:
                self._pending = output
            else:
                self._pending.add(output, aggregate=True)
            self._ended = output.finished
            self._enqueue()

    def fail(self, error: TandemError) -> None:
        """Ends the stream with an error, after what was pushed before it."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            self._error = error
            self._enqueue()

    def _enqueue(self) -> None:
        if not self._queued:
            self._queued = True
            self._outbox.put(self)

    def flush(self) -> None:
        """Sends what is pending. Called by the sender thread only."""
        with self._lock:
            output, error, ended = self._pending, self._error, self._ended
            self._pending = None
            self._queued = False
        if self._closed:
            return
        try:
            if output is not None and self.encode is not None:
                self.sink.send(self.encode(output), final=ended and error is None)
            if error is not None:
                self.sink.fail(error)
        except TandemError as exc:
            ended = True
            self.sink.fail(exc)
        except Exception as exc:  # an encoder's bug must end this stream, not the sender of all streams
            self.log_exception("response.encode_failed")
            ended = True
            self.sink.fail(EngineError(f"the response could not be encoded: {exc}"))
        finally:
            self._closed = ended

    def log_exception(self, event: str) -> None:
        """Logs the exception that is being handled as one of this request."""
        self._context.copy().run(log.exception, event)


class Outbox:
    """One sender thread for all streams of a model."""

    def __init__(self) -> None:
        self._ready: queue.SimpleQueue[ResponseStream | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tandem-outbox", daemon=True)
        self._thread.start()

    def put(self, stream: ResponseStream) -> None:
        """Marks a stream as having something to send."""
        self._ready.put(stream)

    def close(self, timeout_s: float) -> None:
        """Sends what is left, then stops the thread; gives up after `timeout_s`."""
        self._ready.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (stream := self._ready.get()) is not None:
            try:
                stream.flush()
            except Exception:  # the sink itself failed: Triton has closed this stream, the others go on
                stream.log_exception("response.send_failed")
