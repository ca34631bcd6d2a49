# SPDX-License-Identifier: Apache-2.0
"""Metrics of real parts: they say what clients measure, each series is there once, and Grafana's queries find them in Prometheus."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from calls import Call, connect, responses
from expositions import TOOL, Exposition
from models import make_tiny_model
from prometheuses import BINARY, RealPrometheus
from routers import LocalRouter, Mocks, Recorder, mocks, router
from servers import Server, get_text, serve, wait_for
from tandem_protocol.streams import Arrays

BOARD = json.loads((Path(__file__).parents[2] / "dashboards" / "serving.json").read_text())
WAIT_S = 60.0
REQUESTS = 30
TOKENS = 8
WITHIN = 0.1
needs_prometheus = pytest.mark.skipif(TOOL is None or BINARY is None, reason="Prometheus is not installed (Debian: prometheus)")


@dataclass
class Times:
    """What a client saw of one stream: (seconds since it was sent, tokens) of each response."""

    responses: list[tuple[float, int]] = field(default_factory=list)

    @property
    def first_s(self) -> float:
        """To the first token."""
        return self.responses[0][0]

    @property
    def gap_s(self) -> float:
        """Mean time between two tokens."""
        return (self.responses[-1][0] - self.first_s) / (sum(tokens for _, tokens in self.responses) - self.responses[0][1])


def mean_since(before: Exposition, after: Exposition, name: str, *labels: str) -> tuple[float, float]:
    """(mean, count) of a histogram's observations between two scrapes."""
    count = after.sum_of(f"{name}_count", *labels) - before.sum_of(f"{name}_count", *labels)
    return (after.sum_of(f"{name}_sum", *labels) - before.sum_of(f"{name}_sum", *labels)) / count, count


def worker_metrics(server: Server, worker: str = "vllm") -> Exposition:
    """A worker's."""
    return Exposition(get_text(f"{server.admin_url(worker)}/metrics"))


def triton_metrics(server: Server) -> Exposition:
    """tritonserver's own, with ours among them."""
    return Exposition(get_text(f"http://127.0.0.1:{server.metrics_port}/metrics"))


def router_url(server: Server) -> str:
    """The admin server of its router."""
    return str(server.state["router_urls"][0])


async def streamed(client: Any, model: str, number: int) -> Times:
    """One request of a prompt of its own."""
    sampling = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
    call = Call(model, f"{number} ships sailed on over the wide sea. " * 5, sampling, returns=("num_output_tokens",))
    times, started = Times(), time.perf_counter()
    async for response in responses(client, call):
        if response.get("num_output_tokens"):
            times.responses.append((time.perf_counter() - started, int(response["num_output_tokens"][0])))
    return times


async def test_a_workers_times_are_those_of_its_clients(server: Server) -> None:
    """30 streams at once, so that they queue, too: means within 10 %, every token and request counted."""
    before = worker_metrics(server)
    async with connect(server.grpc_url) as client:
        seen = await asyncio.gather(*(streamed(client, "vllm", number) for number in range(REQUESTS)))
    after = worker_metrics(server)
    first, requests = mean_since(before, after, "tandem_worker_time_to_first_token_seconds")
    gap, gaps = mean_since(before, after, "tandem_worker_inter_token_latency_seconds")
    duration, ended = mean_since(before, after, "dynamo_component_request_duration_seconds")
    queued, _ = mean_since(before, after, "tandem_worker_queue_seconds")
    engines, _ = mean_since(before, after, "vllm:request_queue_time_seconds")
    assert (requests, gaps, ended) == (REQUESTS, REQUESTS * (TOKENS - 1), REQUESTS)
    assert first == pytest.approx(fmean(times.first_s for times in seen), rel=WITHIN)
    assert gap == pytest.approx(fmean(times.gap_s for times in seen), rel=WITHIN)
    assert duration == pytest.approx(fmean(times.responses[-1][0] for times in seen), rel=WITHIN)
    assert engines <= queued <= first


@needs_prometheus
def test_everything_that_vllm_exports_is_there_once_and_labelled(server: Server) -> None:
    """Dynamo's names among them; promtool has nothing to say about ours but that a share is called `percent`."""
    for worker, component in (("vllm", "backend"), ("prefill", "prefill"), ("decode", "backend")):
        found = worker_metrics(server, worker)
        names = {series.split("{")[0] for series in found.samples}
        assert {"vllm:num_requests_running", "vllm:generation_tokens_total", "vllm:kv_cache_usage_perc", "vllm:cache_config_info",
                "dynamo_component_total_blocks", "dynamo_component_gpu_cache_usage_percent", "dynamo_component_model_load_time_seconds",
                "dynamo_component_inflight_requests", "dynamo_component_requests_total", "dynamo_component_request_bytes_total",
                "dynamo_component_response_bytes_total", "dynamo_component_errors_total", "dynamo_component_uptime_seconds"} <= names
        assert found.doubles == []
        assert [line for line in found.complaints() if "_percent" not in line] == []
        running = next(series for series in found.samples if series.startswith("vllm:num_requests_running{"))
        for label in ('dynamo_namespace="dynamo"', f'dynamo_component="{component}"', 'dynamo_endpoint="generate"', 'dp_rank="0"'):
            assert label in running
        assert found.sum_of("dynamo_component_total_blocks", 'dp_rank="0"') > 0


