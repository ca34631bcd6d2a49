# SPDX-License-Identifier: Apache-2.0
"""How long a load may still take, in whichever thread it is, and whether it is still wanted."""

import threading
import time
from collections.abc import Callable

from tandem_protocol.errors import UnavailableError


class Deadline:
    """A point in time, or the moment when `stop` is set, if that is earlier. Thread-safe."""

    def __init__(self, seconds: float, stop: threading.Event | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._seconds = clock, seconds
        self._stop = stop or threading.Event()
        self._end = clock() + seconds

    def left_s(self) -> float:
        """Seconds left; never negative."""
        return max(0.0, self._end - self._clock())

    def check(self) -> None:
        """Raises UnavailableError when the time is over."""
        if self._stop.is_set():
            raise UnavailableError("the worker is shutting down: load the adapter on another one")
        if self.left_s() <= 0:
            raise UnavailableError(f"no adapter arrived within {self._seconds:g} s (VLLM_LORA_MODULES_LOADING_TIMEOUT): retry later")

    def pause(self, seconds: float) -> None:
        """Waits, but not beyond the end. Raises UnavailableError when the time is over."""
        self._stop.wait(min(seconds, self.left_s()))
        self.check()
