# SPDX-License-Identifier: Apache-2.0
"""How many tokens share a response."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_worker.pacing import MAX_INTERVAL, stream_interval

ACTIVE = st.integers(1, 10_000)
STEP = st.floats(1e-4, 1.0)
RATE = st.floats(1, 1e6)


@pytest.mark.parametrize(
    ("active", "step_s", "rate", "interval"),
    [(1, 0.01, 1500, 1), (15, 0.01, 1500, 1), (16, 0.01, 1500, 2), (64, 0.01, 1500, 5), (10_000, 0.01, 1500, MAX_INTERVAL),
     (64, 0.0, 1, 1)],
)
def test_the_budget_is_kept_by_sharing(active: int, step_s: float, rate: float, interval: int) -> None:
    """Tokens per second over responses per second, rounded up; without a measured step every token travels alone."""
    assert stream_interval(active, step_s, rate) == interval


@given(ACTIVE, STEP, RATE)
def test_the_interval_has_bounds(active: int, step_s: float, rate: float) -> None:
    """Never below one token, never in visible jumps."""
    assert 1 <= stream_interval(active, step_s, rate) <= MAX_INTERVAL


@given(ACTIVE, ACTIVE, STEP, RATE)
def test_more_streams_never_mean_smaller_responses(one: int, other: int, step_s: float, rate: float) -> None:
    """Monotone in the number of streams."""
    assert stream_interval(min(one, other), step_s, rate) <= stream_interval(max(one, other), step_s, rate)


@given(ACTIVE, STEP, RATE, RATE)
def test_a_larger_budget_never_means_larger_responses(active: int, step_s: float, one: float, other: float) -> None:
    """Monotone in the budget."""
    assert stream_interval(active, step_s, max(one, other)) <= stream_interval(active, step_s, min(one, other))