@needs_prometheus
def test_tritons_metrics_show_ours_and_add_up(server: Server) -> None:
    """Counters, gauges and histograms of each worker; what is counted per token stays on the admin port."""
    here = worker_metrics(server)
    assert here.sum_of("vllm:generation_tokens_total") > 0
    ours = ('triton_instance="vllm',)

    def caught_up() -> bool:
        there = triton_metrics(server)
        counts = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:e2e_request_latency_seconds_count",
                  "tandem_worker_time_to_first_token_seconds_count", "dynamo_component_total_blocks")
        return all(there.sum_of(name, *ours) == here.sum_of(name) for name in counts)

    wait_for(caught_up, WAIT_S, "Triton shows what the worker does")
    there = triton_metrics(server)
    for name in ("vllm:e2e_request_latency_seconds", "tandem_worker_time_to_first_token_seconds"):
        assert there.sum_of(f"{name}_sum", *ours) == pytest.approx(here.sum_of(f"{name}_sum"), rel=1e-6)
        assert there.sum_of(f"{name}_bucket", *ours, 'le="1"') == here.sum_of(f"{name}_bucket", 'le="1.0"')
    assert there.sum_of("vllm:inter_token_latency_seconds_count") == 0
    assert {series.split('triton_instance="')[1].split('"')[0] for series in there.samples if "triton_instance=" in series} == {
        "vllm_0_0", "prefill_0_0", "decode_0_0"}, "a router's are not there unless asked for"
    assert there.doubles == []
    assert there.complaints() == []


def queries() -> list[str]:
    """Of all panels, for all models and instances."""
    texts = [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", ())]
    return [re.sub(r"\$(model|router|served|worker)\b", ".*", text).replace("$__rate_interval", "30s") for text in texts]


def variables() -> list[str]:
    """What fills the board's variables, as queries."""
    given = [variable["query"] for variable in BOARD["templating"]["list"] if variable["type"] == "query"]
    return [re.sub(r"label_values\((.*), (\w+)\)", r"count by (\2) (\1)", query) for query in given]


@needs_prometheus
async def test_every_query_of_the_board_returns_data(server: Server, tmp_path: Path) -> None:
    """From a real Prometheus that scrapes router and workers while requests run through both."""
    targets = [url.removeprefix("http://") for url in (router_url(server), server.admin_url("vllm"), server.admin_url("decode"))]
    prometheus = RealPrometheus(tmp_path / "prometheus", tuple(targets))
    prometheus.start()
    try:
        async with connect(server.grpc_url) as client:
            deadline, number = time.monotonic() + WAIT_S, 100
            while silent := await asyncio.to_thread(_silent, prometheus):  # traffic goes on: rates are of what changes while it looks
                assert time.monotonic() < deadline, silent
                await asyncio.gather(streamed(client, "router", number), streamed(client, "vllm", number + 1))
                number += 2
    finally:
        prometheus.kill()


def _silent(prometheus: RealPrometheus) -> list[str]:
    """Queries that return nothing yet."""
    return [query for query in (*queries(), *variables()) if not _has_data(prometheus.query(query))]


def _has_data(result: list[dict[str, Any]]) -> bool:
    return any(sample["value"][1] != "NaN" for sample in result)


class Timed(Recorder):
    """A recorder that notes when responses came."""

    def __init__(self) -> None:
        super().__init__()
        self.times, self.started = Times(), time.perf_counter()

    def send(self, arrays: Arrays, *, final: bool) -> None:
        """One response."""
        if "output_ids" in arrays:
            self.times.responses.append((time.perf_counter() - self.started, len(arrays["output_ids"])))
        super().send(arrays, final=final)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mocks, LocalRouter]]:
    """Two mock workers at the speed of real ones, and a router."""
    folder = tmp_path_factory.mktemp("small")
    with mocks(folder, "--workers", "2", "--speedup", "0.3") as running, router(folder, 2, make_tiny_model(folder / "model")) as local:
        yield running, local


