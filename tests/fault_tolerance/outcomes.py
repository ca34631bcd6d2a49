# SPDX-License-Identifier: Apache-2.0
"""From what clients saw to one row of the report. Pure."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

NOTICED_S = 1.0
"""A wait for a token that is shorter is nothing that a client would call a disturbance."""


@dataclass(frozen=True)
class Sample:
    """One request, as its client saw it; times on one monotonic clock, in seconds."""

    number: int
    began: float
    ended: float
    ttft_s: float
    longest_wait_s: float = 0.0
    longest_wait_ended: float = 0.0
    tries: int = 1
    error: str = ""
    """Empty: it ended whole."""
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Window:
    """When it happened, and when every part was back."""

    struck: float
    whole: float


@dataclass(frozen=True)
class Phase:
    """Requests of one time; latencies in seconds, 0 where there are none."""

    requests: int
    failed: int
    ttft_p50: float
    ttft_p99: float
    whole_p50: float
    whole_p99: float


@dataclass(frozen=True)
class Row:
    """One scenario's outcome."""

    scenario: str
    requests: int
    failed: int
    retried: int
    """Requests that their client had to send again."""
    recovery_s: float
    """From the fault until the last client waited unusually long or in vain; 0: nobody noticed."""
    whole_s: float
    """From the fault until every part was back."""
    before: Phase
    during: Phase
    after: Phase
    compared: int = 0
    """Answers in flight during the fault that were asked for again."""
    differing: int = 0
    """Those that were other tokens the second time."""
    refused: int = 0
    """Prompts too long that were refused as they should."""
    errors: tuple[str, ...] = ()
    """Of failed requests, the first few."""

    @property
    def success(self) -> float:
        """Share of requests that ended whole; 0 if there were none."""
        return 1 - self.failed / self.requests if self.requests else 0.0


def assess(scenario: str, samples: Sequence[Sample], window: Window) -> Row:
    """Before: ended before the fault. After: begun when all was over. During: the others."""
    before = [one for one in samples if one.ended < window.struck]
    usual = max((one.longest_wait_s for one in before), default=0.0)
    recovered = max((one.longest_wait_ended for one in samples if _disturbed(one, usual, window.struck)), default=window.struck)
    over = max(recovered, window.whole)
    after = [one for one in samples if one.began >= over]
    during = [one for one in samples if one.ended >= window.struck and one.began < over]
    return Row(
        scenario, len(samples), sum(bool(one.error) for one in samples), sum(one.tries > 1 for one in samples),
        recovered - window.struck, window.whole - window.struck, phase(before), phase(during), phase(after),
        errors=tuple(dict.fromkeys(one.error for one in samples if one.error))[:3],
    )


def _disturbed(one: Sample, usual_s: float, struck: float) -> bool:
    late = one.longest_wait_s > max(NOTICED_S, 2 * usual_s)
    return one.longest_wait_ended > struck and (bool(one.error) or one.tries > 1 or late)


def phase(samples: Sequence[Sample]) -> Phase:
    """Latencies are those of requests that ended whole."""
    good = [one for one in samples if not one.error]
    first, whole = [one.ttft_s for one in good], [one.ended - one.began for one in good]
    return Phase(len(samples), len(samples) - len(good), quantile(first, 0.5), quantile(first, 0.99), quantile(whole, 0.5),
                 quantile(whole, 0.99))


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the values; 0 for none."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1]
