# SPDX-License-Identifier: Apache-2.0
"""The router's Prometheus metrics, in one place. Edge module: the only one of the router that knows prometheus_client."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import Metric

from tandem_protocol import tensors
from tandem_protocol.streams import Arrays
from tandem_protocol.tallies import SECONDS, TOKENS, TallyHistogram
from tandem_router.meters import RequestTallies
from tandem_router.placement import Decision

_TIERS = ("gpu", "cpu", "storage")
_PARTS = ("match", "choice", "books")
_DECISION_BUCKETS = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 0.1, 1.0)
_PROMPT_BUCKETS = (*_DECISION_BUCKETS, 10.0)
Families = Iterable[Metric]


class RouterMetrics:
    """What one router counts. Not thread-safe beyond prometheus_client's own locks."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._decisions = self._counter("decisions", "Placements by role.", "role")
        self._latency = self._histogram("decision_seconds", "Time of one placement, all its parts.", _DECISION_BUCKETS, "role")
        parts = self._histogram("decision_part_seconds", "Time of a part of a placement: match (the index, and beliefs), choice (who may, "
                                "loads, cost and choice), books.", _DECISION_BUCKETS, "part")
        self._parts = tuple(parts.labels(part) for part in _PARTS)
        self._tokenize = self._histogram("tokenize_seconds", "Time to tokenize a prompt.", _PROMPT_BUCKETS).labels()
        self._hashing = self._histogram("hashing_seconds", "Time to hash a prompt's blocks.", _PROMPT_BUCKETS).labels()
        self._of_requests = self._request_histograms()
        self._hits = self._counter("hit_blocks", "Prefix blocks that the chosen worker was known to hold.", "tier")
        self._predicted = self._counter("predicted_cached_tokens", "Tokens that the index said were cached, of requests whose worker told.")
        self._actual = self._counter("actual_cached_tokens", "Tokens that the worker said were cached.")
        self._migrations = self._counter("model_migration", "Requests that moved to another worker.", "migration_type")
        self._fallbacks = self._counter("prefill_fallbacks", "Remote prefills that failed, so that the decode worker prefilled.")
        self._unpaired = self._counter("unpaired_prefills", "Requests whose decode worker speculates as no prefill worker does, so that it "
                                       "prefilled.")
        self._encode_fallbacks = self._counter("encode_fallbacks", "Requests whose images no encode worker could encode.")
        self._snapshots = self._counter("snapshots", "Snapshots of the index, by outcome.", "outcome")
        self._requests = self._counter("requests", "Requests that ended, by outcome.", "outcome")
        self._active = Gauge("tandem_router_active_requests", "Requests in flight.", registry=self._registry)
        self._queued = Gauge("tandem_router_queued_requests", "Requests in flight that no token has come of yet.", ["model"],
                             registry=self._registry)
        by_worker = ["worker", "what"]
        self._feed = Gauge("tandem_router_feed", "KV-event feed: counts since its start.", by_worker, registry=self._registry)
        self._replica = Gauge("tandem_router_replica", "Other routers, as heard of.", ["replica", "what"], registry=self._registry)
        self._load = Gauge("tandem_router_worker_load", "Load in the router's books.", by_worker, registry=self._registry)

        for kind in ("new_request", "ongoing_request"):  # rates of what never happened are 0, not unknown
            self._migrations.labels(kind)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"tandem_router_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...], *labels: str) -> TallyHistogram:
        return TallyHistogram(f"tandem_router_{name}", text, labels, bounds, self._registry)

    def _request_histograms(self) -> tuple[TallyHistogram, ...]:
        """In the order of RequestTallies."""
        return (
            self._histogram("time_to_first_token_seconds", "From taking a streamed request to its first token.", SECONDS, "model"),
            self._histogram("inter_token_latency_seconds", "Between two tokens of a stream; tokens of one response share its gap.",
                            SECONDS, "model"),
            self._histogram("request_duration_seconds", "From taking a request to its end, if it got any token.", SECONDS, "model"),
            self._histogram("input_sequence_tokens", "Prompt tokens of a request.", TOKENS, "model"),
            self._histogram("output_sequence_tokens", "Generated tokens of a request, over all its sequences.", TOKENS, "model"),
            self._histogram("cached_tokens", "Prompt tokens that were cached: as the worker says where the client asked, else as the index "
                            "said.", TOKENS, "model"),
        )

    def tallies_of(self, model: str) -> RequestTallies:
        """The histograms that requests of this model are measured in."""
        return RequestTallies(*(histogram.labels(model) for histogram in self._of_requests))

    def decided(self, seconds: float, decision: Decision) -> None:
        """One placement."""
        self._decisions.labels(decision.worker.role).inc()
        self._latency.labels(str(decision.worker.role)).observe(seconds)
        for tally, part_s in zip(self._parts, decision.timing, strict=True):
            tally.observe(part_s)
        for tier, blocks in zip(_TIERS, decision.overlap, strict=True):
            self._hits.labels(tier).inc(int(blocks))

    def prepared(self, tokenizing_s: float, hashing_s: float) -> None:
        """One prompt."""
        self._tokenize.observe(tokenizing_s)
        self._hashing.observe(hashing_s)

    def first_token(self, decision: Decision, arrays: Arrays) -> None:
        """Compares the index with what the worker says, where the client asked for that."""
        cached = arrays.get(tensors.NUM_CACHED_TOKENS)
        if cached is not None:
            self._predicted.inc(decision.cached_tokens)
            self._actual.inc(int(cached[0]))

    def migrated(self, kind: str) -> None:
        """`new_request` before the first token, `ongoing_request` after it."""
        self._migrations.labels(kind).inc()

    def prefill_fell_back(self) -> None:
        """One remote prefill failed."""
        self._fallbacks.inc()

    def found_unpaired(self) -> None:
        """One request whose decode worker fits no prefill worker."""
        self._unpaired.inc()

    def encode_fell_back(self) -> None:
        """Images that no encode worker encoded."""
        self._encode_fallbacks.inc()

    def snapshot(self, outcome: str) -> None:
        """`restored`, `refused` or `absent` at the start, then `saved` or `failed`."""
        self._snapshots.labels(outcome).inc()

    def ended(self, outcome: str) -> None:
        """One request is over."""
        self._requests.labels(outcome).inc()

    def in_flight(self, model: str, active: int, queued: int) -> None:
        """Sets what is in flight, at each scrape."""
        self._active.set(active)
        if model:
            self._queued.labels(model).set(queued)

    def gauges(self, loads: Iterable[tuple[str, str, float]], feed: Iterable[tuple[str, str, float]]) -> None:
        """Sets what is read off the router at each scrape; workers that left disappear."""
        self._load.clear()
        self._feed.clear()
        for worker, what, value in loads:
            self._load.labels(worker, what).set(value)
        for worker, what, value in feed:
            self._feed.labels(worker, what).set(value)

    def replicas(self, figures: Iterable[tuple[str, str, float]]) -> None:
        """Sets what is read off the replicas at each scrape; those that left disappear."""
        self._replica.clear()
        for replica, what, value in figures:
            self._replica.labels(replica, what).set(value)

    def families(self) -> Families:
        """Every metric; gauges as of the latest scrape."""
        return self._registry.collect()

    def exposition(self) -> bytes:
        """The text format."""
        return generate_latest(self._registry)
