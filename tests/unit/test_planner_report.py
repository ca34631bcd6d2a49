# SPDX-License-Identifier: Apache-2.0
"""What a run was worth, by hand-made runs; the page about it; the policies that Tandem is compared with."""

import math
import re
from collections.abc import Sequence
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from tandem_planner import reference
from tandem_planner.charts import Line, chart, ticks
from tandem_planner.interpolation import DecodeSurface, PrefillCurve
from tandem_planner.simulate.analytic import Roofline
from tandem_planner.simulate.load import Load
from tandem_planner.simulate.policies import HpaPolicy, ReferencePolicy
from tandem_planner.simulate.report import Subject, page
from tandem_planner.simulate.requests import SimRequest
from tandem_planner.simulate.results import Targets, oscillations, scale_up_s, summarize, to_json
from tandem_planner.simulate.run import Run, Tick
from tandem_planner.terms import Latency, Observation, Pool, Traffic, WorkerLoad
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role

TARGETS = Targets(ttft_s=0.5, itl_s=0.05)


def request(at_s: float, ttft_s: float, itl_s: float, tokens: int = 11) -> SimRequest:
    return SimRequest(0, at_s, 100, tokens, first_s=at_s + ttft_s, end_s=at_s + ttft_s + itl_s * (tokens - 1))


def made(requests: Sequence[SimRequest], sizes: Sequence[int] = (1, 1), changes: tuple[float, ...] = ()) -> Run:
    """A run whose pool had these sizes at 10, 20, ... seconds."""
    at = np.array([item.at_s for item in requests])
    ones = np.ones(len(requests), dtype=np.int64)
    tick = [Tick(10.0 * (number + 1), {Role.DECODE: size}, {Role.DECODE: size}, 0, "") for number, size in enumerate(sizes)]
    return Run(Load("made", at, ones, ones, ones * 0, 120.0, changes), list(requests), tick, gpu_seconds=7200.0, end_s=120.0)


def test_goodput_counts_requests_that_meet_both_targets_per_gpu_hour() -> None:
    run = made([request(0, 0.1, 0.01), request(1, 0.6, 0.01), request(2, 0.1, 0.06), request(61, 0.5, 0.05)])
    summary = summarize("x", run, TARGETS)
    assert summary.good == 2
    assert summary.goodput_per_gpu_hour == pytest.approx(1.0)
    assert summary.goodput_per_s == pytest.approx(2 / 120)
    assert summary.request_attainment == pytest.approx(0.5)
    assert [interval.attained for interval in summary.intervals] == [False, True]
    assert summary.sla_attainment == pytest.approx(0.5)


def test_an_interval_is_judged_by_its_95th_percentile() -> None:
    """Of 100 requests five may be late, six not."""
    for late, attained in ((5, True), (6, False)):
        run = made([request(number / 10, 9.0 if number < late else 0.1, 0.01) for number in range(100)])
        assert summarize("x", run, TARGETS).intervals[0].attained is attained


def test_what_never_ended_misses_every_target_and_is_null_in_json() -> None:
    run = made([request(0, 0.1, 0.01), SimRequest(1, 1.0, 100, 10)])
    summary = summarize("x", run, TARGETS)
    assert (summary.good, summary.unfinished) == (1, 1)
    assert math.isinf(summary.ttft_s[1])
    assert to_json(summary)["ttft_s"][1] is None
    assert "never" in page("t", [], TARGETS, [Subject(summary, run)])


def test_intervals_without_requests_count_neither_way() -> None:
    summary = summarize("x", made([request(100, 0.1, 0.01)]), TARGETS)
    assert [interval.requests for interval in summary.intervals] == [0, 1]
    assert summary.sla_attainment == 1.0


@pytest.mark.parametrize(("sizes", "turns"), [((1, 2, 3, 3), 0), ((3, 2, 1), 0), ((1, 2, 1), 1), ((2, 1, 1, 2, 1), 2), ((1, 1), 0)])
def test_oscillations_are_changes_of_direction(sizes: Sequence[int], turns: int) -> None:
    assert oscillations(made([request(0, 0.1, 0.01)], sizes).ticks) == turns


