# SPDX-License-Identifier: Apache-2.0
"""What the worker knows of its engine's load."""

from dataclasses import dataclass

import pytest

from tandem_worker.load import EngineLoad


@dataclass
class Stats:
    """vLLM's SchedulerStats."""

    num_running_reqs: int = 3
    num_waiting_reqs: int = 4
    kv_cache_usage: float = 0.5


def load_at(*times: float) -> EngineLoad:
    """A load whose clock shows these times, one per step."""
    return EngineLoad(now=iter(times).__next__)


def test_counts_are_the_latest() -> None:
    """Read off the scheduler's statistics."""
    load = EngineLoad()
    load.record(Stats(), 0)
    load.record(None, 0)
    assert (load.running, load.waiting, load.kv_usage) == (3, 4, 0.5)


def test_the_first_interval_is_taken_as_it_is() -> None:
    """There is nothing to smooth with yet."""
    load = load_at(100.0, 100.02)
    load.record(None, 1)
    assert load.step_s == 0
    load.record(None, 1)
    assert load.step_s == pytest.approx(0.02)


def test_later_intervals_are_smoothed() -> None:
    """A tenth of the news each time."""
    load = load_at(100.0, 100.02, 100.06)
    for _ in range(3):
        load.record(None, 1)
    assert load.step_s == pytest.approx(0.9 * 0.02 + 0.1 * 0.04)


def test_an_idle_gap_is_no_step() -> None:
    """Time without requests says nothing about the engine's speed."""
    load = load_at(100.0, 100.02, 160.0, 160.02)
    for _ in range(4):
        load.record(None, 1)
    assert load.step_s == pytest.approx(0.02)


def test_steps_without_tokens_are_not_timed() -> None:
    """They are no decode steps; the clock isn't even read."""
    load = load_at()
    load.record(Stats(), 0)
    assert load.step_s == 0
