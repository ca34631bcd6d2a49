# SPDX-License-Identifier: Apache-2.0
"""The benchmark's figures: percentiles, inter-token latency over chunks, throughput."""

import json
import math

import pytest
from benchmarks.measures import Chunk, Trace, figures, percentile


def trace(*chunks: tuple[float, int], start_s: float = 0.0, end_s: float | None = None) -> Trace:
    """A trace from (time, tokens) pairs, ended with its last chunk unless said otherwise."""
    return Trace(start_s, tuple(Chunk(time_s, tokens) for time_s, tokens in chunks), chunks[-1][0] if end_s is None else end_s)


def test_a_percentile_between_two_ranks_is_interpolated() -> None:
    """The median of four values lies in the middle of the two inner ones, whatever their order."""
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == pytest.approx(2.5)
    assert percentile([0.0, 10.0], 95) == pytest.approx(9.5)


def test_the_extreme_percentiles_are_the_extremes() -> None:
    """0 and 100 don't run out of the list."""
    assert percentile([3.0, 1.0, 2.0], 0) == 1.0
    assert percentile([3.0, 1.0, 2.0], 100) == 3.0
    assert percentile([7.0], 95) == 7.0


def test_a_percentile_of_nothing_is_not_a_number() -> None:
    """Zero would look like a very good latency."""
    assert math.isnan(percentile([], 50))


def test_a_gap_is_shared_by_the_tokens_of_the_later_chunk() -> None:
    """0.4 s before a chunk of four tokens are four latencies of 0.1 s."""
    one = trace((1.0, 1), (1.4, 4), (1.5, 1))
    assert one.itls_s() == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1])
    assert one.gaps_s() == pytest.approx([0.4, 0.1])


def test_the_first_chunk_counts_for_ttft_only() -> None:
    """However many tokens it carries, it makes no inter-token latency."""
    one = trace((2.5, 3), start_s=2.0)
    assert one.ttft_s == pytest.approx(0.5)
    assert one.itls_s() == []
    assert one.tokens == 3


def test_throughput_spans_from_the_first_start_to_the_last_end() -> None:
    """Traces of several processes are merged on one clock."""
    early = trace((1.0, 1), (2.0, 1), start_s=0.0)
    late = trace((3.0, 2), start_s=2.5, end_s=4.0)
    result = figures([late, early], [0.4, 1.0])
    assert result.wall_s == pytest.approx(4.0)
    assert result.req_per_s == pytest.approx(0.5)
    assert result.output_tok_per_s == pytest.approx(1.0)
    assert result.tokens_per_chunk == pytest.approx(4 / 3)
    assert result.client_cpu == pytest.approx(0.25)
    assert result.ttft_ms_p50 == pytest.approx(750)


def test_a_missing_figure_is_null_in_json() -> None:
    """NaN is not JSON."""
    encoded = json.dumps(figures([trace((1.0, 1))], []).to_json(), allow_nan=False)
    assert json.loads(encoded)["itl_ms_p50"] is None
