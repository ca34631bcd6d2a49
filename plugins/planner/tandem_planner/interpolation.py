# SPDX-License-Identifier: Apache-2.0
"""Between the points of a profile: what an engine does at a prompt length, or at a KV use and context.

Where physics is monotone (a longer prompt takes no less time, a fuller engine steps no faster), measuring noise is first taken out by
isotonic regression. Then PCHIP, not a plain cubic: a cubic spline overshoots between points that rise steeply, below zero even, and one
dip in ITL makes "the highest load that meets the target" jump. PCHIP stays between its neighbours, and keeps the order.
Outside of the measured range figures are held, not extrapolated. Everything is tabulated once: a lookup is two `np.interp`.
"""

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression, nnls

from tandem_planner.profile_data import DecodePoints, Floats, PrefillPoints

_STEPS = 256
_FIT_ROWS = 17


class PrefillCurve:
    """Time to compute a prompt alone in one engine, and the rate at which prompts are computed."""

    def __init__(self, points: PrefillPoints) -> None:
        isl, ttft = _merged(points.isl, points.ttft_ms / 1e3)
        _, rate = _merged(points.isl, points.thpt_per_gpu)
        self.min_isl, self.max_isl = float(isl[0]), float(isl[-1])
        self._isl = np.union1d(isl, np.linspace(isl[0], isl[-1], _STEPS + 1))
        self._ttft = _pchip(isl, _rising(ttft), self._isl)
        self._rate = _pchip(isl, rate, self._isl)

    def ttft_s(self, isl: float) -> float:
        """Seconds to the first token of a prompt of so many tokens, with nothing before it."""
        return float(np.interp(isl, self._isl, self._ttft))

    def throughput_per_gpu(self, isl: float) -> float:
        """Prompt tokens per second and GPU."""
        return float(np.interp(isl, self._isl, self._rate))

    def longest_within(self, ttft_s: float) -> float | None:
        """The longest prompt within a time; None if even the shortest measured one takes longer."""
        within = np.flatnonzero(self._ttft <= ttft_s)
        return float(self._isl[within[-1]]) if within.size else None


@dataclass(frozen=True)
class BestDecode:
    """The most that a decode engine gives at a context length within an ITL."""

    throughput_per_gpu: float
    """Generated tokens per second and GPU."""
    itl_s: float
    kv_use: float
    met: bool
    """Whether the ITL is kept; if not, the figures are those of the lightest load that was measured."""


