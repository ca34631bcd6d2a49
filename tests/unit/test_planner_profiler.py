# SPDX-License-Identifier: Apache-2.0
"""The profiler's points, windows, journal, files and advice, without a server."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import numpy.typing as npt
import pytest
from benchmarks.planner import MEASURED

from tandem_cli.profile.server import label
from tandem_planner.profile_data import Profile, read_profile, write_profile
from tandem_planner.profiler.advice import advise
from tandem_planner.profiler.grid import DecodePoint, GridPlan, PrefillPoint, outermost_first
from tandem_planner.profiler.journal import NAME, Journal, Subject
from tandem_planner.profiler.measuring import (
    DecodeResult,
    PrefillResult,
    Prompts,
    TokenTimes,
    measure_decode,
    measure_prefill,
    steady,
)
from tandem_planner.profiler.plots import write_plots
from tandem_planner.profiler.run import Measuring, measure, profile_of
from tandem_planner.simulate.analytic import Roofline
from tandem_planner.sla_plan import Targets
from tandem_protocol.errors import ConfigError, EngineError

PLAN = GridPlan(max_context=4096, max_kv_tokens=20_000, prefill_points=4, contexts=2, loads=3, osl=16)
SUBJECT = Subject("localhost:8001", "vllm", 1, 3, 1)


class FakeStreams:
    """A server whose times are known: TTFT is 1 ms per 100 tokens, a step 10 ms; later requests of a batch begin later. Counts calls."""

    def __init__(self, stagger_s: float = 0.0, breaks_at: int = 0) -> None:
        self.calls: list[tuple[int, int]] = []
        self.prompts: set[bytes] = set()
        self._stagger_s, self._breaks_at = stagger_s, breaks_at

    async def token_times(self, prompt: npt.NDArray[np.int32], tokens: int) -> TokenTimes:
        self.calls.append((len(prompt), tokens))
        self.prompts.add(prompt.tobytes())
        if len(self.calls) == self._breaks_at:
            raise ConnectionError
        first = len(prompt) / 100e3 + self._stagger_s * len(self.calls)
        return [(first + 0.01 * number, number + 1) for number in range(tokens)]


def prompts() -> Prompts:
    return Prompts(1000, np.random.default_rng(1))


def batch(isl: int, count: int) -> list[npt.NDArray[np.int32]]:
    drawn = prompts()
    return [drawn.draw(isl) for _ in range(count)]


def say_nothing(text: str) -> None:
    assert text


def test_the_grid_spans_its_range_and_fits_the_cache() -> None:
    isls = [point.isl for point in PLAN.prefill()]
    assert (isls[0], isls[-1], len(isls)) == (128, 4088, 4)
    assert isls == sorted(set(isls))
    decode = PLAN.decode()
    assert {point.isl for point in decode} == {128, 4064}
    assert min(point.requests for point in decode) == 1
    assert all(point.requests * (point.isl + 2 * point.osl) <= 20_000 for point in decode)
    assert max(point.requests for point in decode) == 118


def test_a_grid_of_one_point_each_is_the_longest() -> None:
    plan = replace(PLAN, prefill_points=1, contexts=1, loads=1)
    assert [point.isl for point in plan.prefill()] == [4088]
    assert [(point.isl, point.requests) for point in plan.decode()] == [(4064, 1)]


@pytest.mark.parametrize("wrong", [{"max_context": 100}, {"max_kv_tokens": 4095}, {"loads": 0}, {"osl": 1}, {"min_isl": 2}])
def test_a_grid_without_points_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        replace(PLAN, **wrong)


async def test_prefill_is_the_median_of_prompts_that_nobody_has_seen() -> None:
    streams = FakeStreams()
    result = await measure_prefill(PrefillPoint(1000), streams, prompts(), repeats=3)
    assert result.ttft_s == pytest.approx(0.01)
    assert streams.calls == [(1000, 1)] * 4
    assert len(streams.prompts) == 4


async def test_decode_warms_its_prompts_and_measures_them_together() -> None:
    streams = FakeStreams()
    result = await measure_decode(DecodePoint(1000, 16, 4), streams, batch(1000, 4))
    assert result.itl_s == pytest.approx(0.01, rel=0.02)
    assert result.tokens_per_s == pytest.approx(400, rel=0.02)
    assert result.context == pytest.approx(1008, abs=2)
    assert streams.calls == [(1000, 1)] * 4 + [(1000, 16)] * 4
    assert len(streams.prompts) == 4


async def test_answers_are_made_longer_until_all_generate_together() -> None:
    """The second request begins 12 of 16 tokens after the first."""
    streams = FakeStreams(stagger_s=0.12)
    result = await measure_decode(DecodePoint(100, 16, 2), streams, batch(100, 2))
    assert [tokens for _, tokens in streams.calls[2:]] == [16, 16, 32, 32]
    assert result.itl_s == pytest.approx(0.01, rel=0.02)


async def test_requests_that_never_generate_together_are_an_error() -> None:
    with pytest.raises(EngineError, match="prefix caching"):
        await measure_decode(DecodePoint(100, 16, 3), FakeStreams(stagger_s=10), batch(100, 3))


def test_the_window_is_what_all_streams_share() -> None:
    """The second stream begins later and ends later; responses carry two tokens each."""
    first: TokenTimes = [(1.0, 1), (1.2, 3), (1.4, 5), (1.6, 7)]
    second: TokenTimes = [(1.2, 1), (1.6, 3), (2.0, 5)]
    window = steady([first, second], 100)
    assert window is not None
    assert window.tokens == pytest.approx(3.0)
    assert window.result.itl_s == pytest.approx((0.4 / 4 + 0.4 / 2) / 2)
    assert window.result.tokens_per_s == pytest.approx(6 / 0.4)
    assert steady([first, [(1.7, 1), (1.9, 2)]], 100) is None


async def test_a_profile_that_was_cut_short_goes_on_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        await measure(PLAN, Journal(tmp_path, SUBJECT), FakeStreams(breaks_at=9), Measuring(prompts(), 1), say_nothing)
    again = FakeStreams()
    journal = Journal(tmp_path, SUBJECT)
    assert len(journal.prefill) == 4
    await measure(PLAN, journal, again, Measuring(prompts(), 1), say_nothing)
    assert all(tokens != 1 or isl in (128, 4064) for isl, tokens in again.calls)
    done = FakeStreams()
    await measure(PLAN, Journal(tmp_path, SUBJECT), done, Measuring(prompts(), 1), say_nothing)
    assert done.calls == []


def test_a_journal_that_ends_in_the_middle_of_a_line_loses_that_line_only(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SUBJECT)
    journal.add_prefill(PrefillPoint(10), PrefillResult(0.5))
    with (tmp_path / NAME).open("ab") as file:
        file.write(b'{"type": "pref')
    again = Journal(tmp_path, SUBJECT)
    assert again.prefill == {PrefillPoint(10): PrefillResult(0.5)}
    again.add_decode(DecodePoint(10, 2, 1), DecodeResult(0.1, 10.0, 11.0))
    assert Journal(tmp_path, SUBJECT).decode == again.decode


def test_a_journal_of_something_else_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path, SUBJECT)
    with pytest.raises(ConfigError, match="--out"):
        Journal(tmp_path, Subject("localhost:9001", "vllm", 1, 3, 1))
    (tmp_path / NAME).write_text("nonsense\n")
    with pytest.raises(ConfigError, match="delete it"):
        Journal(tmp_path, SUBJECT)


async def test_the_points_of_a_context_share_their_prompts_and_the_outermost_contexts_come_first(tmp_path: Path) -> None:
    plan = replace(PLAN, contexts=3, loads=3)
    streams, journal = FakeStreams(), Journal(tmp_path, SUBJECT)
    await measure(plan, journal, streams, Measuring(prompts(), 1, prefill=False), say_nothing)
    isls = sorted({point.isl for point in plan.decode()})
    assert [row[0].isl for row in plan.rows()] == [isls[0], isls[2], isls[1]]
    assert list(journal.decode) == [point for row in plan.rows() for point in row]
    assert set(journal.decode) == set(plan.decode())
    assert len(streams.prompts) == sum(row[0].requests for row in plan.rows())


def test_the_ends_come_first_and_then_the_widest_gaps() -> None:
    assert [outermost_first(count) for count in (1, 2, 3, 5)] == [[0], [0, 1], [0, 2, 1], [0, 4, 2, 1, 3]]
    assert sorted(outermost_first(17)) == list(range(17))


async def test_a_point_that_never_gets_steady_is_left_out_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    journal = Journal(tmp_path, SUBJECT)
    await measure(PLAN, journal, FakeStreams(stagger_s=10), Measuring(prompts(), 1, prefill=False), said.append)
    assert all(point.requests == 1 for point in journal.decode)
    assert sum("left out" in text for text in said) == len(PLAN.decode()) - len(journal.decode)


async def test_the_files_are_what_the_planner_reads(tmp_path: Path) -> None:
    """On two GPUs: latencies as measured, throughput halved."""
    journal = Journal(tmp_path, SUBJECT)
    await measure(PLAN, journal, FakeStreams(), Measuring(prompts(), 1), say_nothing)
    write_profile(profile_of(PLAN, journal, gpus=2), tmp_path)
    found = read_profile(tmp_path)
    assert found.prefill is not None
    assert found.decode is not None
    assert found.prefill.ttft_ms == pytest.approx(found.prefill.isl / 100, rel=0.01)
    assert found.prefill.thpt_per_gpu == pytest.approx(50_000, rel=0.01)
    assert found.decode.itl_ms == pytest.approx(10, rel=0.05)
    assert found.decode.kv_usage.max() <= 1
    assert set(found.decode.context_length) == {136.0, 4072.0}


def test_plots_are_svg_and_with_matplotlib_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = write_plots(Roofline().profile(), tmp_path, say_nothing)
    assert [file.name for file in files[4:]] == [file.with_suffix(".png").name for file in files[:4]]
    assert all(ET.fromstring(file.read_text()).tag.endswith("svg") for file in files[:4])
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[4:])


def test_without_matplotlib_there_are_svg_plots_and_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said: list[str] = []
    assert {file.suffix for file in write_plots(Roofline().profile(), tmp_path, said.append)} == {".svg"}
    assert "matplotlib" in said[0]


def test_the_profile_in_the_repository_is_what_its_journal_says(tmp_path: Path) -> None:
    """Of the H200; from a copy, since a journal is opened to be continued."""
    shutil.copy(MEASURED / NAME, tmp_path)
    journal = Journal(tmp_path, Subject("localhost:18301", "vllm", 1, 3, 1))
    plan = GridPlan(16_000, 923_400, prefill_points=10, contexts=5, loads=5, osl=48)
    made, kept = profile_of(plan, journal, 1), read_profile(MEASURED)
    assert made.prefill is not None
    assert kept.prefill is not None
    assert made.decode is not None
    assert kept.decode is not None
    assert kept.prefill.ttft_ms == pytest.approx(made.prefill.ttft_ms)
    assert kept.decode.itl_ms == pytest.approx(made.decode.itl_ms)
    assert kept.decode.kv_usage == pytest.approx(made.decode.kv_usage)
    assert (kept.prefill.isl.size, kept.decode.itl_ms.size) == (10, 21)


def advice_for(ttft_s: float, itl_s: float, isl: float, osl: float) -> tuple[bool, float]:
    found = advise(Roofline().profile(), Targets(ttft_s, itl_s, 0.95), isl, osl)
    assert {term.name for term in found.terms} >= {"prefill_workers", "decode_workers", "aggregated_workers", "gpus_saved"}
    saved = next(term.value for term in found.terms if term.name == "gpus_saved")
    assert found.disaggregate == (saved > 0)
    return found.disaggregate, found.prefill / found.decode


def test_advice_disaggregates_for_tight_itl_and_not_for_loose_targets() -> None:
    assert advice_for(0.5, 0.010, 3000, 150)[0]
    assert not advice_for(5.0, 0.5, 3000, 150)[0]


def test_longer_prompts_need_more_prefill_and_longer_answers_more_decode() -> None:
    ratios = [advice_for(0.5, 0.015, isl, osl)[1] for isl, osl in ((3000, 1000), (3000, 150), (6000, 150))]
    assert ratios == sorted(ratios)
    assert ratios[0] < ratios[-1]


def test_advice_needs_a_whole_profile() -> None:
    with pytest.raises(ConfigError, match="measure both"):
        advise(Profile(prefill=Roofline().profile().prefill), Targets(0.5, 0.05), 3000, 150)


def test_the_cache_is_read_from_vllms_metric() -> None:
    line = 'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1234"} 1.0'
    assert (label(line, "block_size"), label(line, "num_gpu_blocks")) == (16, 1234)
    with pytest.raises(ValueError, match="no label"):
        label(line, "blocks")


def test_prompts_are_the_same_for_the_same_seed() -> None:
    def drawn() -> Sequence[int]:
        return [int(token) for token in prompts().draw(50)]

    assert drawn() == drawn()
    assert min(drawn()) >= 100
