# SPDX-License-Identifier: Apache-2.0
"""A worker's metrics: what is measured of its requests, and one exposition of several sources without doubles."""

import os
import shutil
import subprocess
import sys
import time
from collections import Counter as Tally
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge

from tandem_protocol.errors import RequestCancelledError, UnavailableError
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.roles import Role
from tandem_protocol.streams import Arrays, Outbox
from tandem_worker.metrics.component import EngineFigures, RankFigures, WorkerMetrics
from tandem_worker.metrics.exposition import Exposition
from tandem_worker.metrics.labels import Labels, dynamo_labels, parse_labels
from tandem_worker.metrics.meters import RequestMeter, WorkTotals

COUNTING = """
from prometheus_client import Counter, Gauge, Histogram
Counter("lmcache:num_lookup_hits", "Of lookups.", ["role"]).labels("worker").inc(%d)
Gauge("lmcache:local_cache_usage", "In bytes.", multiprocess_mode="livesum").set(5)
Histogram("lmcache:time_to_load", "In seconds.").observe(0.1)
Counter("vllm:prompt_tokens", "The stub has these.", ["model_name"]).labels("m").inc()
Counter("vllm:only_in_the_engine", "The stub has none of it.").inc()
"""
BOTH_MODES = """
import sys
from pathlib import Path
from prometheus_client import REGISTRY, Counter, Gauge
from tandem_worker.metrics.component import WorkerMetrics
from tandem_worker.metrics.exposition import Exposition
Counter("vllm:prompt_tokens", "Of this process.", ["model_name"]).labels("m").inc(7)
Counter("lmcache:num_lookup_hits", "Of lookups.", ["role"]).labels("worker").inc(0)
Gauge("vllm:num_requests_running", "Of this process.").set(3)
sys.stdout.buffer.write(Exposition((REGISTRY, WorkerMetrics().registry), Path(sys.argv[1])).text())
"""


@dataclass
class Sequence:
    """What is read of vLLM's CompletionOutput."""

    token_ids: list[int]


@dataclass
class Stamps:
    """What is read of vLLM's RequestStateStats."""

    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0


@dataclass
class Output:
    """What is read of vLLM's RequestOutput."""

    outputs: list[Sequence]
    finished: bool = False
    metrics: Stamps | None = None

    def add(self, next_output: Any, aggregate: bool) -> None:
        """Later ones only end it here."""
        self.finished = next_output.finished


@dataclass
class Recorder:
    """Takes responses."""

    sent: list[Arrays] = field(default_factory=list)
    error: Exception | None = None

    def send(self, arrays: Arrays, *, final: bool) -> None:
        """One response."""
        self.sent.append(arrays)

    def fail(self, error: Exception) -> None:
        """The end with an error."""
        self.error = error

    def is_cancelled(self) -> bool:
        """Never."""
        return False


def output(*tokens: int, finished: bool = False, **stamps: float) -> Output:
    """So many new tokens of each sequence."""
    return Output([Sequence([1] * count) for count in tokens], finished, Stamps(**stamps))


def metered(*outputs: tuple[Output, float], streamed: bool = True) -> CollectorRegistry:
    """After one request that was taken at 1 s, with outputs at their times."""
    metrics = WorkerMetrics()
    meter = RequestMeter(metrics.totals, 1.0, streamed=streamed)
    for each, now in outputs:
        meter.received(each, now)
    return metrics.registry


def sum_and_count(registry: CollectorRegistry, name: str) -> tuple[float | None, float | None]:
    """Of a histogram."""
    return registry.get_sample_value(f"{name}_sum"), registry.get_sample_value(f"{name}_count")


def request(prompt: str | list[int] = "hello", *, stream: bool = True) -> GenerationRequest:
    """A request."""
    return GenerationRequest(request_id="r", prompt=prompt, images=(b"123",), stream=stream, prepend_input=False, sampling={},
                             returns=frozenset(), handoff=None, priority=0, timeout_s=None)


def series(text: bytes) -> Tally[str]:
    """How often each series is there."""
    return Tally(line.rsplit(" ", 1)[0] for line in text.decode().splitlines() if not line.startswith("#"))


