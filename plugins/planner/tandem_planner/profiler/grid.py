# SPDX-License-Identifier: Apache-2.0
"""Which points are measured. Pure.

Prefill: prompt lengths evenly spaced in their logarithm. Decode: at each context length (prompt and half of the answer) from one request
to as many as the KV cache holds, evenly spaced, so that the surface has whole rows.
"""

import itertools
from dataclasses import dataclass

import msgspec
import numpy as np

from tandem_protocol.errors import ConfigError

LEAST_TOKENS = 16


class PrefillPoint(msgspec.Struct, frozen=True, tag="prefill"):
    """One prompt length."""

    isl: int


class DecodePoint(msgspec.Struct, frozen=True, tag="decode"):
    """So many requests at once, each with a prompt of `isl` and at least `osl` tokens of answer."""

    isl: int
    osl: int
    requests: int

    @property
    def context(self) -> float:
        """Tokens per request, mean over the answer."""
        return self.isl + self.osl / 2


@dataclass(frozen=True)
class GridPlan:
    """How much is measured."""

    max_context: int
    """Tokens of prompt and answer together; the model's longest, or less."""
    max_kv_tokens: int
    """That one engine's KV cache holds."""
    min_isl: int = 128
    prefill_points: int = 8
    contexts: int = 4
    loads: int = 5
    """Numbers of requests per context."""
    osl: int = 64
    """Tokens of answer in a decode point."""
    max_requests: int = 256
    """At once: the engine's max_num_seqs."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a grid that has no points."""
        if min(self.prefill_points, self.contexts, self.loads, self.max_requests) < 1 or self.osl < 2:
            raise ConfigError("a grid needs at least one prompt length, context and load, and answers of 2 tokens or more")
        if self.min_isl < LEAST_TOKENS or self.min_isl + 2 * self.osl > self.max_context:
            raise ConfigError(f"prompts from {self.min_isl} tokens and answers of {self.osl} don't fit a context of {self.max_context}: "
                              f"lower --min-isl (at least {LEAST_TOKENS}) or --osl, or raise --max-context")
        if self.max_kv_tokens < self.max_context:
            raise ConfigError(f"--max-kv-tokens {self.max_kv_tokens} is less than one context of {self.max_context}: lower --max-context")

    def prefill(self) -> list[PrefillPoint]:
        """Shortest first, so that what comes early is quick."""
        return [PrefillPoint(isl) for isl in _spaced(self.min_isl, self.max_context - 8, self.prefill_points)]

    def decode(self) -> list[DecodePoint]:
        """By context, few requests first."""
        return [DecodePoint(isl, self.osl, requests) for isl in self._contexts() for requests in self._loads(isl)]

    def rows(self) -> list[list[DecodePoint]]:
        """The points of `decode` as they are measured: the outermost contexts first, then those between, so that a profile that is cut
        short spans its range; in each as many requests as fit first, so that their prompts are cached for the others.
        """
        isls = self._contexts()
        ordered = [isls[at] for at in outermost_first(len(isls))]
        return [[DecodePoint(isl, self.osl, requests) for requests in reversed(self._loads(isl))] for isl in ordered]

    def _contexts(self) -> list[int]:
        return _spaced(self.min_isl, self.max_context - 2 * self.osl, self.contexts)

    def _loads(self, isl: int) -> list[int]:
        most = max(1, min(self.max_requests, int(self.max_kv_tokens * _FULL / (isl + 2 * self.osl))))
        return sorted({max(1, round(count)) for count in np.linspace(1, most, self.loads)})


_FULL = 0.95
"""Of the KV cache: beyond, requests are preempted and nothing is steady."""


def _spaced(low: int, high: int, count: int) -> list[int]:
    """Whole numbers from `low` to `high`, evenly spaced in their logarithm, each once."""
    return sorted({round(value) for value in np.geomspace(low, high, count)}) if count > 1 else [high]


def outermost_first(count: int) -> list[int]:
    """The places 0 to `count` - 1: the ends, then always the middle of the widest gap."""
    order = [0, count - 1][: min(count, 2)]
    while len(order) < count:
        known = sorted(order)
        low, high = max(itertools.pairwise(known), key=lambda gap: gap[1] - gap[0])
        order.append((low + high) // 2)
    return order
