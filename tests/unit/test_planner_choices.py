# SPDX-License-Identifier: Apache-2.0
"""`tandem profile` over parallelism choices: what is recommended, what is left out, and what is not measured again, without an engine."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tandem_cli.main import main
from tandem_cli.profile import choices
from tandem_cli.profile.choices import measure_choices
from tandem_cli.profile.command import add_arguments
from tandem_cli.profile.recommending import (
    RECOMMENDATION,
    parallel_sizes,
    recommendation_for,
    recommendation_json,
    recommendation_lines,
    write_best,
)
from tandem_cli.profile.server import Measured
from tandem_cli.profile.started import Engine, Start, reason_in
from tandem_planner.profile_data import DecodePoints, PrefillPoints, Profile, read_profile, write_profile
from tandem_planner.profiler.choices import Recommendation, recommend
from tandem_planner.simulate.analytic import Roofline
from tandem_planner.sla_plan import Targets
from tandem_protocol.errors import ConfigError, EngineError

LOOSE, TIGHT = Targets(2.0, 0.05, 0.95), Targets(0.5, 0.006, 0.95)


def parallel(tp: int, efficiency: float = 0.8) -> Profile:
    """The roofline's engine over `tp` GPUs, of whose speed a share is lost to talking."""
    factor = tp * (1.0 if tp == 1 else efficiency)
    whole = replace(Roofline(), compute_per_s=Roofline.compute_per_s * factor, bandwidth_per_s=Roofline.bandwidth_per_s * factor).profile()
    assert whole.prefill is not None
    assert whole.decode is not None
    prefill = PrefillPoints(whole.prefill.isl, whole.prefill.ttft_ms, whole.prefill.thpt_per_gpu / tp)
    two = whole.decode
    return Profile(prefill, DecodePoints(two.kv_usage, two.context_length, two.itl_ms, two.thpt_per_gpu / tp, two.max_kv_tokens))


def recommended(targets: Targets, *sizes: int) -> Recommendation:
    return recommend({size: parallel(size) for size in sizes}, targets, isl=3000, osl=300)


def test_with_loose_targets_the_choice_that_loses_least_to_talking_is_best() -> None:
    found = recommended(LOOSE, 1, 2, 4)
    assert (found.prefill.tp, found.aggregated.tp) == (1, 1)
    assert found.prefill.met
    assert len(found.candidates) == 9


def test_a_target_that_one_gpu_misses_is_kept_by_more() -> None:
    found = recommended(TIGHT, 1, 2, 4)
    alone = next(one for one in found.candidates if one.role is found.decode.role and one.tp == 1)
    assert found.decode.met
    assert found.decode.requests_per_gpu_s >= max(
        (one.requests_per_gpu_s for one in found.candidates if one.role is found.decode.role and one.met), default=0)
    assert found.decode.latency_s <= alone.latency_s


def test_where_no_choice_keeps_the_target_the_quickest_is_taken() -> None:
    found = recommended(Targets(0.001, 0.0001, 0.95), 1, 2)
    assert (found.prefill.tp, found.decode.tp, found.prefill.met, found.decode.met) == (2, 2, False, False)


def test_disaggregating_is_advised_where_a_gpu_serves_more_by_it() -> None:
    for targets in (LOOSE, TIGHT, Targets(0.5, 0.010, 0.95)):
        found = recommended(targets, 1, 2)
        if found.prefill.met and found.decode.met and found.aggregated.met:
            assert found.disaggregate == (found.split_per_gpu_s > found.aggregated.requests_per_gpu_s)
        prefill, decode = found.workers
        needed = found.decode.requests_per_gpu_s * found.decode.tp / (found.prefill.requests_per_gpu_s * found.prefill.tp)
        assert prefill / decode == pytest.approx(needed, rel=0.2)


def test_nothing_is_recommended_from_nothing() -> None:
    with pytest.raises(ConfigError, match="nothing to recommend"):
        recommend({}, LOOSE, 3000, 300)