def test_a_stream_is_measured_from_execute_to_its_end() -> None:
    """Queue by vLLM's own stamp, first token at 3 s, then three tokens after 1.5 s, the end at 5 s."""
    registry = metered((output(1, scheduled_ts=1.5), 3.0), (output(3), 4.5), (output(0, finished=True), 5.0))
    assert sum_and_count(registry, "tandem_worker_queue_seconds") == (0.5, 1)
    assert sum_and_count(registry, "tandem_worker_time_to_first_token_seconds") == (2.0, 1)
    assert sum_and_count(registry, "tandem_worker_inter_token_latency_seconds") == (1.5, 3)
    assert sum_and_count(registry, "dynamo_component_request_duration_seconds") == (4.0, 1)


def test_an_answer_in_one_piece_is_measured_by_the_engines_stamps() -> None:
    """Its tokens were made one after another, though they come together."""
    whole = output(5, finished=True, scheduled_ts=1.25, first_token_ts=2.0, last_token_ts=4.0)
    registry = metered((whole, 4.5), streamed=False)
    assert sum_and_count(registry, "tandem_worker_time_to_first_token_seconds") == (1.0, 1)
    assert sum_and_count(registry, "tandem_worker_inter_token_latency_seconds") == (2.0, 4)
    assert sum_and_count(registry, "dynamo_component_request_duration_seconds") == (3.5, 1)


def test_sequences_side_by_side_share_their_gaps() -> None:
    """Two sequences with a token each per second."""
    registry = metered((output(1, 1), 2.0), (output(1, 1), 3.0), (output(1, 1, finished=True), 4.0))
    assert sum_and_count(registry, "tandem_worker_inter_token_latency_seconds") == (4.0, 4)


def test_a_stream_counts_bytes_and_how_it_ended() -> None:
    """Bytes of what came and of what was handed on; a second end of the same request counts no more."""
    metrics, outbox, recorder = WorkerMetrics(), Outbox(), Recorder()
    good = metrics.stream(request([1, 2, 3]), recorder, outbox)
    good.encode = lambda _: {"text_output": np.array([b"ab", b"c"], object), "output_ids": np.array([1, 2], np.int32)}
    good.push(output(1, finished=True))
    bad = metrics.stream(request(), recorder, outbox)
    bad.fail(RequestCancelledError("gone"))
    bad.fail(UnavailableError("never told"))
    outbox.close(5.0)
    value = metrics.registry.get_sample_value
    assert value("dynamo_component_requests_total") == 2
    assert value("dynamo_component_errors_total", {"error_type": "cancelled"}) == 1
    assert value("dynamo_component_request_bytes_total") == 3 * 4 + 3 + 5 + 3
    assert value("dynamo_component_response_bytes_total") == 3 + 2 * 4
    assert isinstance(recorder.error, RequestCancelledError)


def test_gauges_of_the_engine_come_by_rank() -> None:
    """Once there is an engine."""
    metrics = WorkerMetrics()
    value = metrics.registry.get_sample_value
    assert value("dynamo_component_inflight_requests") is None
    metrics.follow(lambda: EngineFigures(2, 31.5, (RankFigures(0, 100, 0.25), RankFigures(1, 100, 0.75, 3.5))))
    assert value("dynamo_component_total_blocks", {"dp_rank": "1"}) == 100
    assert value("dynamo_component_gpu_cache_usage_percent", {"dp_rank": "1"}) == 0.75
    assert value("tandem_worker_accept_length", {"dp_rank": "1"}) == 3.5
    assert value("tandem_worker_accept_length", {"dp_rank": "0"}) is None
    assert (value("dynamo_component_inflight_requests"), value("dynamo_component_model_load_time_seconds")) == (2, 31.5)
    assert 0 <= (value("dynamo_component_uptime_seconds") or -1) < 60


