# SPDX-License-Identifier: Apache-2.0
"""One request on its way through a simulated fleet."""

import math
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class SimRequest:
    """Times are seconds of the simulation; not a number until they are known."""

    number: int
    at_s: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    first_s: float = math.nan
    """When its first token came."""
    end_s: float = math.nan
    refused: bool = False
    """Whether no worker could ever hold it; then `end_s` is when it was refused."""

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV cache that it needs at its end."""
        return self.input_tokens + self.output_tokens

    @property
    def ttft_s(self) -> float:
        """Seconds to its first token."""
        return self.first_s - self.at_s

    @property
    def itl_s(self) -> float:
        """Mean seconds between its tokens; 0 for a single one."""
        return (self.end_s - self.first_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0
