# SPDX-License-Identifier: Apache-2.0
"""A circuit breaker: after failures in a row a store is left alone for a while, so that requests don't wait for it in turn.

Closed: all pass. Open: none passes until the back-off ends. Then one passes as a trial; its success closes the breaker, its failure
doubles the back-off. Thread-safe.
"""

import threading
from collections.abc import Callable


class Breaker:
    """Whether to try."""

    def __init__(self, failures: int, backoff_s: float, backoff_max_s: float, clock: Callable[[], float]) -> None:
        self._limit, self._first_s, self._max_s, self._clock = failures, backoff_s, backoff_max_s, clock
        self._failures = 0
        self._backoff_s = backoff_s
        self._open_until: float | None = None
        self._trial = False
        self._lock = threading.Lock()
        self.opened = 0
        """How often it went from closed to open."""

    def is_shut_off(self) -> bool:
        """Whether `admit` would refuse now; changes nothing."""
        with self._lock:
            return self._refuses()

    def admit(self) -> bool:
        """Whether to try now. Who is admitted must call `succeeded` or `failed`."""
        with self._lock:
            if self._refuses():
                return False
            self._trial = self._open_until is not None
            return True

    def succeeded(self) -> None:
        """The store answered, whatever it said of the block."""
        with self._lock:
            self._failures, self._backoff_s, self._open_until, self._trial = 0, self._first_s, None, False

    def failed(self) -> None:
        """The store did not answer in time, or refused."""
        with self._lock:
            self._failures += 1
            if self._open_until is None and self._failures >= self._limit:
                self.opened += 1
                self._open_until = self._clock() + self._backoff_s
            elif self._trial:
                self._backoff_s = min(2 * self._backoff_s, self._max_s)
                self._open_until = self._clock() + self._backoff_s
            self._trial = False

    def _refuses(self) -> bool:
        return self._open_until is not None and (self._trial or self._clock() < self._open_until)
