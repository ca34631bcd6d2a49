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
import pytest

from servers import Server, serve
from tandem_planner.profile_data import read_profile
from tandem_worker.mock.timing import BatchShape, StepTiming

SPEEDUP = 0.2
"""Five times as slow as the mock's default, so that a busy machine's delays weigh little."""
TIMEOUT_S = 300


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


def profile(out: Path, *arguments: str) -> dict[str, Any]:
    """`tandem profile --json`."""
    command = [sys.executable, "-m", "tandem_cli.main", "profile", "--json", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_the_mocks_own_times_are_recovered(tmp_path: Path) -> None:
    """TTFT and ITL within 15 % of its timing, in real time."""
    grid = ["--max-kv-tokens", "800000", "--max-context", "2048", "--min-isl", "512", "--prefill-points", "3", "--contexts", "2",
            "--loads", "2", "--max-requests", "6", "--decode-tokens", "24", "--repeats", "2", "--ttft", "2000", "--itl", "50"]
    with mock_engine("--speedup", str(SPEEDUP)) as mock:
        told = profile(tmp_path, "--url", mock["grpc"], "--model", "mock_0", *grid)
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
