# SPDX-License-Identifier: Apache-2.0
"""What one mock engine is like."""

from dataclasses import dataclass

from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role


@dataclass(frozen=True)
class EngineSettings:
    """One engine. Defaults as vLLM's; the cache is that of an 8B model on an H200 (800,000 tokens), made up as the timing is."""

    role: Role = Role.AGGREGATED
    block_size: int = 16
    """Tokens per KV block."""
    total_blocks: int = 50_000
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 131_072
    watermark: float = 0.0
    """Share of the blocks that stay free when a waiting request is admitted beside others; vLLM's default."""
    vocabulary: int = 32_000
    kv_bytes_per_token: int = 131_072
    transfer_bytes_per_s: float = 20e9
    """Of a decode worker's KV pulls, one after another."""
    transfer_latency_s: float = 5e-3
    speculation: str = ""
    """How it says that it speculates; only what discovery shows of it is played."""
    handoff_lease_s: float = 30.0
    """A prefill worker frees blocks that no decode worker took within this time, as vLLM's NIXL connector."""

    def __post_init__(self) -> None:
        """Raises ConfigError for an engine that could never run a step."""
        sizes = (self.block_size, self.total_blocks, self.max_num_seqs, self.max_num_batched_tokens, self.max_model_len, self.vocabulary)
        if min(sizes) < 1:
            raise ConfigError("mock engine: block size, blocks, sequences, batched tokens, model length and vocabulary must be at least 1")
        if not 0 <= self.watermark < 1 or self.transfer_bytes_per_s <= 0 or self.transfer_latency_s < 0:
            raise ConfigError("mock engine: the watermark is a share below 1, transfers need bandwidth above 0 and latency of 0 or more")
