# SPDX-License-Identifier: Apache-2.0
"""How the fault-tolerance suite reads what its clients saw, and what it reports."""

import json
from pathlib import Path

import pytest

from fault_tolerance.outcomes import Row, Sample, Window, assess, quantile
from fault_tolerance.report import HEAD, save, table
from fault_tolerance.scenarios import SCENARIOS, Engine, Expectation, How

WINDOW = Window(struck=100.0, whole=110.0)


def sample(number: int, began: float, ended: float, *, wait_s: float = 0.1, wait_ended: float = 0.0, tries: int = 1,
           error: str = "") -> Sample:
    """A request whose longest wait ended with it, unless said otherwise."""
    return Sample(number, began, ended, 0.1, wait_s, wait_ended or ended, tries, error)


def row(*samples: Sample) -> Row:
    """Of a scenario."""
    return assess("something happens", samples, WINDOW)


def test_requests_belong_to_the_time_before_during_or_after() -> None:
    """One that was in flight when it happened counts as during, one that begins when all is over as after."""
    found = row(sample(0, 98.0, 99.0), sample(1, 99.5, 100.5), sample(2, 105.0, 106.0), sample(3, 109.9, 111.0), sample(4, 110.0, 111.0))
    assert (found.before.requests, found.during.requests, found.after.requests) == (1, 3, 1)
    assert (found.requests, found.failed, found.success) == (5, 0, 1.0)


def test_nobody_noticed_where_waits_are_as_before() -> None:
    """Neither a wait that is usual here nor one below a second counts."""
    found = row(sample(0, 90.0, 99.0, wait_s=2.0), sample(1, 100.0, 104.0, wait_s=3.9))
    assert found.recovery_s == 0.0
    assert row(sample(0, 98.0, 99.0), sample(1, 100.0, 101.0, wait_s=0.9)).recovery_s == 0.0


def test_recovery_ends_with_the_last_unusual_wait() -> None:
    """Also when every part was back before that."""
    struck = sample(1, 99.0, 130.0, wait_s=5.0, wait_ended=115.0)
    found = row(sample(0, 98.0, 99.0), struck, sample(2, 111.0, 112.0), sample(3, 116.0, 117.0))
    assert found.recovery_s == 15.0
    assert (found.during.requests, found.after.requests) == (2, 1)


@pytest.mark.parametrize("disturbed", [sample(1, 100.5, 101.5, error="gone"), sample(1, 100.5, 101.5, tries=2)])
def test_failures_and_second_tries_are_disturbances(disturbed: Sample) -> None:
    """However short they were."""
    found = row(sample(0, 98.0, 99.0), disturbed)
    assert found.recovery_s == 1.5
    assert (found.failed, found.retried) == (int(bool(disturbed.error)), int(disturbed.tries > 1))


def test_latencies_are_those_of_good_requests() -> None:
    """And errors are named, each once."""
    found = row(sample(0, 100.0, 101.0), sample(1, 100.0, 109.0, error="gone"), sample(2, 100.0, 109.0, error="gone"))
    assert found.during.whole_p99 == pytest.approx(1.0)
    assert found.errors == ("gone",)
    assert found.success == pytest.approx(1 / 3)


def test_quantiles_lie_between_the_values() -> None:
    """None of nothing, the value of one."""
    assert [quantile([], 0.5), quantile([3.0], 0.99), quantile([1.0, 2.0, 3.0], 0.5)] == [0.0, 3.0, 2.0]
    assert quantile([float(i) for i in range(101)], 0.99) == pytest.approx(99.0)


def test_the_table_has_a_line_per_scenario_and_the_file_is_completed(tmp_path: Path) -> None:
    """A scenario that is run again replaces its row; others stay."""
    first, other = row(sample(0, 98.0, 99.0)), assess("another", [sample(0, 98.0, 99.0, error="gone")], WINDOW)
    lines = table([first, other])
    assert len(lines) == 3
    assert all(word in lines[0] for word in HEAD)
    assert "100.00%" in lines[1]
    save([first, other], tmp_path / "report")
    save([assess("another", [sample(0, 98.0, 99.0)], WINDOW)], tmp_path / "report")
    kept = json.loads((tmp_path / "report").read_text())
    assert [(one["scenario"], one["success"]) for one in kept] == [("something happens", 1.0), ("another", 1.0)]


def test_scenarios_are_named_once_and_promise_what_they_should() -> None:
    """With migration at least 99 % of requests end whole, all of them in an upgrade; only mocks without a server run every time."""
    assert len({one.name for one in SCENARIOS}) == len(SCENARIOS)
    for one in SCENARIOS:
        assert one.expect.success >= 0.99 or one.plan.migration_limit == 0
        assert one.fault.how is not How.ROLL or one.expect.success == 1.0
        assert one.slow or one.plan.engine is Engine.LIGHT
        assert one.plan.engine is Engine.REAL or one.load.requests >= 200
    assert Expectation().success == 0.99
