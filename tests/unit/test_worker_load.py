# SPDX-License-Identifier: Apache-2.0
"""What the worker knows of its engine's load."""

from dataclasses import dataclass

import pytest

from tandem_protocol.errors import RequestError
from tandem_worker.load import EngineLoad, EngineLoads


@dataclass
class Stats:
    """vLLM's SchedulerStats."""

    num_running_reqs: int = 3
    num_waiting_reqs: int = 4
    kv_cache_usage: float = 0.5
    spec_decoding_stats: object = None


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


def loads(**in_engine: int) -> EngineLoads:
    """Ranks named r0, r1, ... with so many requests each."""
    made = EngineLoads()
    for name, requests in in_engine.items():
        made.of(int(name[1:])).in_engine = requests
    return made


@pytest.mark.parametrize(
    ("in_engine", "wanted", "chosen"),
    [({}, None, (0, 0)), ({"r0": 5}, None, (0, 0)), ({"r0": 2, "r1": 1}, None, (1, 1)), ({"r0": 1, "r1": 1}, None, (0, 0)),
     ({"r0": 0, "r1": 9}, 1, (1, 1)), ({"r2": 3, "r3": 1}, None, (3, 1)), ({"r2": 3, "r3": 4}, 3, (3, 1)), ({"r2": 3}, 2, (2, 0))],
)
def test_the_rank_of_a_request(in_engine: dict[str, int], wanted: int | None, chosen: tuple[int, int]) -> None:
    """The named one, else the least loaded; with its place among the ranks of this host, which may begin above 0."""
    assert loads(**in_engine).choose(wanted) == chosen


@pytest.mark.parametrize("wanted", [0, 1, 4, 99])
def test_a_rank_of_another_host_is_refused(wanted: int) -> None:
    """With those that are here."""
    with pytest.raises(RequestError, match=f"data_parallel_rank {wanted} is not served by this worker: its ranks are 2 to 3"):
        loads(r2=0, r3=0).choose(wanted)


def test_a_queue_before_a_full_cache_weighs() -> None:
    """It shrinks slowly; before an empty cache it is gone with the next step."""
    ranks = loads(r0=3, r1=4)
    ranks.of(0).record(Stats(num_waiting_reqs=2, kv_cache_usage=1.0), 0)
    assert ranks.choose(None) == (1, 1)
    ranks.of(0).record(Stats(num_waiting_reqs=2, kv_cache_usage=0.5), 0)
    assert ranks.choose(None) == (0, 0)


def test_figures_of_all_ranks() -> None:
    """Requests add up, shares of equal caches are averaged, the slowest step counts."""
    ranks = loads(r0=1, r1=1)
    ranks.of(0).record(Stats(kv_cache_usage=0.2), 0)
    ranks.of(1).record(Stats(num_running_reqs=1, num_waiting_reqs=0, kv_cache_usage=0.6), 0)
    ranks.of(1).step_s = 0.25
    assert (ranks.running, ranks.waiting, ranks.kv_usage, ranks.step_s) == (4, 4, pytest.approx(0.4), 0.25)


def test_figures_before_the_engine_is_there() -> None:
    """None, and no error."""
    assert (EngineLoads().running, EngineLoads().kv_usage, EngineLoads().step_s) == (0, 0.0, 0.0)