def test_a_routers_times_are_those_of_its_clients(small: tuple[Mocks, LocalRouter], monkeypatch: pytest.MonkeyPatch) -> None:
    """30 streams, ten at a time, and lengths by the token."""
    _, local = small
    monkeypatch.setattr("routers.Recorder", Timed)
    before = Exposition(local.router.metrics.exposition().decode())
    seen: list[Timed] = []
    for wave in range(REQUESTS // 10):
        sent = [local.send([wave * 50 + number + 1] * 100, max_tokens=20, returns=("output_ids",)) for number in range(10)]
        seen += [one.wait() for one in sent if isinstance(one, Timed)]
    wait_for(lambda: not local.router.active_requests, WAIT_S, "all requests to be counted")
    after = Exposition(local.router.metrics.exposition().decode())
    model = ('model="mock"',)
    first, count = mean_since(before, after, "tandem_router_time_to_first_token_seconds", *model)
    gap, gaps = mean_since(before, after, "tandem_router_inter_token_latency_seconds", *model)
    duration, _ = mean_since(before, after, "tandem_router_request_duration_seconds", *model)
    assert (len(seen), count) == (REQUESTS, REQUESTS)
    assert gaps == sum(tokens for one in seen for _, tokens in one.times.responses[1:])
    assert first == pytest.approx(fmean(one.times.first_s for one in seen), rel=WITHIN)
    assert gap == pytest.approx(fmean(one.times.gap_s for one in seen), rel=WITHIN)
    assert duration == pytest.approx(fmean(one.times.responses[-1][0] for one in seen), rel=WITHIN)
    assert mean_since(before, after, "tandem_router_input_sequence_tokens", *model) == (100, REQUESTS)
    assert mean_since(before, after, "tandem_router_output_sequence_tokens", *model) == (20, REQUESTS)


@needs_prometheus
def test_promtool_accepts_what_routers_and_mocks_say(small: tuple[Mocks, LocalRouter]) -> None:
    """And each series is there once."""
    running, local = small
    for url in (local.admin, f"http://{running.admin}"):
        found = Exposition(get_text(f"{url}/metrics"))
        assert found.samples
        assert found.doubles == []
        assert found.complaints() == []


def test_a_request_in_the_queue_is_told(small: tuple[Mocks, LocalRouter]) -> None:
    """While it has no token: seen from a thread that scrapes all the time."""
    _, local = small
    seen, stop = [], threading.Event()

    def scrape() -> None:
        while not stop.is_set():
            seen.append(Exposition(get_text(f"{local.admin}/metrics")).sum_of("tandem_router_queued_requests"))

    thread = threading.Thread(target=scrape, daemon=True)
    thread.start()
    sent = [local.send([77 + number] * 2000, max_tokens=2) for number in range(8)]
    assert all(one.text for one in sent)
    stop.set()
    thread.join(WAIT_S)
    assert max(seen) >= 1
    assert Exposition(get_text(f"{local.admin}/metrics")).sum_of("tandem_router_queued_requests") == 0


def metric_folders(temporary: Path) -> list[Path]:
    """Those of workers that keep their scratch there."""
    return list(temporary.glob("tandem-*/metrics"))


@pytest.mark.slow
async def test_two_ranks_and_a_folder_of_the_operators_double_nothing(tmp_path: Path, tiny_model: Path) -> None:
    """Prometheus' client in its multi-process mode in the stub, too: the same figures, and nothing is left behind."""
    given = tmp_path / "given"
    given.mkdir()
    arguments = ["--mode", "agg", "--routers", "0", "--model", str(tiny_model), "--max-model-len", "2048", "--data-parallel-size", "2"]
    with serve(tmp_path / "run", *arguments, PROMETHEUS_MULTIPROC_DIR=str(given), TANDEM_METRICS_LABELS="zone=a,model=never",
               DYN_NAMESPACE="prod", TMPDIR=str(tmp_path)) as server:
        async with connect(server.grpc_url) as client:
            await asyncio.gather(*(streamed(client, "vllm", number) for number in range(8)))
        found = worker_metrics(server)
        assert found.doubles == []
        assert found.sum_of("vllm:generation_tokens_total") == found.sum_of("vllm:generation_tokens_total", 'zone="a"') == 8 * TOKENS
        assert found.sum_of("vllm:generation_tokens_total", 'dynamo_namespace="prod"', f'model="{tiny_model}"') == 8 * TOKENS
        for rank in ("0", "1"):
            assert found.sum_of("dynamo_component_total_blocks", f'dp_rank="{rank}"') > 0
            assert found.sum_of("vllm:generation_tokens_total", f'dp_rank="{rank}"') > 0
        assert metric_folders(tmp_path), "engine processes have a folder of the worker's own"
    assert metric_folders(tmp_path) == []
