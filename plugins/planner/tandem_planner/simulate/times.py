# SPDX-License-Identifier: Apache-2.0
"""How long a simulated worker takes: a profile's prefill curve and decode surface as tables that are quick to read.

A simulation asks about a million times, so that the profile's own interpolation is sampled once, on a grid that is even in KV
use and in the logarithm of the context.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tandem_planner.interpolation import DecodeSurface, PrefillCurve
from tandem_planner.profile_data import Profile
from tandem_protocol.errors import ConfigError

_KV_CELLS = 64
_CONTEXT_CELLS = 64


@dataclass(frozen=True)
class PrefillTimes:
    """Seconds until the first token of a prompt that is alone, linear between points and beyond the last one."""

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises ConfigError for a curve that no engine can have."""
        rising = all(a < b for a, b in zip(self.tokens, self.tokens[1:], strict=False))
        if not self.tokens or len(self.tokens) != len(self.seconds) or not rising or min(self.seconds) <= 0:
            raise ConfigError("the prefill curve needs prompt lengths that rise and times above 0: profile the engine again")

    @property
    def step_s(self) -> float:
        """What a prefill costs however short: the curve's beginning, continued to no tokens, within 0 and the first point."""
        if len(self.tokens) == 1:
            return 0.0
        slope = (self.seconds[1] - self.seconds[0]) / (self.tokens[1] - self.tokens[0])
        return min(self.seconds[0], max(0.0, self.seconds[0] - slope * self.tokens[0]))

    def of(self, tokens: int) -> float:
        """Seconds for a prompt of so many tokens."""
        if tokens <= self.tokens[0]:
            base = self.step_s
            return base + (self.seconds[0] - base) * tokens / self.tokens[0]
        if len(self.tokens) == 1:
            return self.seconds[0] * tokens / self.tokens[0]
        right = min(bisect_right(self.tokens, tokens), len(self.tokens) - 1)
        left = right - 1
        slope = (self.seconds[right] - self.seconds[left]) / (self.tokens[right] - self.tokens[left])
        return max(self.seconds[left], self.seconds[left] + max(0.0, slope) * (tokens - self.tokens[left]))


class DecodeTimes:
    """Seconds per decode step by KV use (0 to 1) and mean context (tokens), bilinear on a sampled grid, clamped to it."""

    def __init__(self, itl_s: Callable[[float, float], float], contexts: tuple[float, float]) -> None:
        """`itl_s(kv_use, context)` is asked at every point of the grid; contexts are the least and the greatest one of it."""
        low, high = contexts
        if not 0 < low <= high:
            raise ConfigError("the decode surface needs contexts above 0: profile the engine again")
        self._low, self._span = math.log(low), max(math.log(high / low), 1e-9)
        axis = [math.exp(self._low + self._span * column / _CONTEXT_CELLS) for column in range(_CONTEXT_CELLS + 1)]
        self._rows = [[itl_s(row / _KV_CELLS, context) for context in axis] for row in range(_KV_CELLS + 1)]
        if not all(0 < cell < math.inf for row in self._rows for cell in row):
            raise ConfigError("the decode surface has times that are 0, negative or not finite: profile the engine again")

    def of(self, kv_use: float, context: float) -> float:
        """Seconds of a step."""
        x = min(max(kv_use, 0.0), 1.0) * _KV_CELLS
        y = min(max((math.log(max(context, 1.0)) - self._low) / self._span, 0.0), 1.0) * _CONTEXT_CELLS
        row, column = min(int(x), _KV_CELLS - 1), min(int(y), _CONTEXT_CELLS - 1)
        x, y = x - row, y - column
        above, below = self._rows[row], self._rows[row + 1]
        return ((above[column] * (1 - y) + above[column + 1] * y) * (1 - x)
                + (below[column] * (1 - y) + below[column + 1] * y) * x)


@dataclass(frozen=True)
class EngineTimes:
    """One kind of worker."""

    prefill: PrefillTimes
    decode: DecodeTimes
    max_kv_tokens: int
    """Tokens that the KV cache of one worker holds."""


def prefill_times(points: Sequence[tuple[float, float]]) -> PrefillTimes:
    """From (prompt tokens, seconds) in any order. Raises ConfigError as PrefillTimes."""
    ordered = sorted(points)
    return PrefillTimes(tuple(round(tokens) for tokens, _ in ordered), tuple(seconds for _, seconds in ordered))


def engine_times(profile: Profile) -> EngineTimes:
    """Workers that behave as a profile says. Raises ConfigError unless both prefill and decode were profiled."""
    if profile.prefill is None or profile.decode is None:
        raise ConfigError("a simulation needs the profile of prefill and of decode: run `tandem profile` for what is missing")
    curve, surface = PrefillCurve(profile.prefill), DecodeSurface(profile.decode)
    isls = sorted({round(float(isl)) for isl in profile.prefill.isl})
    contexts = float(profile.decode.context_length.min()), float(profile.decode.context_length.max())
    return EngineTimes(prefill_times([(isl, curve.ttft_s(isl)) for isl in isls]), DecodeTimes(surface.itl_s, contexts),
                       int(profile.decode.max_kv_tokens))