class DecodeSurface:
    """ITL and throughput of one decode engine over KV use (0 to 1) and context length (tokens)."""

    def __init__(self, points: DecodePoints) -> None:
        rows = _rows(points)
        if min(row.use.size for row in rows) < 2:
            rows = _fitted_rows(points)
        self.max_kv_tokens = points.max_kv_tokens
        self._contexts = np.array([row.context for row in rows])
        self._least = np.array([row.use[0] for row in rows])
        self._most = np.array([row.use[-1] for row in rows])
        self._shares = np.linspace(0.0, 1.0, _STEPS + 1)
        scales = [row.use[0] + self._shares * (row.use[-1] - row.use[0]) for row in rows]
        self._itl = np.stack([_pchip(row.use, _rising(row.itl_s), scale) for row, scale in zip(rows, scales, strict=True)])
        self._rate = np.stack([_pchip(row.use, row.rate, scale) for row, scale in zip(rows, scales, strict=True)])

    def itl_s(self, kv_use: float, context: float) -> float:
        """Seconds between two tokens of one request."""
        low, high, share = self._between(context)
        below, above = (float(np.interp(kv_use, self._use(row), self._itl[row])) for row in (low, high))
        return (1 - share) * below + share * above

    def throughput_per_gpu(self, kv_use: float, context: float) -> float:
        """Generated tokens per second and GPU; below the lightest load measured it falls in proportion."""
        low, high, share = self._between(context)
        least = (1 - share) * self._least[low] + share * self._least[high]
        idle = min(1.0, kv_use / least) if least > 0 else 1.0
        below, above = (float(np.interp(kv_use, self._use(row), self._rate[row])) for row in (low, high))
        return float(idle * ((1 - share) * below + share * above))

    def least_itl_s(self, context: float) -> float:
        """The ITL of the lightest load that was measured."""
        low, high, share = self._between(context)
        return float((1 - share) * self._itl[low][0] + share * self._itl[high][0])

    def kv_use(self, requests: float, context: float) -> float:
        """Of an engine with so many requests of a context length; above 1 if they don't fit."""
        return requests * context / self.max_kv_tokens

    def best_throughput_per_gpu(self, itl_s: float, context: float, max_kv_use: float = 1.0) -> BestDecode:
        """The highest throughput at a KV use whose ITL is within the target, and which is at most `max_kv_use`."""
        low, high, share = self._between(context)
        use = (1 - share) * self._use(low) + share * self._use(high)
        itl = (1 - share) * self._itl[low] + share * self._itl[high]
        rate = (1 - share) * self._rate[low] + share * self._rate[high]
        within = np.flatnonzero((itl <= itl_s) & (use <= max_kv_use))
        at = within[np.argmax(rate[within])] if within.size else 0
        return BestDecode(float(rate[at]), float(itl[at]), float(use[at]), met=bool(itl[at] <= itl_s))

    def _between(self, context: float) -> tuple[int, int, float]:
        """The rows on both sides, and how far one is from the lower."""
        place = float(np.interp(context, self._contexts, np.arange(self._contexts.size)))
        low = int(place)
        return low, min(low + 1, self._contexts.size - 1), place - low

    def _use(self, row: int) -> Floats:
        return np.asarray(self._least[row] + self._shares * (self._most[row] - self._least[row]), np.float64)


@dataclass(frozen=True)
class _Row:
    """One context length; arrays of shape (k,), in the order of `use`."""

    context: float
    use: Floats
    itl_s: Floats
    rate: Floats


def _rows(points: DecodePoints) -> list[_Row]:
    """The profilers measure several loads per context length: those are rows."""
    rows = []
    for context in np.unique(points.context_length):
        at = points.context_length == context
        use, itl = _merged(points.kv_usage[at], points.itl_ms[at] / 1e3)
        rows.append(_Row(float(context), use, itl, _merged(points.kv_usage[at], points.thpt_per_gpu[at])[1]))
    return rows


def _fitted_rows(points: DecodePoints) -> list[_Row]:
    """From points that make no rows: ITL = weights + per KV token read + per request in the batch, none of them negative.

    Throughput is requests / ITL, times the factor that the measured figures have to it on the median (1 / GPUs, with their noise).
    """
    use, context, itl = points.kv_usage, points.context_length, points.itl_ms / 1e3
    columns = np.stack([np.ones_like(use), use, use / context * context.mean()], axis=1)[:, : max(1, use.size)]
    weights = np.zeros(3)
    weights[: columns.shape[1]] = nnls(columns, itl)[0]
    factor = float(np.median(points.thpt_per_gpu * itl / np.maximum(use, 1e-6) * context))
    rows = []
    for at in np.linspace(context.min(), context.max(), _FIT_ROWS if np.ptp(context) else 1):
        loads = np.linspace(max(1e-3, float(use.min()) / 2), max(float(use.max()), 1e-2), 33)
        fit = np.maximum(weights[0] + weights[1] * loads + weights[2] * loads / at * context.mean(), float(itl.min()) / 4)
        rows.append(_Row(float(at), loads, fit, factor * loads / at / fit))
    return rows


def _merged(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Sorted by x, points at the same x averaged."""
    keys, place = np.unique(x, return_inverse=True)
    return keys, np.asarray(np.bincount(place, weights=y) / np.bincount(place), np.float64)


def _rising(y: Floats) -> Floats:
    return np.asarray(isotonic_regression(y).x, np.float64)


def _pchip(x: Floats, y: Floats, at: Floats) -> Floats:
    return np.full(at.shape, y[0]) if x.size == 1 else np.asarray(PchipInterpolator(x, y)(np.clip(at, x[0], x[-1])), np.float64)
