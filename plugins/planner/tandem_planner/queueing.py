# SPDX-License-Identifier: Apache-2.0
"""How long a prompt waits for a prefill engine.

Erlang's C gives the chance of waiting with c engines that take any prompt; the wait of those who do is taken as exponential, scaled by the
variability v = (ca^2 + cs^2) / 2 of arrivals and prompt lengths (Allen and Cunneen): v = 1 is M/M/c, v = 0.5 is M/D/c.
    P(wait > t) = C(c, a) exp(-t c (1 - rho) / (v S)),    a = arrivals S,    rho = a / c
The router places each prompt where least is waiting, which comes near to one common queue.
"""

import math
from dataclasses import dataclass

HIGHEST_UTILISATION = 0.98
"""Beyond it no count of requests tells an empty queue from an endless one."""


@dataclass(frozen=True)
class Queue:
    """A pool of engines that take prompts in order."""

    arrivals_per_s: float
    service_s: float
    """Of one prompt in one engine."""
    variability: float = 1.0

    @property
    def offered(self) -> float:
        """Engines that would always be busy."""
        return self.arrivals_per_s * self.service_s

    def utilisation(self, engines: int) -> float:
        """Share of time that an engine is busy; 1 and above: the queue grows for ever."""
        return self.offered / engines if engines > 0 else math.inf if self.offered > 0 else 0.0

    def wait_s(self, engines: int, quantile: float | None) -> float:
        """A quantile of the wait over all prompts, or its mean; infinite where the queue grows for ever."""
        if self.offered <= 0:
            return 0.0
        if self.utilisation(engines) >= HIGHEST_UTILISATION:
            return math.inf
        waiting = erlang_c(engines, self.offered)
        scale = self.variability * self.service_s / (engines - self.offered)
        if quantile is None:
            return waiting * scale
        return scale * math.log(waiting / (1 - quantile)) if waiting > 1 - quantile else 0.0

    def engines_for(self, wait_s: float, quantile: float | None, most: int) -> int:
        """The fewest engines whose wait is within the bound, at least 1 and at most `most`."""
        engines = min(most, max(1, math.ceil(self.offered / HIGHEST_UTILISATION)))
        while engines < most and self.wait_s(engines, quantile) > wait_s:
            engines += 1
        return engines


def erlang_c(engines: int, offered: float) -> float:
    """The chance that all of `engines` are busy, by Erlang B's recursion; 1 where the load doesn't fit."""
    if offered >= engines:
        return 1.0
    blocked = 1.0
    for busy in range(1, engines + 1):
        blocked = offered * blocked / (busy + offered * blocked)
    return blocked / (1 - offered / engines * (1 - blocked))
