# SPDX-License-Identifier: Apache-2.0
"""The consolidator's admin server: `/live`, `/health` and `/metrics`."""

from collections.abc import Callable, Iterator

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tandem_kvbm.consolidator.report import Report
from tandem_protocol.admin_site import METRICS_TYPE, AdminSite

_TOTALS = {
    "published": "Frames published",
    "dumps": "Dumps made for subscribers that came late",
    "save_failures": "Times that the state could not be written",
    "refused_answers": "Questions for a replay beyond the bound",
    "broken_answers": "Answers whose reader went away or didn't read",
    "unknown_events": "Events of types that nobody knows",
}


class AdminServer:
    """Serves the figures of one pump."""

    def __init__(self, report: Callable[[], Report]) -> None:
        self._report = report
        self._registry = CollectorRegistry()
        self._registry.register(_Figures(report))
        app = web.Application()
        app.add_routes([web.get("/live", self._live), web.get("/health", self._health), web.get("/metrics", self._metrics)])
        self._site = AdminSite(app)

    async def start(self, address: str, port: int) -> int:
        """Listens; returns the port. Raises ConfigError when it is taken."""
        return await self._site.start(address, port, "set TANDEM_CONSOLIDATOR_ADMIN_PORT to a free one")

    async def stop(self) -> None:
        """Closes the server."""
        await self._site.stop()

    async def _live(self, _: web.Request) -> web.Response:
        alive = self._report().alive
        return web.json_response({"status": "ready" if alive else "dead"}, status=200 if alive else 503)

    async def _health(self, _: web.Request) -> web.Response:
        report = self._report()
        return web.Response(body=msgspec.json.encode(report), status=200 if report.ready else 503, content_type="application/json")

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": METRICS_TYPE})


class _Figures(Collector):
    """Reads the report whenever it is scraped."""

    def __init__(self, report: Callable[[], Report]) -> None:
        self._report = report

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        report = self._report()
        for name, text in _TOTALS.items():
            yield CounterMetricFamily(f"tandem_consolidator_{name}", f"{text}.", value=getattr(report, name))
        yield GaugeMetricFamily("tandem_consolidator_lag_seconds", "From the engine's publication to ours, of the last batch.",
                                value=report.lag_s)
        yield from self._lanes(report)
        yield from self._sources(report)

    def _lanes(self, report: Report) -> Iterator[Metric]:
        blocks = GaugeMetricFamily("tandem_consolidator_blocks", "Blocks known.", labels=["dp_rank"])
        waiting = GaugeMetricFamily("tandem_consolidator_waiting_blocks", "Blocks that wait for their parent.", labels=["dp_rank"])
        events = CounterMetricFamily("tandem_consolidator_block_events", "Blocks by what happened to them.", labels=["dp_rank", "what"])
        for lane in report.lanes:
            blocks.add_metric([str(lane.dp_rank)], lane.blocks)
            waiting.add_metric([str(lane.dp_rank)], lane.waiting)
            for what, value in lane.counts.items():
                events.add_metric([str(lane.dp_rank), what], value)
        yield from (blocks, waiting, events)

    def _sources(self, report: Report) -> Iterator[Metric]:
        synced = GaugeMetricFamily("tandem_consolidator_synced", "1 while all that a publisher published is in.", labels=["publisher"])
        failures = CounterMetricFamily("tandem_consolidator_failures", "Exceptions, each repaired by a resync.", labels=["publisher"])
        feed = CounterMetricFamily("tandem_consolidator_feed", "A publisher's frames by what became of them.", labels=["publisher", "what"])
        for source in report.sources:
            synced.add_metric([source.name], source.synced)
            failures.add_metric([source.name], source.failures)
            for what, value in source.counts.items():
                feed.add_metric([source.name, what], value)
        yield from (synced, failures, feed)
