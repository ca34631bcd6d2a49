# SPDX-License-Identifier: Apache-2.0
"""The benchmark's report: ratios, JSON, table."""

import json

import pytest
from benchmarks.hardware import Hardware
from benchmarks.measures import Figures
from benchmarks.report import Report, ratios


def level(req_per_s: float = 1.0, ttft_ms_p50: float = 1.0) -> Figures:
    """A level of which only these two matter."""
    return Figures(8, 1.0, req_per_s, 64.0, ttft_ms_p50, 2.0, 3.0, 4.0, 5.0, 1.0, 6.0, 0.1)


@pytest.fixture
def report() -> Report:
    """An empty report."""
    return Report("2 cores", "python -m benchmarks.serving", "/m", {"block_size": 32}, {"vllm": "0.32.0"}, {"inproc": "1 engine"})


def test_ratios_compare_throughput_and_ttft() -> None:
    """Throughput at 32, time to first token at 1; against the right baseline each."""
    results = {
        "inproc": {1: level(ttft_ms_p50=10.0), 32: level(req_per_s=100.0), 128: level(req_per_s=200.0)},
        "triton": {1: level(ttft_ms_p50=12.0), 32: level(req_per_s=95.0), 128: level(req_per_s=180.0)},
        "disagg": {1: level(ttft_ms_p50=24.0), 32: level(req_per_s=114.0)},
    }
    found = ratios(results)
    assert found["triton_vs_inproc_c32"] == pytest.approx(0.95)
    assert found["triton_vs_inproc_c128"] == pytest.approx(0.9)
    assert found["ttft_vs_inproc_c1"] == pytest.approx(1.2)
    assert found["disagg_vs_agg_c32"] == pytest.approx(1.2)
    assert found["disagg_ttft_vs_agg_c1"] == pytest.approx(2.0)


def test_a_ratio_without_both_sides_is_none() -> None:
    """A target that failed or wasn't asked for makes no ratio."""
    assert set(ratios({"triton": {32: level()}}).values()) == {None}


def test_the_report_is_one_json_object(report: Report) -> None:
    """With results by target and concurrency, and the failures beside them."""
    report.add("inproc", 1, level(req_per_s=2.0))
    report.failures["disagg"] = "the server ended"
    decoded = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert decoded["results"]["inproc"]["1"]["req_per_s"] == 2.0
    assert decoded["failures"] == {"disagg": "the server ended"}
    assert decoded["triton_vs_inproc_c32"] is None


def test_the_table_says_what_failed(report: Report) -> None:
    """A table without the target would read as if nobody had asked for it."""
    report.add("inproc", 1, level())
    report.failures["disagg"] = "the server ended"
    text = report.to_text()
    assert "FAILED disagg: the server ended" in text
    assert "inproc" in text


def test_the_placement_says_when_targets_differ_in_resources() -> None:
    """Two engines on two cores are not one engine on two cores."""
    laptop = Hardware("a CPU", (0, 1), ())
    assert laptop.placement("inproc").startswith("1 engine on 2 cores")
    assert laptop.placement("disagg").startswith("2 engines on 1 core each")
    assert Hardware("a CPU", (0,), ("GPU", "GPU")).placement("disagg") == "prefill on GPU 0, decode on GPU 1"
