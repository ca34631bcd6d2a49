# SPDX-License-Identifier: Apache-2.0
"""Every scenario of the table on local processes: clients' requests end whole, the fleet comes back, and the answers are the same."""

import itertools
from typing import Any

import pytest

from etcds import BINARY as ETCD
from fault_tolerance.network import possible as networks_possible
from fault_tolerance.outcomes import Row
from fault_tolerance.play import play
from fault_tolerance.scenarios import SCENARIOS, Engine, How, Scenario
from prometheuses import BINARY as PROMETHEUS

_APART = 1000
"""Requests of different scenarios have different prompts."""


def _case(number: int, scenario: Scenario) -> Any:
    plan = scenario.plan
    marks: list[Any] = [pytest.mark.slow, pytest.mark.timeout(900)] if scenario.slow else []
    if plan.etcd and ETCD is None:
        marks.append(pytest.mark.skip(reason="etcd is not installed"))
    if plan.planner and PROMETHEUS is None:
        marks.append(pytest.mark.skip(reason="there is no Prometheus"))
    if plan.engine is Engine.REAL and plan.links and not networks_possible():
        marks.append(pytest.mark.skip(reason="network namespaces need root, ip and iptables"))
    return pytest.param(number, scenario, id=scenario.name.replace(" ", "-").replace("'", ""), marks=marks)


@pytest.mark.parametrize(("number", "scenario"), list(itertools.starmap(_case, enumerate(SCENARIOS, start=1))))
async def test_scenario(number: int, scenario: Scenario, fleets: Any, report: list[Row]) -> None:
    """What the scenario expects holds."""
    fleet = fleets.of(scenario.plan)
    row = await play(scenario, fleet, number * _APART)
    report.append(row)
    assert row.requests >= scenario.load.requests
    assert row.success >= scenario.expect.success, f"{row}\n{fleet.log()}"
    assert row.recovery_s <= scenario.expect.recovery_s, f"{row}\n{fleet.log()}"
    assert row.differing == 0, f"{row.differing} of {row.compared} answers in flight were other tokens when asked for again"
    assert (row.refused > 0) is (scenario.fault.how is How.FLOOD)
