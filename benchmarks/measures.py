# SPDX-License-Identifier: Apache-2.0
"""From the arrival times of one run to its figures. Pure; times are seconds of CLOCK_MONOTONIC, one clock for all processes.

Several tokens may travel in one chunk (vLLM merges what a slow consumer left, Tandem paces responses under load), so the
inter-token latency (ITL) divides each gap between two chunks evenly over the tokens of the later chunk. What a reader of
the stream sees is the raw gap, which is reported beside it. Tokens of the first chunk belong to TTFT and to no gap.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Chunk:
    """One streamed piece: when it arrived and how many tokens it carried (at least one)."""

    time_s: float
    tokens: int


@dataclass(frozen=True)
class Trace:
    """One request: sent at `start_s`, its stream ended at `end_s`."""

    start_s: float
    chunks: tuple[Chunk, ...]
    end_s: float

    @property
    def ttft_s(self) -> float:
        """Time to the first chunk with a token."""
        return self.chunks[0].time_s - self.start_s

    @property
    def tokens(self) -> int:
        """Tokens received."""
        return sum(chunk.tokens for chunk in self.chunks)

    def gaps_s(self) -> list[float]:
        """Raw gaps between chunks."""
        return [later.time_s - earlier.time_s for earlier, later in zip(self.chunks, self.chunks[1:], strict=False)]

    def itls_s(self) -> list[float]:
        """One value per token after the first chunk."""
        shares = zip(self.gaps_s(), self.chunks[1:], strict=True)
        return [value for gap, chunk in shares for value in [gap / chunk.tokens] * chunk.tokens]


@dataclass(frozen=True)
class Figures:
    """One target at one concurrency; a percentile of nothing (an answer of one chunk has no gap) is NaN."""

    requests: int
    wall_s: float
    req_per_s: float
    output_tok_per_s: float
    ttft_ms_p50: float
    ttft_ms_p95: float
    itl_ms_p50: float
    itl_ms_p95: float
    chunk_gap_ms_p95: float
    tokens_per_chunk: float
    latency_ms_p50: float
    client_cpu: float
    """Share of one core that the busiest load process used; near 1 the load generator is what was measured."""
    ttft_ms_p99: float = math.nan

    @property
    def responses(self) -> float:
        """Chunks with tokens, over all requests."""
        return self.output_tok_per_s * self.wall_s / self.tokens_per_chunk

    def to_json(self) -> dict[str, float | None]:
        """Rounded to four significant digits; NaN, which JSON lacks, becomes null."""
        return {name: None if math.isnan(value) else _rounded(value) for name, value in asdict(self).items()}


def figures(traces: Sequence[Trace], client_cpu_s: Iterable[float]) -> Figures:
    """Merges the traces of all load processes; `client_cpu_s` is the CPU time of each."""
    wall = max(trace.end_s for trace in traces) - min(trace.start_s for trace in traces)
    tokens = sum(trace.tokens for trace in traces)
    ttfts = [trace.ttft_s for trace in traces]
    itls = [value for trace in traces for value in trace.itls_s()]
    return Figures(
        requests=len(traces),
        wall_s=wall,
        req_per_s=len(traces) / wall,
        output_tok_per_s=tokens / wall,
        ttft_ms_p50=1000 * percentile(ttfts, 50),
        ttft_ms_p95=1000 * percentile(ttfts, 95),
        itl_ms_p50=1000 * percentile(itls, 50),
        itl_ms_p95=1000 * percentile(itls, 95),
        chunk_gap_ms_p95=1000 * percentile([gap for trace in traces for gap in trace.gaps_s()], 95),
        tokens_per_chunk=tokens / sum(len(trace.chunks) for trace in traces),
        latency_ms_p50=1000 * percentile([trace.end_s - trace.start_s for trace in traces], 50),
        client_cpu=max(client_cpu_s, default=0.0) / wall,
        ttft_ms_p99=1000 * percentile(ttfts, 99),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks, as NumPy's default; NaN for no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low, high = math.floor(rank), math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.4g}")
