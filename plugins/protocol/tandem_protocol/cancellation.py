# SPDX-License-Identifier: Apache-2.0
"""Finds out which clients went away. A thread of its own, since each question is a round trip to Triton."""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from tandem_protocol.streams import ResponseStream

_MAX_POLLS_PER_S = 500
"""Each poll takes about 0.1 ms of the stub's control channel; more would slow the token streams."""


class InFlight(Protocol):
    """A request that has not ended."""

    stream: ResponseStream


T = TypeVar("T", bound=InFlight)


class CancelPoll:
    """Asks for every request in flight, in turn; `on_gone` is called on the poll's thread."""

    def __init__(self, in_flight: Callable[[], Iterable[T]], on_gone: Callable[[T], None], interval_s: float) -> None:
        self._in_flight = in_flight
        self._on_gone = on_gone
        self._interval_s = interval_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tandem-cancel", daemon=True)

    def start(self) -> None:
        """Begins to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ends after the question that is under way."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            started = time.monotonic()
            for item in tuple(self._in_flight()):
                if item.stream.sink.is_cancelled():
                    self._on_gone(item)
                self._stopping.wait(1 / _MAX_POLLS_PER_S)
            self._stopping.wait(max(0.0, self._interval_s - (time.monotonic() - started)))
