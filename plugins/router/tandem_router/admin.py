# SPDX-License-Identifier: Apache-2.0
"""The admin server of one router: `/live`, `/health`, `/metrics`, `/fleet`, `GET|POST /busy_threshold`, and
`POST /clear_kv_blocks`, which empties the prefix caches of all workers.

It runs on the router's event loop and listens on loopback by default.
"""

import asyncio
import dataclasses
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, Protocol

import msgspec
from aiohttp import web

from tandem_protocol.admin_site import METRICS_TYPE, AdminSite, bad_request, json_object
from tandem_protocol.errors import ConfigError
from tandem_router.busy import BusyThresholds
from tandem_router.clearing import clear_fleet
from tandem_router.feed import EventFeed
from tandem_router.fleet import Fleet
from tandem_router.index import KvIndex
from tandem_router.metrics import RouterMetrics
from tandem_router.replicas import Sharing

log = logging.getLogger(__name__)

_MAX_BODY = 64 * 1024
_LOADS = ("active_requests", "active_prefill_tokens", "active_blocks", "total_blocks")
_FEED_COUNTS = ("batches", "blocks", "duplicates", "gaps", "replays", "unanswered", "resyncs", "restarts", "malformed", "overflows", "lost")


class Served(Protocol):
    """What the admin server shows of a router."""

    name: str
    fleet: Fleet
    replicas: Sharing
    feed: EventFeed | None
    index: KvIndex
    metrics: RouterMetrics

    @property
    def active_requests(self) -> int:
        """Requests in flight."""

    @property
    def queued_requests(self) -> int:
        """Of these, those that no token has come of yet."""

    @property
    def prepared(self) -> bool:
        """Whether the tokenizer is there."""


class AdminServer:
    """Serves the admin routes of one router."""

    def __init__(self, router: Served) -> None:
        self._router = router
        self._site = AdminSite(self._application())

    async def start(self, address: str, port: int) -> None:
        """Listens. Raises ConfigError when the port is taken."""
        await self._site.start(address, port, "set TANDEM_ROUTER_ADMIN_PORT to a free one")

    async def stop(self) -> None:
        """Closes the server."""
        await self._site.stop()

    def _application(self) -> web.Application:
        app = web.Application(client_max_size=_MAX_BODY)
        app.add_routes([
            web.get("/live", self._live),
            web.get("/health", self._health),
            web.get("/metrics", self._metrics),
            web.get("/fleet", self._fleet),
            web.get("/busy_threshold", self._thresholds),
            web.post("/busy_threshold", self._set_thresholds),
            web.post("/clear_kv_blocks", self._clear_kv_blocks),
        ])
        return app

    async def _live(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ready"})

    async def _health(self, _: web.Request) -> web.Response:
        report = fleet_report(self._router)
        return web.json_response(report, status=200 if report["ready"] else 503)

    async def _fleet(self, _: web.Request) -> web.Response:
        return web.json_response(fleet_report(self._router))

    async def _metrics(self, _: web.Request) -> web.Response:
        read_gauges(self._router)
        body = await asyncio.to_thread(self._router.metrics.exposition)
        return web.Response(body=body, headers={"Content-Type": METRICS_TYPE})

    async def _thresholds(self, _: web.Request) -> web.Response:
        return web.json_response(dataclasses.asdict(self._router.fleet.generating.thresholds))

    async def _set_thresholds(self, request: web.Request) -> web.Response:
        try:
            thresholds = BusyThresholds(**await request.json())
        except (ValueError, TypeError, ConfigError) as exc:
            known = ", ".join(field.name for field in dataclasses.fields(BusyThresholds))
            message = f"{exc}: send a JSON object of {known}, null for no limit"
            raise web.HTTPBadRequest(text=json.dumps({"error": message}), content_type="application/json") from exc
        for pool in self._router.fleet.pools.values():
            pool.thresholds = thresholds
        log.info("router.thresholds %s", thresholds)
        return web.json_response(dataclasses.asdict(thresholds))

    async def _clear_kv_blocks(self, request: web.Request) -> web.Response:
        force = (await json_object(request)).get("force", False)
        if not isinstance(force, bool):
            raise bad_request("force must be true or false")
        answers = await clear_fleet([record for record, _ in self._router.fleet.members], force=force)
        done = all(answer.cleared for answer in answers)
        body = {"status": "success" if done else "error", "workers": [dataclasses.asdict(answer) for answer in answers]}
        return web.json_response(body, status=200 if done else 502)


def read_gauges(router: Served) -> None:
    """Brings the metrics that are not counted up to date. On the router's event loop."""
    router.metrics.in_flight(router.fleet.model, router.active_requests, router.queued_requests)
    router.metrics.gauges(_loads(router.fleet), _feed_counts(router.feed))
    router.metrics.replicas(_replica_figures(router))


def fleet_report(router: Served) -> dict[str, Any]:
    """Every worker of the model, its load and index, why placement leaves it out; and the other routers."""
    loads, blocks = _load_by_worker(router.fleet), _blocks_by_worker(router.index)
    workers = [
        {"id": record.id, "role": record.role, "state": record.state, "grpc_url": record.grpc_url, "triton_model": record.triton_model,
         "admin_url": record.admin_url, "loras": list(record.loras), "placed": not reason, "reason": reason,
         "index_blocks": blocks[record.id], **loads[record.id]}
        for record, reason in router.fleet.members
    ]
    ready = router.prepared and bool(router.fleet.generating.workers)
    return {"router": router.name, "ready": ready, "model": router.fleet.model, "active": router.active_requests, "workers": workers,
            "replicas": [msgspec.structs.asdict(state) for state in router.replicas.states()]}


def _load_by_worker(fleet: Fleet) -> defaultdict[str, dict[str, float]]:
    """Worker id -> its load in the books, over all ranks."""
    loads: defaultdict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(_LOADS, 0))
    for pool in fleet.pools.values():
        for load in pool.loads():
            for name in _LOADS:
                loads[load.worker_id][name] += getattr(load, name)
    return loads


def _blocks_by_worker(index: KvIndex) -> Counter[str]:
    """Worker id -> blocks that the index knows it to hold, over all ranks."""
    blocks: Counter[str] = Counter()
    for info in index.slots():
        blocks[info.name] += info.blocks
    return blocks


def _replica_figures(router: Served) -> Iterator[tuple[str, str, float]]:
    for state in router.replicas.states():
        for what, value in msgspec.structs.asdict(state).items():
            if what != "id":
                yield state.id, what, float(value)
    for role, pool in router.fleet.pools.items():
        yield role, "misses_unknown", pool.books.misses.unknown
        yield role, "misses_duplicate", pool.books.misses.duplicate


def _loads(fleet: Fleet) -> Iterator[tuple[str, str, float]]:
    for pool in fleet.pools.values():
        for load in pool.loads():
            name = f"{load.worker_id}/{load.dp_rank}"
            yield name, "active_requests", load.active_requests
            yield name, "active_prefill_tokens", load.active_prefill_tokens
            yield name, "active_blocks", load.active_blocks
            yield name, "busy", float(load.busy)


def _feed_counts(feed: EventFeed | None) -> Iterator[tuple[str, str, float]]:
    for state in feed.state() if feed is not None else ():
        name = f"{state.worker_id}/{state.dp_rank}"
        yield name, "synced", float(state.synced)
        yield name, "lag_s", state.lag_s
        for count in _FEED_COUNTS:
            yield name, count, float(getattr(state, count))
