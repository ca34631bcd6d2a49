# SPDX-License-Identifier: Apache-2.0
"""`tandem profile` finds what it is known to find: the mock engine's own times, and files that the planner reads from a real engine."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from servers import Server, serve
from tandem_planner.profile_data import read_profile
from tandem_worker.mock.timing import BatchShape, StepTiming

SPEEDUP = 0.2
"""Five times as slow as the mock's default, so that a busy machine's delays weigh little."""
CUT_AFTER_S = 2.0
"""In the middle of the prompts: a whole profile of this grid takes several times as long."""
TIMEOUT_S = 500


@contextlib.contextmanager
def mock_engine(*arguments: str) -> Iterator[dict[str, Any]]:
    """A mock process; yields what it says of itself."""
    command = [sys.executable, "-m", "tandem_worker.mock", "--no-events", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield dict(json.loads(process.stdout.readline()))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def profile(out: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    """`tandem profile --json`, with its exit code."""
    command = [sys.executable, "-m", "tandem_cli.main", "profile", "--json", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == code, done.stderr
    return dict(json.loads(done.stdout))


def test_the_mocks_own_times_are_recovered(tmp_path: Path) -> None:
    """TTFT and ITL within 15 % of its timing, in real time; a first run that is cut short leaves what it has, and the next one goes on."""
    grid = ["--max-kv-tokens", "800000", "--max-context", "2048", "--min-isl", "512", "--prefill-points", "3", "--contexts", "2",
            "--loads", "2", "--max-requests", "6", "--decode-tokens", "24", "--repeats", "2", "--ttft", "2000", "--itl", "50"]
    with mock_engine("--speedup", str(SPEEDUP)) as mock:
        server = ["--url", mock["grpc"], "--model", "mock_0"]
        cut = profile(tmp_path, *server, *grid, "--limit-s", str(CUT_AFTER_S), code=1)
        part = read_profile(tmp_path)
        told = profile(tmp_path, *server, *grid)
    assert (cut["whole"], told["whole"]) == (False, True)
    assert part.prefill is not None
    assert part.decode is None
    found = read_profile(tmp_path)
    assert told["advice"]["ratio"]
    timing = StepTiming(speedup=SPEEDUP)
    assert found.prefill is not None
    assert found.decode is not None
    expected = [timing.seconds(BatchShape(int(isl), isl * isl / 2)) * 1e3 for isl in found.prefill.isl]
    assert found.prefill.ttft_ms == pytest.approx(np.array(expected), rel=0.15)
    counts = np.rint(found.decode.kv_usage * 800_000 / found.decode.context_length)
    steps = [timing.seconds(BatchShape(0, 0, int(count), int(count * context))) * 1e3
             for count, context in zip(counts, found.decode.context_length, strict=True)]
    assert found.decode.itl_ms == pytest.approx(np.array(steps), rel=0.15)


@pytest.fixture
def real(tmp_path: Path, tiny_model: Path) -> Iterator[Server]:
    """A real engine with two random layers."""
    sizes = ["--max-model-len", "1024", "--max-num-seqs", "8"]
    with serve(tmp_path / "run", "--mode", "agg", "--routers", "0", "--model", str(tiny_model), *sizes) as server:
        yield server


@pytest.mark.slow
def test_a_real_engine_is_profiled_with_the_cache_that_its_metrics_tell(tmp_path: Path, real: Server) -> None:
    """Longer prompts take longer, more requests make more tokens per second, and KV use is a share."""
    grid = ["--max-context", "1000", "--min-isl", "64", "--prefill-points", "3", "--contexts", "1", "--loads", "2", "--max-requests", "4",
            "--decode-tokens", "16", "--repeats", "2", "--ttft", "60000", "--itl", "60000"]
    out = tmp_path / "profile"
    told = profile(out, "--url", real.grpc_url, "--model", "vllm", "--admin", real.admin_url("vllm"), *grid)
    found = read_profile(out)
    assert found.prefill is not None
    assert found.decode is not None
    assert found.prefill.ttft_ms[-1] > found.prefill.ttft_ms[0] > 0
    assert found.decode.thpt_per_gpu[-1] > found.decode.thpt_per_gpu[0]
    assert 0 < found.decode.kv_usage.max() < 1
    assert found.decode.max_kv_tokens > 1000
    assert told["advice"] is not None


@pytest.mark.slow
def test_engines_are_started_measured_and_ended_and_what_does_not_start_is_left_out(tmp_path: Path, tiny_model: Path) -> None:
    """One that has room for its prompts, and one of a parallelism that its two heads can't be divided by; then nothing is started anew."""
    sizes = ["--max-model-len", "1024", "--max-num-seqs", "4"]
    grid = ["--max-context", "1000", "--min-isl", "64", "--prefill-points", "2", "--contexts", "1", "--loads", "2", "--max-requests", "4",
            "--decode-tokens", "16", "--repeats", "1", "--ttft", "60000", "--itl", "60000"]
    out = tmp_path / "profile"
    told = profile(out, "--model", str(tiny_model), "--tp", "1,3", *sizes, *grid)
    assert told["measured"] == [1]
    assert told["failed"]["3"]
    assert told["recommendation"]["decode_tp"] == 1
    assert read_profile(out / "tp1").decode is not None
    assert read_profile(out).prefill is not None
    assert list((out / "plots").glob("*.svg"))
    assert not list((out / "tp1" / "run").glob("*/state.json"))
    assert not [process for process in psutil.process_iter(["cmdline"]) if str(out) in " ".join(process.info["cmdline"] or ())]
    started_at = (out / "tp1" / "serve.log").stat().st_mtime_ns
    again = profile(out, "--model", str(tiny_model), "--tp", "1", *sizes, *grid)
    assert again["recommendation"] == told["recommendation"]
    assert (out / "tp1" / "serve.log").stat().st_mtime_ns == started_at
