# SPDX-License-Identifier: Apache-2.0
"""What the planner sees: the traffic of an interval and the load of each worker, out of Prometheus and discovery.

What is missing, stale or not finite is absent, with a sentence that says so: it never becomes a number. `read_traffic` and `read_loads` are
pure; `Observer` asks.
"""

import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from tandem_planner import queries
from tandem_planner.prometheus import Asks, Sample, ask_all, only_value
from tandem_planner.queries import PERCENTILES, Source, TrafficQueries
from tandem_planner.terms import Latency, Observation, Pool, Traffic, WorkerLoad
from tandem_protocol.errors import UnavailableError
from tandem_protocol.roles import Role
from tandem_protocol.workers import WorkerRecord, WorkerState

Answers = Mapping[str, tuple[Sample, ...]]
Records = Callable[[], Awaitable[tuple[WorkerRecord, ...]]]
_FIGURES = ("isl", "osl", "request_s", *(f"{what}_{part}" for what in ("ttft", "itl") for part in ("mean", *PERCENTILES)))
_LOAD_QUERIES = {"kv": queries.KV_USE, "waiting": queries.WAITING, "age": queries.WORKER_AGE}
_ROUTER_QUERIES = {"prefill": queries.PREFILL_TOKENS, "active": queries.ACTIVE_REQUESTS, "router_age": queries.ROUTER_AGE}


@dataclass(frozen=True)
class Seen:
    """The traffic, or why there is none; no reason for an interval without a request."""

    traffic: Traffic | None
    missing: tuple[str, ...] = ()


def read_traffic(answers: Answers, interval_s: float) -> Seen:
    """The figures of one interval, from the answers to `TrafficQueries.over`."""
    values = {name: only_value(samples) for name, samples in answers.items()}
    requests, age = values[queries.REQUESTS], values[queries.AGE]
    if requests is None or age is None:
        return Seen(None, ("no metrics of requests: is Prometheus scraping the routers, and is the model's name right?",))
    if age > interval_s:
        return Seen(None, (f"the metrics of requests are {age:.0f} s old, and the interval is {interval_s:g} s",))
    if requests < 1:
        return Seen(None)
    lacking = [name for name in _FIGURES if (value := values[name]) is None or value < 0]
    if lacking:
        return Seen(None, (f"no finite figure for {', '.join(lacking)}",))
    return _traffic({name: value for name, value in values.items() if value is not None}, interval_s)


def _traffic(values: Mapping[str, float], interval_s: float) -> Seen:
    cached = values.get(queries.CACHED_FRACTION)
    traffic = Traffic(
        interval_s=interval_s, requests=values[queries.REQUESTS], isl=values["isl"], osl=values["osl"], ttft=_latency(values, "ttft"),
        itl=_latency(values, "itl"), request_s=values["request_s"], cached_fraction=min(1.0, max(0.0, cached or 0.0)),
    )
    return Seen(traffic, () if cached is not None else ("cached tokens are not known: every prompt counts as computed in full",))


def _latency(values: Mapping[str, float], name: str) -> Latency:
    return Latency(mean=values[f"{name}_mean"], **{part: values[f"{name}_{part}"] for part in PERCENTILES})


