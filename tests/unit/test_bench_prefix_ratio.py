# SPDX-License-Identifier: Apache-2.0
"""The prefix-ratio benchmark: its prompts, its headline and its plot."""

from collections import Counter
from pathlib import Path

import pytest
from benchmarks.measures import Chunk, Trace, figures
from benchmarks.prefix_ratio import Phase, Report, parse, plot, workload


def phase(ttft_s: float, cached: float) -> Phase:
    """One request that took twice its TTFT."""
    return Phase(figures([Trace(0, (Chunk(ttft_s, 1), Chunk(2 * ttft_s, 1)), 2 * ttft_s)], [0.1]), 1000, cached)


def beginnings(prompts: tuple[str, ...], words: int) -> list[str]:
    """The first words of each prompt."""
    return [" ".join(prompt.split()[:words]) for prompt in prompts]


def test_prompts_share_the_asked_part_and_nothing_else() -> None:
    """Twelve prompts of 40 words, half of each shared by three: four beginnings, twelve rests."""
    prompts = workload("1/0.5", "kv", 0.5, 12, 4, 40)
    assert {len(prompt.split()) for prompt in prompts} == {40}
    assert sorted(Counter(beginnings(prompts, 20)).values()) == [3, 3, 3, 3]
    assert len({prompt.split()[20] for prompt in prompts}) == 12


def test_modes_get_the_same_order_of_other_words() -> None:
    """No cache serves both, and neither has the luckier order."""
    kv, other = (beginnings(workload("1/0.5", mode, 0.5, 12, 4, 40), 20) for mode in ("kv", "round-robin"))
    assert not set(kv) & set(other)
    assert [kv.index(one) for one in kv] == [other.index(one) for one in other]


def test_the_headline_compares_the_highest_ratio_that_both_modes_have() -> None:
    """Below 1 in TTFT and above 1 in the others is a gain."""
    report = Report("hardware", "command", "model")
    assert report.headline()["ttft_p50_vs_round_robin"] is None
    report.phases = {0.5: {"kv": phase(1.0, 500), "round-robin": phase(2.0, 250)}, 0.9: {"kv": phase(1.0, 500)}}
    assert report.headline() == {"ttft_p50_vs_round_robin": 0.5, "throughput_vs_round_robin": 2.0, "cached_tokens_vs_round_robin": 2.0}
    assert report.to_json()["ratios"]["0.5"]["kv"]["cached_share"] == 0.5
    assert "round-robin" in report.to_text()


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    """Also of a run that broke off."""
    pytest.importorskip("matplotlib", reason="comes with requirements/bench.txt")
    phases = {0.5: {"kv": phase(1.0, 500), "round-robin": phase(2.0, 250)}, 0.9: {"kv": phase(1, 0)}}
    report = Report("hardware", "command", "model", phases)
    assert plot(report, tmp_path / "figures").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", [["--ratios", "1"], ["--workers", "0"], ["--workers", "11"]])
def test_arguments_that_make_no_sense_are_refused(wrong: list[str], tmp_path: Path) -> None:
    """Before anything starts."""
    with pytest.raises(SystemExit):
        parse([*wrong, "--log-dir", str(tmp_path)])