def test_sizes_are_powers_of_two_up_to_the_gpus_unless_asked_for() -> None:
    assert parallel_sizes((), 0) == (1,)
    assert parallel_sizes((), 6) == (1, 2, 4)
    assert parallel_sizes((4, 1, 4), 0) == (1, 4)


def test_the_launchers_reason_is_its_last_sentence() -> None:
    assert reason_in("starting vllm\ntandem: model vllm did not start: no memory\nmore\n") == "model vllm did not start: no memory"
    assert reason_in("nothing of ours") == ""


def options(out: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--out", str(out), "--max-context", "1024", "--max-kv-tokens", "100000", *more])
    args.passthrough = ["--max-model-len=1024"]
    return args


class Bench:
    """Stands in for engines: which were started, and which do not start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, broken: dict[int, str], *, cut_short: bool = False) -> None:
        self.started: list[int] = []
        self.ended: list[int] = []
        self._broken = broken
        monkeypatch.setattr(choices, "served", self._served)

        def measure(args: argparse.Namespace, out: Path, *_: object) -> Measured:
            write_profile(parallel(self.started[-1]), out)
            return Measured(read_profile(out), whole=not cut_short)

        monkeypatch.setattr(choices, "measure_server", measure)

    @contextlib.contextmanager
    def _served(self, start: Start, folder: Path) -> Iterator[Engine]:
        self.started.append(start.tensor_parallel)
        try:
            if start.tensor_parallel in self._broken:
                raise EngineError(self._broken[start.tensor_parallel])
            folder.mkdir(parents=True, exist_ok=True)
            yield Engine("localhost:1", "http://localhost:2")
        finally:
            self.ended.append(start.tensor_parallel)


def test_a_choice_that_does_not_start_is_left_out_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, {2: "one engine needs 2 GPUs"})
    found = measure_choices(options(tmp_path), (1, 2, 4))
    assert (sorted(found.profiles), found.failed, found.whole) == ([1, 4], {2: "one engine needs 2 GPUs"}, True)
    assert bench.ended == [1, 2, 4]


def test_a_whole_choice_is_not_started_again_unless_other_points_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Bench(monkeypatch, {4: "no"})
    measure_choices(options(tmp_path), (1, 4))
    again = Bench(monkeypatch, {})
    assert sorted(measure_choices(options(tmp_path), (1, 4)).profiles) == [1, 4]
    assert again.started == [4]
    other = Bench(monkeypatch, {})
    measure_choices(options(tmp_path, "--prefill-points", "3"), (1,))
    assert other.started == [1]


def test_a_cut_ends_the_choices_and_says_that_not_all_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, {}, cut_short=True)
    found = measure_choices(options(tmp_path), (1, 2))
    assert (bench.started, bench.ended, found.whole, sorted(found.profiles)) == ([1], [1], False, [1])


def test_time_that_is_used_up_starts_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, {})
    moments = iter([0.0, 0.0, 0.0, 0.0, 100.0])
    monkeypatch.setattr(choices.time, "monotonic", lambda: next(moments))
    found = measure_choices(options(tmp_path, "--limit-s", "50"), (1, 2))
    assert (bench.started, found.whole, list(found.failed)) == ([1], False, [2])


def test_the_best_of_both_phases_is_what_the_planner_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # its pictures take seconds, and are tested elsewhere
    profiles = {1: parallel(1), 2: parallel(2)}
    found = recommendation_for(options(tmp_path, "--ttft", "2000", "--itl", "6"), profiles)
    assert found is not None
    write_best(tmp_path, profiles, found)
    best = read_profile(tmp_path)
    assert best.prefill is not None
    assert best.decode is not None
    chosen = profiles[found.decode.tp].decode
    assert chosen is not None
    assert best.decode.itl_ms == pytest.approx(chosen.itl_ms)
    assert json.loads((tmp_path / RECOMMENDATION).read_text()) == recommendation_json(found)
    assert any("tandem serve" in line for line in recommendation_lines(tmp_path, found))


def test_options_for_engines_are_refused_where_none_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--max-kv-tokens", "1000", "--no-such-option"]) == 2
    assert "--no-such-option" in capsys.readouterr().err
