# SPDX-License-Identifier: Apache-2.0
"""Generated traces have the published statistics, and replays of them measure what they say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks import route_trace
from benchmarks.errors import BenchmarkError
from benchmarks.routing import MODES, Replay, at_rate, load_of
from benchmarks.traces import MAX_INPUT, SHAPES, TraceRequest, generate, ideal_hits, read, statistics, sticky_hits, tokens_of, write

from tandem_worker.mock.settings import EngineSettings
from tandem_worker.mock.timing import StepTiming

ENGINE = EngineSettings(block_size=64, total_blocks=12_500)
PUBLISHED = [("conversation", 12_031, 3537, 12_035, 343, 0.366), ("synthetic", 3_993, 1022, 15_325, 149, 0.640)]


@pytest.mark.parametrize(("shape", "requests", "seconds", "mean_input", "mean_output", "repeated"), PUBLISHED)
def test_a_generated_trace_has_the_published_statistics(
    shape: str, requests: int, seconds: float, mean_input: float, mean_output: float, repeated: float
) -> None:
    seeds = [statistics(generate(SHAPES[shape], requests, requests / seconds, seed)) for seed in range(3)]
    assert all(has.requests == requests and has.max_input <= MAX_INPUT for has in seeds)
    assert np.mean([has.duration_s for has in seeds]) == pytest.approx(seconds, rel=0.15)
    assert np.mean([has.mean_input for has in seeds]) == pytest.approx(mean_input, rel=0.08)
    assert np.mean([has.mean_output for has in seeds]) == pytest.approx(mean_output, rel=0.03)
    assert np.mean([has.repeated_blocks for has in seeds]) == pytest.approx(repeated, abs=0.03)


def test_the_same_seed_gives_the_same_trace_in_order_of_time_and_another_seed_another() -> None:
    first, again, other = (generate(SHAPES["synthetic"], 200, 5.0, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert [item.timestamp for item in first] == sorted(item.timestamp for item in first)
    assert all(len(item.hash_ids) == -(-item.input_length // 512) and item.output_length >= 1 for item in first)


def test_equal_ids_are_equal_tokens_and_other_ids_are_not() -> None:
    short, long = TraceRequest(0, 700, 1, [3, 9]), TraceRequest(0, 1024, 1, [3, 9])
    assert tokens_of(short).dtype == np.int32
    assert (tokens_of(short) == tokens_of(long)[:700]).all()
    assert (tokens_of(TraceRequest(0, 512, 1, [4])) != tokens_of(long)[:512]).mean() > 0.99


def test_the_ideal_is_the_longest_known_prefix_without_the_last_token() -> None:
    trace = [TraceRequest(0, 1024, 1, [1, 2]), TraceRequest(1, 1024, 1, [1, 2]), TraceRequest(2, 1500, 1, [1, 3, 2])]
    assert ideal_hits(trace) == [0, 1023, 512]


def test_a_file_is_read_back_in_part_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    trace, file = generate(SHAPES["synthetic"], 30, 5.0, 1), tmp_path / "trace.jsonl"
    write(file, trace)
    assert read(file) == trace
    assert read(file, 7) == trace[:7]
    file.write_text('{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}\n')
    with pytest.raises(BenchmarkError, match="one per 512"):
        read(file)
    file.write_text('{"timestamp": 0}\n')
    with pytest.raises(BenchmarkError, match="hash_ids"):
        read(file)


def test_conversations_that_stay_share_only_what_their_worker_has() -> None:
    """Four begin with one block, two on each of two workers, and one of them comes back to where it was."""
    first = [TraceRequest(float(own), 1024, 1, [0, own]) for own in (1, 2, 3, 4)]
    trace = [*first, TraceRequest(9.0, 1536, 1, [0, 1, 5])]
    assert ideal_hits(trace) == [0, 512, 512, 512, 1024]
    assert sticky_hits(trace, 2) == [0, 0, 512, 512, 1024]
    assert sticky_hits(trace, 1) == ideal_hits(trace)


def test_one_engine_with_a_boundless_cache_reaches_the_ideal_exactly() -> None:
    trace = generate(SHAPES["synthetic"], 60, 1.0, 3)
    outcome = Replay(MODES["kv"], 1, replace(ENGINE, total_blocks=100_000), StepTiming(speedup=1000)).run(trace)
    assert outcome.hit == pytest.approx(statistics(trace).ideal_hit, rel=1e-3)
    assert outcome.load_spread == 1.0


def test_every_mode_completes_and_only_modes_that_look_at_prefixes_gain_from_them() -> None:
    trace = generate(SHAPES["synthetic"], 80, 2.0, 1)
    outcomes = {mode: Replay(settings, 4, ENGINE, StepTiming()).run(trace) for mode, settings in MODES.items()}
    blind = max(outcomes[mode].hit for mode in ("round-robin", "random", "power-of-two", "least-loaded"))
    assert outcomes["kv"].hit > 1.3 * blind
    assert outcomes["approximate"].hit > 1.3 * blind
    assert outcomes["kv"].ttft_p50_s < min(outcomes["round-robin"].ttft_p50_s, outcomes["random"].ttft_p50_s)


def test_a_replay_is_the_same_but_for_the_time_that_decisions_took() -> None:
    trace = generate(SHAPES["synthetic"], 40, 2.0, 1)
    first, again = (Replay(MODES["random"], 3, ENGINE, StepTiming(), seed=5).run(trace) for _ in range(2))
    for figure in ("hit", "ttft_p50_s", "ttft_p99_s", "load_spread", "busy", "drain_s"):
        assert getattr(first, figure) == getattr(again, figure)


def test_a_trace_is_played_faster_for_more_load() -> None:
    trace = generate(SHAPES["synthetic"], 100, 2.0, 1)
    before = load_of(trace, 8, StepTiming())
    assert load_of(at_rate(trace, 3.0), 8, StepTiming()) == pytest.approx(3 * before, rel=1e-6)


def test_the_command_reports_its_keys_and_a_missing_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--workers", "2", "--requests", "40", "--modes", "kv", "round-robin", "least-loaded"]
    assert route_trace.main([*arguments, "--json"]) == 0
    printed = capsys.readouterr().out
    for key in ("reuse_of_ideal", "reuse_of_sticky", "ttft_p50_vs_round_robin", "load_spread", "decision_p99_ms", "ideal_hit"):
        assert f'"{key}": ' in printed
    assert route_trace.main([*arguments, "--trace", str(tmp_path / "none")]) == 2
    assert "the trace can't be read" in capsys.readouterr().err
