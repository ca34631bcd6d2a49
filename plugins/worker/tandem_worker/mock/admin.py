# SPDX-License-Identifier: Apache-2.0
"""One admin port for all mock workers of a process: health, metrics under vLLM's names, and the fault switches.

`POST /mock/kill?worker=i`, `/engine/drain?worker=i`, `/clear_kv_blocks?worker=i`, and `/mock/release` for decode workers elsewhere.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tandem_protocol.admin_site import METRICS_TYPE, AdminSite
from tandem_protocol.errors import RequestError
from tandem_protocol.workers import WorkerState
from tandem_worker.mock.fleet import Fleet
from tandem_worker.mock.worker import MockWorker

_Family = TypeVar("_Family", GaugeMetricFamily, CounterMetricFamily)
_GAUGES: dict[str, Callable[[MockWorker], float]] = {
    "vllm:num_requests_running": lambda worker: worker.engine.running,
    "vllm:num_requests_waiting": lambda worker: worker.engine.waiting,
    "vllm:kv_cache_usage_perc": lambda worker: worker.engine.used_blocks / worker.engine.settings.total_blocks,
    "tandem_mock_held_handoffs": lambda worker: worker.engine.held_handoffs,
}
_COUNTERS: dict[str, Callable[[MockWorker], float]] = {
    "vllm:prefix_cache_queries": lambda worker: worker.engine.counts.prompt_tokens,
    "vllm:prefix_cache_hits": lambda worker: worker.engine.counts.cached_tokens,
    "vllm:prompt_tokens": lambda worker: worker.engine.counts.prompt_tokens,
    "vllm:generation_tokens": lambda worker: worker.engine.counts.generated_tokens,
    "vllm:num_preemptions": lambda worker: worker.engine.counts.preemptions,
    "tandem_mock_steps": lambda worker: worker.engine.counts.steps,
    "tandem_mock_computed_tokens": lambda worker: worker.engine.counts.computed_tokens,
    "tandem_mock_transferred_tokens": lambda worker: worker.engine.counts.transferred_tokens,
    "tandem_mock_late_seconds": lambda worker: worker.late_s,
}


class Release(msgspec.Struct, frozen=True):
    """What `/mock/release` is sent."""

    engine_id: str
    request_id: str


class AdminServer:
    """Serves the admin routes of all workers of a process."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._registry = CollectorRegistry()
        self._registry.register(_FleetCollector(fleet))
        app = web.Application()
        app.add_routes([
            web.get("/live", self._health), web.get("/health", self._health), web.get("/metrics", self._metrics),
            web.post("/mock/kill", self._kill), web.post("/mock/release", self._release),
            web.post("/engine/drain", self._drain), web.post("/clear_kv_blocks", self._clear),
        ])
        self._site = AdminSite(app)

    async def start(self, host: str, port: int) -> int:
        """Listens; returns the port. Raises ConfigError when it is taken."""
        return await self._site.start(host, port, "choose another --admin-port, 0 for any")

    async def stop(self) -> None:
        """Closes the server."""
        await self._site.stop()

    async def _health(self, _: web.Request) -> web.Response:
        states = {worker.name: "dead" if worker.dead.is_set() else str(worker.state) for worker in self._fleet}
        ready = all(state == WorkerState.READY for state in states.values())
        return web.json_response({"status": "ready" if ready else "degraded", "workers": states}, status=200 if ready else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": METRICS_TYPE})

    async def _kill(self, request: web.Request) -> web.Response:
        worker = self._named(request)
        await worker.kill()
        return web.json_response({"killed": worker.name})

    async def _drain(self, request: web.Request) -> web.Response:
        worker = self._named(request)
        await self._fleet.drain(worker)
        return web.json_response({"draining": worker.name})

    async def _clear(self, request: web.Request) -> web.Response:
        worker = self._named(request)
        cleared = worker.engine.clear_cache()
        worker.wake()
        return web.json_response({"cleared": cleared}, status=200 if cleared else 409)

    async def _release(self, request: web.Request) -> web.Response:
        try:
            asked = msgspec.json.decode(await request.read(), type=Release)
        except msgspec.DecodeError as exc:
            raise _bad_request(f'send {{"engine_id": "...", "request_id": "..."}}: {exc}') from exc
        return web.json_response({"released": self._fleet.release_here(asked.engine_id, asked.request_id)})

    def _named(self, request: web.Request) -> MockWorker:
        try:
            return self._fleet.at(int(request.query.get("worker", "0")))
        except (ValueError, RequestError) as exc:
            raise _bad_request(f"?worker= must be a worker's number ({exc})") from exc


class _FleetCollector(Collector):
    """Reads the engines when Prometheus asks."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        """All metrics, one sample per living worker."""
        yield from self._families(GaugeMetricFamily, _GAUGES)
        yield from self._families(CounterMetricFamily, _COUNTERS)

    def _families(self, kind: type[_Family], readers: dict[str, Callable[[MockWorker], float]]) -> Iterator[_Family]:
        for name, read in readers.items():
            family = kind(name, f"{name} of a mock worker", labels=["model_name"])
            for worker in self._fleet:
                if not worker.dead.is_set():
                    family.add_metric([worker.name], read(worker))
            yield family


def _bad_request(message: str) -> web.HTTPBadRequest:
    return web.HTTPBadRequest(text=json.dumps({"error": message}), content_type="application/json")
