# SPDX-License-Identifier: Apache-2.0
"""What is asked of a simulated fleet: arrivals with lengths, made from a rate over time (seeded) or from a trace."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tandem_protocol.errors import ConfigError

Rate = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
"""Requests per second at times, in seconds from the beginning; both [n]."""

_MAX_REQUESTS = 5_000_000
_FORMS = ("constant:RATE:DURATION", "sine:LOW-HIGH:PERIOD:DURATION", "step:LOW-HIGH:AT:DURATION", "burst:LOW-HIGH:AT+LENGTH:DURATION")


@dataclass(frozen=True)
class Load:
    """Requests in order of arrival; arrays of equal length."""

    name: str
    at_s: npt.NDArray[np.float64]
    input_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]
    cached_tokens: npt.NDArray[np.int64]
    """Of the prompt, that need no prefill; below `input_tokens`."""
    duration_s: float
    changes_s: tuple[float, ...] = ()
    """When the rate jumps, up first, where the load has such moments."""

    def __post_init__(self) -> None:
        """Raises ConfigError for arrays that are no load."""
        sizes = {len(self.at_s), len(self.input_tokens), len(self.output_tokens), len(self.cached_tokens)}
        if len(sizes) != 1 or not len(self.at_s):
            raise ConfigError(f"load {self.name} has no requests: give a longer duration or a higher rate")
        if bool((np.diff(self.at_s) < 0).any()) or int(self.output_tokens.min()) < 1 or int(self.input_tokens.min()) < 1:
            raise ConfigError(f"load {self.name}: arrivals must be in order, and lengths at least 1")

    def __len__(self) -> int:
        return len(self.at_s)


@dataclass(frozen=True)
class Lengths:
    """Tokens per request: log-normal around means, exact for sigma 0."""

    input_tokens: float = 3000
    output_tokens: float = 300
    sigma: float = 0.0

    def draw(self, rng: np.random.Generator, count: int, mean: float) -> npt.NDArray[np.int64]:
        """INT64 [count], at least 1 each."""
        factors = np.exp(rng.normal(-0.5 * self.sigma**2, self.sigma, count)) if self.sigma else np.ones(count)
        drawn: npt.NDArray[np.int64] = np.maximum(1, np.rint(mean * factors)).astype(np.int64)
        return drawn


@dataclass(frozen=True)
class Shape:
    """A rate over time."""

    name: str
    rate: Rate
    peak: float
    duration_s: float
    changes_s: tuple[float, ...] = ()


def constant(rate: float, duration_s: float) -> Shape:
    """The same rate all the time."""
    return Shape("constant", lambda at: np.full(len(at), rate), rate, duration_s)


def sine(low: float, high: float, period_s: float, duration_s: float) -> Shape:
    """From `low` to `high` and back in each period, beginning at `low`."""
    return Shape("sine", lambda at: low + (high - low) * (1 - np.cos(2 * np.pi * at / period_s)) / 2, high, duration_s)


def step(low: float, high: float, at_s: float, duration_s: float) -> Shape:
    """`low` until `at_s`, `high` from then on."""
    return Shape("step", lambda at: np.where(at < at_s, low, high), max(low, high), duration_s, (at_s,))


def burst(low: float, high: float, at_s: float, length_s: float, duration_s: float) -> Shape:
    """`low`, but `high` for `length_s` from `at_s` on."""
    return Shape("burst", lambda at: np.where((at >= at_s) & (at < at_s + length_s), high, low), max(low, high), duration_s,
                 (at_s, at_s + length_s))


def arrivals(shape: Shape, lengths: Lengths, seed: int) -> Load:
    """A Poisson process of this rate, by thinning; the same for the same arguments."""
    if not 0 < shape.peak * shape.duration_s <= _MAX_REQUESTS:
        raise ConfigError(f"load {shape.name}: rate times duration must be above 0 and at most {_MAX_REQUESTS}")
    rng = np.random.default_rng(seed)
    draws = int(shape.peak * shape.duration_s + 8 * math.sqrt(shape.peak * shape.duration_s) + 16)
    candidates = np.cumsum(rng.exponential(1 / shape.peak, draws))
    candidates = candidates[candidates < shape.duration_s]
    at = candidates[rng.random(len(candidates)) * shape.peak < shape.rate(candidates)]
    count = len(at)
    return Load(shape.name, at, lengths.draw(rng, count, lengths.input_tokens), lengths.draw(rng, count, lengths.output_tokens),
                np.zeros(count, dtype=np.int64), shape.duration_s, shape.changes_s)


def parse_shape(text: str) -> Shape:
    """`constant:RATE:DURATION`, `sine:LOW-HIGH:PERIOD:DURATION` and so on; rates in requests/s, times in seconds.

    Raises ConfigError with the forms that there are.
    """
    kind, *parts = text.split(":")
    try:
        match kind, parts:
            case "constant", [rate, duration]:
                return _checked(constant(float(rate), float(duration)))
            case "sine", [rates, period, duration]:
                return _checked(sine(*_pair(rates), _positive(period), float(duration)))
            case "step", [rates, at, duration]:
                return _checked(step(*_pair(rates), float(at), float(duration)))
            case "burst", [rates, when, duration]:
                return _checked(burst(*_pair(rates), *_pair(when, "+"), float(duration)))
    except ValueError as exc:
        raise ConfigError(f"--load {text!r}: {exc}") from exc
    raise ConfigError(f"--load {text!r} is none of {', '.join(_FORMS)}")


def _checked(shape: Shape) -> Shape:
    if not (math.isfinite(shape.duration_s) and shape.duration_s > 0 and math.isfinite(shape.peak) and shape.peak > 0):
        raise ValueError("rates and durations must be above 0")
    return shape


def _positive(text: str) -> float:
    if not (value := float(text)) > 0:
        raise ValueError("times must be above 0")
    return value


def _pair(text: str, separator: str = "-") -> tuple[float, float]:
    first, found, second = text.partition(separator)
    if not found or min(float(first), float(second)) < 0:
        raise ValueError(f"{text!r} should be two numbers of at least 0 with {separator!r} between them")
    return float(first), float(second)
