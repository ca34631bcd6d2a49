# SPDX-License-Identifier: Apache-2.0
"""The pure parts of the router's benchmark on the token path: who was the bottleneck, medians over rounds, the headline."""

import json
import os

import pytest
from benchmarks.fleets import free_ports
from benchmarks.measures import Chunk, Figures, Trace, figures
from benchmarks.processes import bottleneck, cpu_seconds, spent
from benchmarks.router_proxy import Comparison, Report, Side


def level(tok_per_s: float = 100.0, ttft_ms: float = 10.0, req_per_s: float = 1.0) -> Figures:
    """Ten requests in ten seconds."""
    return Figures(10, 10.0, req_per_s, tok_per_s, ttft_ms, 2.0, 3.0, 4.0, 5.0, 2.0, 6.0, 0.1, 20.0)


def side(tok_per_s: float, ttft_ms: float, blame: str = "pace") -> Side:
    """One measured side whose router used one CPU second."""
    return Side(level(tok_per_s, ttft_ms), {"router": 1.0}, blame)


def comparison(pace: str, instances: int, *rounds: tuple[Side, Side]) -> Comparison:
    """At 32."""
    return Comparison(pace, instances, 32, rounds)


@pytest.mark.parametrize(
    ("cpu_s", "blamed"),
    [({"client": 0.5, "router": 9.0}, "router"), ({"client": 9.5, "router": 9.0}, "machine"), ({"client": 1.0, "router": 8.0}, "pace")],
)
def test_the_bottleneck_is_named(cpu_s: dict[str, float], blamed: str) -> None:
    """A process without core time left, all cores, or nobody."""
    assert bottleneck(cpu_s, {"client": 1, "router": 1}, wall_s=10.0, cores=2) == blamed


def test_a_group_is_busy_only_if_all_its_processes_are() -> None:
    """Two routers at 60 % each don't limit anything."""
    assert bottleneck({"router": 12.0}, {"router": 2}, wall_s=10.0, cores=8) == "pace"


def test_cpu_time_is_read_of_living_processes() -> None:
    """This one has used some, and more afterwards."""
    before = cpu_seconds({"us": (os.getpid(),)})
    sum(number * number for number in range(2_000_000))
    assert before["us"] > 0
    assert spent(before, cpu_seconds({"us": (os.getpid(),)}))["us"] > 0


def test_rounds_are_compared_pair_by_pair() -> None:
    """The median of the differences, not the difference of medians: noise that hits a pair hits both sides."""
    found = comparison("paced", 1, (side(100, 10), side(90, 12)), (side(50, 40), side(50, 41)), (side(80, 10), side(76, 19)))
    assert found.added_ttft_ms == 2
    assert found.throughput_vs_direct == pytest.approx(0.95)
    detail = found.to_json()
    assert detail["routed"]["cpu_ms_per_response"] == {"router": pytest.approx(1000 / (76 * 10 / 2), rel=1e-3)}
    assert json.loads(json.dumps(detail, allow_nan=False)) == detail


def test_the_proxy_headline_is_the_worst_paced_level_of_one_instance() -> None:
    """Floods and more instances are detail."""
    good, bad = (side(100, 10), side(99, 11)), (side(100, 10), side(80, 15))
    report = Report("2 cores", "command", [comparison("paced", 1, good), comparison("paced", 1, bad),
                                                comparison("flood", 1, (side(100, 1), side(1, 99))), comparison("paced", 2, good)])
    assert report.headline() == {"added_ttft_ms": 5.0, "throughput_vs_direct": 0.8}
    assert Report("2 cores", "command").headline() == {"added_ttft_ms": None, "throughput_vs_direct": None}
    assert "flood" in report.to_text()


def test_p99_and_responses_come_from_the_traces() -> None:
    """Of 100 requests with two chunks each."""
    traces = [Trace(0.0, (Chunk(i / 1000, 3), Chunk(1.0, 1)), 2.0) for i in range(1, 101)]
    found = figures(traces, [0.1])
    assert found.ttft_ms_p99 == pytest.approx(99.01)
    assert found.responses == pytest.approx(200)


def test_free_ports_differ() -> None:
    """Asked for together, held together."""
    assert len(set(free_ports(8))) == 8
