# SPDX-License-Identifier: Apache-2.0
"""The planner's queries against a real Prometheus that scrapes the router's own metrics and a worker's names."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest

from discovery_contract import worker
from prometheuses import BINARY, RealPrometheus
from servers import wait_for
from tandem_planner.observe import Observer
from tandem_planner.prometheus import Prometheus
from tandem_planner.queries import Source, TrafficQueries
from tandem_planner.terms import Observation, Pool
from tandem_protocol.admin_site import METRICS_TYPE, AdminSite
from tandem_protocol.roles import Role
from tandem_protocol.workers import WorkerRecord

pytestmark = pytest.mark.skipif(BINARY is None, reason="there is no Prometheus")
WAIT_S = 30.0
INTERVAL_S = 4.0
REQUESTS = 40
FIGURES = {"time_to_first_token_seconds": 0.2, "inter_token_latency_seconds": 0.02, "request_duration_seconds": 3.0,
           "input_sequence_tokens": 1000.0, "output_sequence_tokens": 100.0, "cached_tokens": 250.0}  # fmt: skip
BUCKETS = (0.01, 0.05, 0.1, 0.3, 1, 10, 100, 500, 2000)


@dataclass
class Exposition:
    """A process's `/metrics`, with a router's histograms and a worker's gauges."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    histograms: dict[str, Histogram] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in FIGURES:
            for prefix in ("tandem_router", "dynamo_frontend"):
                labels = ["model"] if prefix == "tandem_router" else ["model", "dynamo_namespace"]
                self.histograms[f"{prefix}_{name}"] = Histogram(f"{prefix}_{name}", name, labels, registry=self.registry, buckets=BUCKETS)
        for name, value in (("vllm:kv_cache_usage_perc", 0.4), ("vllm:num_requests_waiting", 3)):
            Gauge(name, name, ["model_name"], registry=self.registry).labels("served").set(value)
        load = Gauge("tandem_router_worker_load", "load", ["worker", "what"], registry=self.registry)
        for rank, tokens in ((0, 500), (1, 20)):
            load.labels(f"vllm-1/{rank}", "active_prefill_tokens").set(tokens)

    def request(self) -> None:
        """One more request of each model."""
        for name, value in FIGURES.items():
            self.histograms[f"tandem_router_{name}"].labels("Org/Model").observe(value)
            self.histograms[f"tandem_router_{name}"].labels("other").observe(9 * value)
            self.histograms[f"dynamo_frontend_{name}"].labels("org/model", "prod").observe(2 * value)

    @asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        """host:port."""
        app = web.Application()

        async def metrics(_: web.Request) -> web.Response:
            return web.Response(body=generate_latest(self.registry), headers={"Content-Type": METRICS_TYPE})

        app.router.add_get("/metrics", metrics)
        site = AdminSite(app)
        try:
            yield f"127.0.0.1:{await site.start('127.0.0.1', 0, '')}"
        finally:
            await site.stop()


async def test_figures_of_a_real_prometheus_and_their_absence(tmp_path: Path) -> None:
    """Means and percentiles of one model, loads of workers; then the scraped process is gone, then Prometheus itself."""
    exposition, prometheus = Exposition(), RealPrometheus(tmp_path, scrape_s=0.2)
    async with exposition.served() as address:
        prometheus.targets = (address,)
        try:
            await asyncio.to_thread(prometheus.start)
            exposition.request()  # a series' first value counts as none: nobody knows when it began
            await _scraped(prometheus, 1)
            for _ in range(REQUESTS):
                exposition.request()
            await _scraped(prometheus, 1 + REQUESTS)
            await _covered(prometheus)
            await _look_at_figures(prometheus, address)
            unscraped = await _look(prometheus, Source.ROUTER, "127.0.0.1:1")
            assert any("no fresh metrics of worker vllm-1" in sentence for sentence in unscraped.missing)
            unknown = await _look(prometheus, Source.ROUTER, address, "nobody's model")
            assert unknown.traffic is None
            assert "is the model's name right" in unknown.missing[0]
            await asyncio.to_thread(prometheus.scrape)
            gone = await _until_missing(prometheus, address)
            assert gone.pools[Role.AGGREGATED].loads == ()
        finally:
            prometheus.kill()
        lost = await _look(prometheus, Source.ROUTER, address)
        assert "can't be asked" in lost.missing[0]


async def _look_at_figures(prometheus: RealPrometheus, address: str) -> None:
    for source, factor in ((Source.ROUTER, 1), (Source.DYNAMO, 2)):
        seen = await _look(prometheus, source, address)
        assert seen.missing == ()
        assert seen.traffic is not None
        assert (seen.traffic.isl, seen.traffic.osl) == (pytest.approx(1000 * factor), pytest.approx(100 * factor))
        assert seen.traffic.ttft.mean == pytest.approx(0.2 * factor)
        assert 0.1 * factor <= seen.traffic.ttft.p50 <= seen.traffic.ttft.p95 <= seen.traffic.ttft.p99 <= 1
        assert seen.traffic.itl.mean == pytest.approx(0.02 * factor)
        assert seen.traffic.cached_fraction == pytest.approx(0.25)
        assert 0.7 * REQUESTS < seen.traffic.requests < 1.6 * REQUESTS  # Prometheus extrapolates to the interval's ends
        (load,) = seen.pools[Role.AGGREGATED].loads
        assert (load.id, load.kv_use, load.queued_requests) == ("vllm-1", 0.4, 3)
        assert load.queued_prefill_tokens == (520 if source is Source.ROUTER else 0)


async def _look(prometheus: RealPrometheus, source: Source, address: str, model: str = "ORG/model") -> Observation:
    async def records() -> tuple[WorkerRecord, ...]:
        return (worker(admin_url=f"http://{address}"),)

    client = Prometheus(prometheus.url, 5)
    observer = Observer(client, TrafficQueries(source, model, "prod"), records, 30, time.time)
    try:
        return await observer.observe({Role.AGGREGATED: Pool(1, 1)}, INTERVAL_S)
    finally:
        await client.close()


async def _scraped(prometheus: RealPrometheus, count: int) -> None:
    """Until so many requests have been seen."""
    series = 'tandem_router_cached_tokens_count{model="Org/Model"}'

    def seen() -> bool:
        found = prometheus.query(series)
        return bool(found) and float(found[0]["value"][1]) >= count

    await asyncio.to_thread(wait_for, seen, WAIT_S, f"{count} requests in Prometheus")


async def _covered(prometheus: RealPrometheus) -> None:
    """Until there are samples of most of the interval: Prometheus extrapolates from few of them by much."""
    query = f"count_over_time(dynamo_frontend_cached_tokens_count[{INTERVAL_S:g}s]) > 14"
    await asyncio.to_thread(wait_for, lambda: bool(prometheus.query(query)), WAIT_S, "samples of most of the interval")


async def _until_missing(prometheus: RealPrometheus, address: str) -> Observation:
    """Prometheus marks the series of a target that is gone."""
    async with asyncio.timeout(WAIT_S):
        seen = await _look(prometheus, Source.ROUTER, address)
        while seen.pools[Role.AGGREGATED].loads or seen.traffic is not None:
            await asyncio.sleep(0.1)
            seen = await _look(prometheus, Source.ROUTER, address)
    return seen
