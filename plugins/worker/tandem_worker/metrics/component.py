# SPDX-License-Identifier: Apache-2.0
"""A worker's own metrics: Dynamo's component and work-handler metrics by their names, and the times of its requests.

The registry is the worker's own, so that nothing of it can collide with what vLLM or a connector registers.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tandem_protocol.requests import GenerationRequest
from tandem_protocol.streams import Outbox, ResponseStream, Sink
from tandem_protocol.tallies import SECONDS, Tally, TallyHistogram
from tandem_worker.metrics.meters import MeteredStream, WorkerTallies, WorkTotals
from tandem_worker.status import WorkerStatus

_PREFIX = "dynamo_component"


@dataclass(frozen=True)
class RankFigures:
    """One data-parallel rank of the engine."""

    rank: int
    total_blocks: int
    kv_usage: float
    """Used share of its KV blocks, 0 to 1."""
    accept_length: float | None = None
    """Tokens per guess of speculative decoding, of late; None before the first."""


@dataclass(frozen=True)
class EngineFigures:
    """The worker as it is now."""

    in_flight: int
    load_time_s: float
    ranks: tuple[RankFigures, ...]


class Loads(Protocol):
    """What is read of the engine's load."""

    @property
    def by_rank(self) -> Mapping[int, Any]:
        """Figures of each rank, among them `kv_usage` and `acceptance`."""


class Host(Protocol):
    """What is read of the engine host."""

    generator: Any

    def status(self) -> WorkerStatus:
        """A snapshot."""


def engine_figures(host: Host, load_time_s: float) -> EngineFigures:
    """As they are now; vLLM counts the blocks of all ranks, which have equally many."""
    loads: Loads = host.generator.loads
    ranks = loads.by_rank
    blocks = int(host.generator.engine.vllm_config.cache_config.num_gpu_blocks or 0) // len(ranks)
    figures = tuple(RankFigures(rank, blocks, load.kv_usage, load.acceptance.length) for rank, load in ranks.items())
    return EngineFigures(host.status().active, load_time_s, figures)


class WorkerMetrics:
    """What one worker counts; made before its engine, which is told of by `follow`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._started = time.monotonic()
        self._figures: Callable[[], EngineFigures] | None = None
        duration = "From taking a request to its end, however it ended."
        self.totals = WorkTotals(WorkerTallies(
            self._histogram("tandem_worker_time_to_first_token_seconds", "From taking a request to its first token."),
            self._histogram("tandem_worker_inter_token_latency_seconds", "Between two tokens; tokens of one output share its gap."),
            self._histogram("tandem_worker_queue_seconds", "From taking a request until the engine scheduled it."),
            self._histogram(f"{_PREFIX}_request_duration_seconds", duration),
        ))  # fmt: skip
        self.registry.register(_Component(self))

    def _histogram(self, name: str, text: str) -> Tally:
        return TallyHistogram(name, text, (), SECONDS, self.registry).labels()

    def stream(self, request: GenerationRequest, sink: Sink, outbox: Outbox) -> ResponseStream:
        """The responses of a request that was just taken."""
        return MeteredStream(request, sink, outbox, self.totals)

    def follow(self, figures: Callable[[], EngineFigures]) -> None:
        """Asks for the engine's figures at each scrape from now on."""
        self._figures = figures

    @property
    def figures(self) -> EngineFigures | None:
        """The engine's figures; None while there is no engine."""
        return self._figures() if self._figures is not None else None

    @property
    def uptime_s(self) -> float:
        """Since the worker began to start."""
        return time.monotonic() - self._started


class _Component(Collector):
    """Reads the totals and the engine when Prometheus asks."""

    def __init__(self, metrics: WorkerMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """Counters always, gauges of the engine once it is there."""
        totals = self._metrics.totals
        yield _counter("requests", "Requests that ended.", totals.requests)
        yield _counter("request_bytes", "Bytes of prompts and images taken.", totals.request_bytes)
        yield _counter("response_bytes", "Bytes of output tensors handed to Triton.", totals.response_bytes)
        errors = CounterMetricFamily(f"{_PREFIX}_errors", "Requests that ended with an error, by its code.", labels=["error_type"])
        for code, count in tuple(totals.errors.items()):
            errors.add_metric([code], count)
        yield errors
        yield GaugeMetricFamily(f"{_PREFIX}_uptime_seconds", "Since the worker began to start.", value=self._metrics.uptime_s)
        figures = self._metrics.figures
        if figures is not None:
            yield from _engine(figures)


def _engine(figures: EngineFigures) -> Iterable[Metric]:
    yield GaugeMetricFamily(f"{_PREFIX}_inflight_requests", "Requests taken and not ended.", value=figures.in_flight)
    yield GaugeMetricFamily(f"{_PREFIX}_model_load_time_seconds", "How long the engine took to start.", value=figures.load_time_s)
    total = GaugeMetricFamily(f"{_PREFIX}_total_blocks", "KV blocks of a data-parallel rank.", labels=["dp_rank"])
    usage = GaugeMetricFamily(f"{_PREFIX}_gpu_cache_usage_percent", "Used share of a rank's KV blocks, 0 to 1.", labels=["dp_rank"])
    for rank in figures.ranks:
        total.add_metric([str(rank.rank)], rank.total_blocks)
        usage.add_metric([str(rank.rank)], rank.kv_usage)
    yield total
    yield usage
    yield from _accept_lengths(figures)


def _accept_lengths(figures: EngineFigures) -> Iterable[Metric]:
    lengths = GaugeMetricFamily("tandem_worker_accept_length", "Tokens per guess of speculative decoding, with the one of the target.",
                                labels=["dp_rank"])
    for rank in figures.ranks:
        if rank.accept_length is not None:
            lengths.add_metric([str(rank.rank)], rank.accept_length)
    if lengths.samples:
        yield lengths


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"{_PREFIX}_{name}", text, value=value)