@dataclass(frozen=True)
class WorkerFigures:
    """What Prometheus knows of all workers: of each series the labels that say whose it is, and the value."""

    answers: Answers
    max_age_s: float
    needs_router: bool

    def load(self, record: WorkerRecord, neighbours: int) -> WorkerLoad | None:
        """One worker's, or None unless all of it is there, fresh and finite. `neighbours`: workers behind the same admin port."""
        mine = {name: self._find(name, record, neighbours) for name in _LOAD_QUERIES}
        kv, waiting, age = mine["kv"], mine["waiting"], mine["age"]
        if kv is None or waiting is None or age is None or age > self.max_age_s or not 0 <= kv <= 1 or waiting < 0:
            return None
        prefill, active = (self._of_router(name, record) for name in ("prefill", "active"))
        if self.needs_router and (prefill is None or (active is None and record.role is Role.ENCODE)):
            return None
        return WorkerLoad(record.id, waiting, prefill or 0.0, kv, active or 0.0)

    def _find(self, name: str, record: WorkerRecord, neighbours: int) -> float | None:
        instance = urlsplit(record.admin_url).netloc
        found = [sample for sample in self.answers[name] if sample.labels.get("instance") == instance]
        if neighbours > 1:
            found = [sample for sample in found if sample.labels.get("model_name") == record.triton_model]
        return only_value(tuple(found))

    def _of_router(self, name: str, record: WorkerRecord) -> float | None:
        """Over all ranks."""
        found, ages = (self._ranks(query, record) for query in (name, "router_age"))
        if not found or not all(math.isfinite(value) and value >= 0 for value in found) or max(ages, default=math.inf) > self.max_age_s:
            return None
        return sum(found)

    def _ranks(self, name: str, record: WorkerRecord) -> list[float]:
        return [sample.value for sample in self.answers.get(name, ()) if sample.labels.get("worker", "").rpartition("/")[0] == record.id]


def read_loads(records: Iterable[WorkerRecord], figures: WorkerFigures) -> tuple[dict[Role, tuple[WorkerLoad, ...]], tuple[str, ...]]:
    """Role -> loads of its ready workers; and a sentence about each that could not be read. Those of pipelines are in nobody's pool."""
    ready = [record for record in records if record.state is WorkerState.READY and record.role is not Role.OMNI]
    behind = [record.admin_url for record in ready]
    loads: dict[Role, tuple[WorkerLoad, ...]] = {}
    missing = []
    for record in ready:
        load = figures.load(record, behind.count(record.admin_url)) if record.admin_url else None
        if load is None:
            missing.append(f"no fresh metrics of worker {record.id} ({record.role}): is {record.admin_url or 'its admin port'} scraped?")
        else:
            loads[record.role] = (*loads.get(record.role, ()), load)
    return loads, tuple(missing)


class Observer:
    """Looks once at a time. Nothing here raises for what could not be read."""

    def __init__(self, prometheus: Asks, traffic: TrafficQueries, records: Records | None, max_age_s: float,
                 clock: Callable[[], float]) -> None:
        """`records` lists the workers in discovery, None without one; `clock` tells Unix time."""
        self._prometheus = prometheus
        self._queries = traffic
        self._records = records
        self._max_age_s = max_age_s
        self._clock = clock

    async def observe(self, pools: Mapping[Role, Pool], interval_s: float | None) -> Observation:
        """The load of the pools now, and the traffic of the last `interval_s` seconds unless that is None."""
        loads, missing = await self._loads()
        seen = Seen(None) if interval_s is None else await self._traffic(interval_s)
        seen_pools = {role: replace(pool, loads=loads.get(role, ())) for role, pool in pools.items()}
        return Observation(at_s=self._clock(), pools=seen_pools, traffic=seen.traffic, missing=(*seen.missing, *missing))

    async def _traffic(self, interval_s: float) -> Seen:
        try:
            return read_traffic(await ask_all(self._prometheus, self._queries.over(interval_s)), interval_s)
        except UnavailableError as exc:
            return Seen(None, (str(exc),))

    async def _loads(self) -> tuple[dict[Role, tuple[WorkerLoad, ...]], tuple[str, ...]]:
        if self._records is None:
            return {}, ("no worker's load is known without TANDEM_DISCOVERY",)
        needs_router = self._queries.source is Source.ROUTER
        try:
            records = await self._records()
            asked = {**_LOAD_QUERIES, **(_ROUTER_QUERIES if needs_router else {})}
            return read_loads(records, WorkerFigures(await ask_all(self._prometheus, asked), self._max_age_s, needs_router))
        except UnavailableError as exc:
            return {}, (f"no worker's load is known: {exc}",)