def test_own_labels_come_before_ours_and_ours_before_the_operators() -> None:
    """Of a series that has some of them; Python's own figures stay as they are."""
    registry = CollectorRegistry()
    Gauge("vllm:running", "Of a rank.", ["engine", "model_name"], registry=registry).labels("1", "served").set(4)
    Gauge("python_things", "Of the process.", registry=registry).set(1)
    labels = Labels(dynamo_labels("prod", Role.DECODE, "org/model", "other"), parse_labels("zone=a, model=b,engine=9"))
    text = Exposition((registry,), None, labels).text().decode()
    assert ('vllm:running{dp_rank="1",dynamo_component="backend",dynamo_endpoint="generate",dynamo_namespace="prod",engine="1",'
            'model="org/model",model_name="served",zone="a"} 4.0') in text
    assert "\npython_things 1.0" in text


@pytest.mark.parametrize("text", ["zone", "=a", "1zone=a", "__name__=x", "zo-ne=a", "a=b,c"])
def test_what_is_no_label_is_refused(text: str) -> None:
    """Prometheus would refuse the whole exposition later."""
    with pytest.raises(ValueError, match="is no label"):
        parse_labels(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Left by two processes, as by two ranks of an engine."""
    for count in (2, 3):
        subprocess.run([sys.executable, "-c", COUNTING % count], env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}, check=True,
                       timeout=60)
    return tmp_path


def test_files_of_engine_processes_are_summed_and_nothing_is_there_twice(folder: Path) -> None:
    """LMCache's are theirs; of what the stub counts itself, the stub's figure is the one."""
    stub = CollectorRegistry()
    Counter("vllm:prompt_tokens", "Of the stub.", ["model_name"], registry=stub).labels("m").inc(7)
    Counter("lmcache:num_lookup_hits", "A zero of the stub's.", ["role"], registry=stub).labels("worker")
    text = Exposition((stub,), folder).text()
    assert b'lmcache:num_lookup_hits_total{role="worker"} 5.0' in text
    assert b"lmcache:local_cache_usage 10.0" in text
    assert b"lmcache:time_to_load_count 2.0" in text
    assert b'vllm:prompt_tokens_total{model_name="m"} 7.0' in text
    assert b"vllm:only_in_the_engine_total 2.0" in text
    assert max(series(text).values()) == 1


@pytest.mark.parametrize("mode", ["single", "multi"])
def test_a_stub_in_either_mode_of_prometheus_client_shows_the_same(folder: Path, mode: str) -> None:
    """Somebody may have set PROMETHEUS_MULTIPROC_DIR for the whole server: then the stub's own values lie in files, too."""
    own = {"PROMETHEUS_MULTIPROC_DIR": str(folder)} if mode == "multi" else {}
    environment = {name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"} | own
    command = [sys.executable, "-c", BOTH_MODES, str(folder)]
    text = subprocess.run(command, env=environment, check=True, timeout=60, capture_output=True).stdout
    assert b'vllm:prompt_tokens_total{model_name="m"} 7.0' in text
    assert b'lmcache:num_lookup_hits_total{role="worker"} 5.0' in text
    assert b"vllm:num_requests_running 3.0" in text
    assert max(series(text).values()) == 1


def test_a_folder_that_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    """Engine processes may write nothing at all."""
    assert Exposition((CollectorRegistry(),), tmp_path / "none").text() == b""
    assert Exposition((CollectorRegistry(),), tmp_path).text() == b""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
def test_promtool_accepts_the_workers_own_names() -> None:
    """It only dislikes Dynamo's habit of calling a share `percent`."""
    metrics = WorkerMetrics()
    metrics.follow(lambda: EngineFigures(2, 31.5, (RankFigures(0, 100, 0.25),)))
    text = Exposition((metrics.registry,)).text()
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60, check=False)
    complaints = [line for line in (checked.stdout + checked.stderr).decode().splitlines() if "_percent" not in line]
    assert complaints == []


def test_a_meter_costs_little() -> None:
    """Per output of the engine: the best of several batches, far above what it takes on the slowest machine."""
    totals, each = WorkerMetrics().totals, output(4)
    assert isinstance(totals, WorkTotals)
    meter = RequestMeter(totals, 0.0, streamed=True)

    def batch_s() -> float:
        started = time.perf_counter()
        for _ in range(1000):
            meter.received(each, 1.0)
        return time.perf_counter() - started

    assert min(batch_s() for _ in range(5)) / 1000 < 20e-6
