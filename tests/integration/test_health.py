# SPDX-License-Identifier: Apache-2.0
"""Canaries, readiness and logs on real prefill, decode and router processes, whose engines are asked one thing after the other."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from calls import Call, connect, text_of
from servers import Server, get_json, serve, wait_for
from spans import Collector

pytestmark = pytest.mark.slow

WAIT_S = 60.0
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
PROMPT = "The ship sailed on over the wide sea. " * 20
SETTINGS = {"DYN_LOG": "info,tandem_worker=debug,tandem_router=debug", "DYN_LOGGING_JSONL": "1",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "DYN_HEALTH_CHECK_ENABLED": "1", "DYN_CANARY_WAIT_TIME": "1",
            "DYN_HEALTH_CHECK_REQUEST_TIMEOUT": "2"}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """Takes spans until the end."""
    with Collector() as running:
        yield running


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, collector: Collector) -> Iterator[Server]:
    """A prefill and a decode worker with canaries every second, behind a router; JSON logs, traces to the collector."""
    arguments = ["--mode", "disagg", "--model", str(tiny_model), "--max-model-len", "4096", "--otlp-traces-endpoint", collector.url]
    traced = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "500"}
    with serve(tmp_path_factory.mktemp("watched"), *arguments, **SETTINGS, **traced) as server:
        yield server


def engine(server: Server, worker: str) -> psutil.Process:
    """A worker's EngineCore."""
    stubs = [process for process in server.processes() if "triton_python_backend_stub" in " ".join(process.cmdline())]
    stub = next(process for process in stubs if f"/{worker}/" in " ".join(process.cmdline()))
    return next(child for child in stub.children() if "EngineCor" in f"{child.name()} {' '.join(child.cmdline())}")


def answered(server: Server, worker: str) -> float:
    """Requests that the engine has finished."""
    return server.metric(worker, "vllm:request_success_total")


@pytest.mark.parametrize("worker", ["prefill", "decode"])
def test_canaries_are_answered_and_hold_no_blocks(watched: Server, worker: str) -> None:
    """In both roles; a prefill worker's would hold its blocks for 30 s if it were handed off."""
    usage = []
    for _ in range(4):
        before = answered(watched, worker)
        wait_for(lambda: answered(watched, worker) > before, WAIT_S, "a canary")  # noqa: B023 - waited for within the iteration
        usage.append(watched.health(worker)["kv_usage"])  # of the engine's latest step
    assert max(usage) == min(usage)
    assert watched.health(worker)["status"] == "ready"


def test_health_tells_what_triton_says_of_its_models(watched: Server) -> None:
    """Of all models of the server, the ensemble among them."""
    assert watched.health("decode")["models"] == {"prefill": "ready", "decode": "ready", "disagg": "ready", "router": "ready"}


@pytest.mark.parametrize("worker", ["prefill", "decode"])
def test_an_idle_engine_that_is_stopped_is_unwell_until_it_goes_on(watched: Server, worker: str) -> None:
    """Nobody asks it but the canary; the other worker stays ready."""
    process = engine(watched, worker)
    process.send_signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        wait_for(lambda: watched.health(worker)["status"] == "unwell", WAIT_S, "unwell")
        assert time.monotonic() - started < 8
        assert "did not answer a canary request within 2 s" in watched.health(worker)["reason"]
        assert get_json(f"{watched.admin_url(worker)}/live")["status"] == "unwell"
        assert watched.health("decode" if worker == "prefill" else "prefill")["status"] == "ready"
    finally:
        process.send_signal(signal.SIGCONT)
    wait_for(lambda: watched.health(worker)["status"] == "ready", WAIT_S, "ready again")
    assert "reason" not in watched.health(worker)


def lines(server: Server) -> list[dict[str, Any]]:
    """The JSON lines of the log; tritonserver's own are text."""
    return [json.loads(line) for line in server.log.splitlines() if line.startswith('{"time"')]


async def test_a_request_can_be_followed_through_all_processes(watched: Server, collector: Collector) -> None:
    """By its id and trace id in the logs of router, prefill and decode, and by its spans in the collector."""
    async with connect(watched.grpc_url) as client:
        call = Call("router", PROMPT, {"temperature": 0, "max_tokens": 4}, request_id="followed-1", parameters={"traceparent": PARENT})
        assert await text_of(client, call)
    about = [line for line in lines(watched) if line.get("request_id") == "followed-1"]
    assert {line["source"] for line in about} == {"router_0_0", "prefill", "decode"}
    assert {line["trace_id"] for line in about} == {TRACE_ID}
    assert "request.ended outcome=ok" in [line["message"] for line in about if line["source"] == "decode"]
    wait_for(lambda: collector.trace_ids.count(TRACE_ID) >= 7, WAIT_S, f"spans of router, workers and engines: {collector.trace_ids}")
    spans = {span.span_id: span for span in collector.spans if span.trace_id.hex() == TRACE_ID}
    above = sorted((span.name, spans[span.parent_span_id].name) for span in spans.values() if span.parent_span_id in spans)
    ours = [("router.generate", "router.request"), ("router.prefill", "router.request"), ("worker.request", "router.generate"),
            ("worker.request", "router.prefill")]
    assert [pair for pair in above if pair in ours] == ours
    assert [parent for name, parent in above if (name, parent) not in ours] == ["worker.request"] * 2, "vLLM's lie under the workers'"
    canaries = [line for line in lines(watched) if str(line.get("request_id")).startswith("canary")]
    assert canaries == [], "a canary is no request of a client"


def test_vllm_and_all_of_ours_log_json(watched: Server) -> None:
    """No line of Python is left that a log collector could not read, but what vLLM prints without its logger."""
    sources = {line["source"] for line in lines(watched)}
    assert {"vllm", "prefill", "decode", "router_0_0"} <= sources


async def test_a_wrong_trace_is_ignored(watched: Server) -> None:
    """The request is served; the parameter is no sampling parameter."""
    async with connect(watched.grpc_url) as client:
        call = Call("decode", "Hello", None, request_id="bad-trace", parameters={"traceparent": "nonsense", "max_tokens": 2})
        assert await text_of(client, call)
    about = [line for line in lines(watched) if line.get("request_id") == "bad-trace"]
    assert about
    assert not any("trace_id" in line for line in about)