def test_changes_while_the_fleet_finds_its_size_are_no_oscillations() -> None:
    ticks_made = made([request(0, 0.1, 0.01)], (1, 2, 1, 1, 1)).ticks
    assert oscillations(ticks_made, since_s=30) == 0


def test_scale_up_is_the_time_from_the_jump_until_enough_was_wanted() -> None:
    assert scale_up_s(made([request(0, 0.1, 0.01)], (2, 2, 4, 12, *[10] * 8), changes=(15.0,))) == pytest.approx(25.0)
    assert scale_up_s(made([request(0, 0.1, 0.01)], (2, 2, 4, 5, 6, 5, 5, 2, 2, 2), changes=(15.0, 70.0))) == pytest.approx(25.0)
    assert scale_up_s(made([request(0, 0.1, 0.01)], (2, 2, 2), changes=(15.0,))) is None
    assert scale_up_s(made([request(0, 0.1, 0.01)], (2, 2, 4))) is None


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    """Well-formed plots, no script, no address but the SVG namespace; words from outside are escaped."""
    run = made([request(number, 0.1, 0.01) for number in range(100)])
    text = page("<b>", ["profile <i>"], TARGETS, [Subject(summarize("p<1", run, TARGETS), run)])
    plots = re.findall(r"<svg.*?</svg>", text)
    assert len(plots) == 4
    assert all(ET.fromstring(plot).tag.endswith("svg") for plot in plots)
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "<b>" not in text.replace("<body>", "")
    assert "<script" not in text
    assert "p&lt;1" in text


def test_a_chart_leaves_gaps_and_stays_in_its_frame() -> None:
    text = chart("t", "x", "y", [Line("a", [0, 1, 2, 3], [1, math.nan, math.inf, 50]), Line("b", [0, 3], [2, 2], stairs=True)], y_top=10)
    path = re.findall(r'<path d="([^"]+)" fill="none" stroke="#1f77b4"', text)[0]
    assert path.count("M") == 2
    assert min(float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)) >= 28


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.037), (3, 1800), (5, 5)])
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert all(low <= mark <= high for mark in marks)
    assert 1 <= len(marks) <= 8


def pool(count: int, queued: float = 0.0, kv_use: float = 0.0) -> Pool:
    return Pool(count, count, tuple(WorkerLoad(str(number), queued, 0.0, kv_use) for number in range(count)))


def test_hpa_grows_at_once_and_shrinks_after_its_window() -> None:
    hpa = HpaPolicy(max_workers=8)
    assert hpa.decide(Observation(0, {Role.DECODE: pool(2, kv_use=0.9)})).target == {Role.DECODE: 3}
    assert hpa.decide(Observation(60, {Role.DECODE: pool(3, kv_use=0.1)})).target == {Role.DECODE: 3}
    assert hpa.decide(Observation(301, {Role.DECODE: pool(3, kv_use=0.1)})).target == {Role.DECODE: 1}


def test_hpa_stays_within_its_tolerance_and_its_bound() -> None:
    hpa = HpaPolicy(max_workers=4)
    assert hpa.decide(Observation(0, {Role.PREFILL: pool(2, queued=2.1)})).target == {Role.PREFILL: 2}
    assert hpa.decide(Observation(1, {Role.PREFILL: pool(2, queued=50)})).target == {Role.PREFILL: 4}


def test_the_reference_holds_between_intervals() -> None:
    """27,000 prompt tokens per second need as many engines as the profile says."""
    profile = Roofline().profile()
    assert profile.prefill is not None
    assert profile.decode is not None
    policy = ReferencePolicy(PrefillCurve(profile.prefill), DecodeSurface(profile.decode), reference.Engines(max_gpu_budget=-1), 15.0)
    quiet = Latency(0.1, 0.1, 0.1, 0.1)
    traffic = Traffic(60, 1200, 3000, 300, quiet, quiet, 1.0)
    decided = policy.decide(Observation(60, {}, traffic)).target
    assert decided[Role.PREFILL] == math.ceil(20 * 3000 / PrefillCurve(profile.prefill).throughput_per_gpu(3000))
    assert policy.decide(Observation(65, {})).target == decided


def test_targets_must_be_possible() -> None:
    with pytest.raises(ConfigError):
        Targets(0.0, 0.05)
