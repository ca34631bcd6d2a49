# SPDX-License-Identifier: Apache-2.0
"""When a worker is too busy to be given more.

Each data-parallel rank is judged by itself: a worker all of whose ranks are busy gets nothing, one with a free rank gets
requests on that rank.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tandem_protocol.errors import ConfigError
from tandem_router.config import RouterSettings
from tandem_router.cost import Loads


@dataclass(frozen=True)
class BusyThresholds:
    """A rank is busy beyond any one of these; None for no limit. ConfigError for a limit that makes no sense."""

    active_decode_blocks: float | None = None
    """Share of the rank's KV blocks, 0 to 1."""
    active_prefill_tokens: int | None = None
    active_prefill_tokens_frac: float | None = None
    """Of the rank's max_num_batched_tokens; above 1 counts whole steps."""

    def __post_init__(self) -> None:
        if self.active_decode_blocks is not None and not 0 <= self.active_decode_blocks <= 1:
            raise ConfigError(f"active_decode_blocks is a share of the KV blocks: set it from 0 to 1, not {self.active_decode_blocks}")
        for name in ("active_prefill_tokens", "active_prefill_tokens_frac"):
            limit = getattr(self, name)
            if limit is not None and not 0 <= limit < float("inf"):
                raise ConfigError(f"{name} must be a number from 0 on, not {limit}: unset it for no limit")

    @classmethod
    def of(cls, settings: RouterSettings) -> "BusyThresholds":
        """The thresholds that the settings name."""
        return cls(settings.active_decode_blocks_threshold, settings.active_prefill_tokens_threshold,
                   settings.active_prefill_tokens_threshold_frac)

    @property
    def any_set(self) -> bool:
        """Whether anything can be busy at all."""
        return self != BusyThresholds()

    def __str__(self) -> str:
        """The limits that are set, for messages."""
        limits = {"active_decode_blocks": self.active_decode_blocks, "active_prefill_tokens": self.active_prefill_tokens,
                  "active_prefill_tokens_frac": self.active_prefill_tokens_frac}
        return ", ".join(f"{name} > {limit:g}" for name, limit in limits.items() if limit is not None)


@dataclass(frozen=True)
class Capacities:
    """What each of n candidates has room for; every array has shape (n,)."""

    total_blocks: NDArray[np.int64]
    """KV blocks on the device."""
    max_num_batched_tokens: NDArray[np.int64]

    def at(self, positions: NDArray[np.int64]) -> "Capacities":
        """Of some of them, in this order."""
        return Capacities(self.total_blocks[positions], self.max_num_batched_tokens[positions])


def busy(thresholds: BusyThresholds, loads: Loads, capacities: Capacities) -> NDArray[np.bool_]:
    """Which of n candidates are beyond a threshold, shape (n,)."""
    found = np.zeros(loads.requests.shape, np.bool_)
    if thresholds.active_decode_blocks is not None:
        found |= loads.blocks > thresholds.active_decode_blocks * capacities.total_blocks
    if thresholds.active_prefill_tokens is not None:
        found |= loads.prefill_tokens > thresholds.active_prefill_tokens
    if thresholds.active_prefill_tokens_frac is not None:
        found |= loads.prefill_tokens > thresholds.active_prefill_tokens_frac * capacities.max_num_batched_tokens
    return found
