# SPDX-License-Identifier: Apache-2.0
"""The planner's own Prometheus metrics: Dynamo's gauges with our prefix, and what went wrong. Edge module: knows prometheus_client."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from tandem_planner.terms import Decision, Observation, Pool, Traffic
from tandem_protocol.roles import Role

FAILURES = ("connector", "observation", "decision", "state")
_OBSERVED: dict[str, tuple[str, Callable[[Traffic], float]]] = {
    "observed_ttft": ("Mean time to the first token of the last interval, in ms", lambda traffic: traffic.ttft.mean * 1e3),
    "observed_itl": ("Mean time between tokens of the last interval, in ms", lambda traffic: traffic.itl.mean * 1e3),
    "observed_request_rate": ("Requests per second of the last interval", lambda traffic: traffic.requests / traffic.interval_s),
    "observed_request_duration": ("Mean duration of a request, in s", lambda traffic: traffic.request_s),
    "observed_isl": ("Mean prompt tokens", lambda traffic: traffic.isl),
    "observed_osl": ("Mean generated tokens", lambda traffic: traffic.osl),
}
_PREDICTED = {
    "predicted_requests_per_s": ("predicted_request_rate", "Requests per second that are foreseen"),
    "predicted_isl": ("predicted_isl", "Prompt tokens that are foreseen"),
    "predicted_osl": ("predicted_osl", "Generated tokens that are foreseen"),
}
"""Term of a decision -> gauge. A decision between two plans has none of them; the gauges keep the last."""
_NUMBERS = {Role.PREFILL: "p", Role.DECODE: "d", Role.AGGREGATED: "agg", Role.ENCODE: "e"}


class PlannerMetrics:
    """What one planner counts. A figure that was never known has no sample."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._workers = self._gauge("workers", "Workers: ready, wanted (as the connector was told), target (as decided).", "role", "what")
        self._terms = self._gauge("term", "The terms of the last decision, by name.", "term", "role")
        self._missing = self._gauge("missing", "What the last look could not read, in number.")
        self._known = self._gauge("traffic_known", "1 if the last look at the traffic gave figures.")
        self._hours = self._gauge("gpu_hours", "GPU hours of ready workers since the first start.")
        self._looks = self._counter("looks", "Looks at the fleet.")
        self._failures = self._counter("failures", "What could not be done, by what it was.", "what")
        self._changes = self._counter("changes", "Changes of a pool, by how they ended.", "role", "outcome")
        for what in FAILURES:
            self._failures.labels(what)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"tandem_planner_{name}", text, labels, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"tandem_planner_{name}", text, labels, registry=self._registry)

    def _set(self, name: str, text: str, value: float) -> None:
        """A gauge that appears when it has its first value."""
        if name not in self._gauges:
            self._gauges[name] = self._gauge(name, text)
        self._gauges[name].set(value)

    def looked(self, observation: Observation, *, at_traffic: bool) -> None:
        """One look."""
        self._looks.inc()
        self._missing.set(len(observation.missing))
        for role, pool in observation.pools.items():
            self._pool(role, pool)
        if at_traffic:
            self._known.set(observation.traffic is not None)
            self._traffic(observation.traffic)

    def _pool(self, role: Role, pool: Pool) -> None:
        self._workers.labels(role, "ready").set(pool.ready)
        self._workers.labels(role, "wanted").set(pool.wanted)
        self._set(f"num_{_NUMBERS[role]}_workers", f"Ready {role} workers", pool.ready)

    def _traffic(self, traffic: Traffic | None) -> None:
        if traffic is not None:
            for name, (text, read) in _OBSERVED.items():
                self._set(name, text, read(traffic))

    def decided(self, decision: Decision) -> None:
        """One decision and its terms."""
        for role, count in decision.target.items():
            self._workers.labels(role, "target").set(count)
            self._set(f"predicted_num_{_NUMBERS[role]}", f"{role} workers as decided", count)
        self._terms.clear()
        for term in decision.terms:
            self._terms.labels(term.name, term.role or "").set(term.value)
            if term.name == "correction" and term.role is not None:
                self._set(f"{_NUMBERS[term.role]}_correction_factor", f"Observed over modelled latency, {term.role}", term.value)
            elif term.name in _PREDICTED:
                self._set(*_PREDICTED[term.name], term.value)

    def gpu_hours(self, hours: float) -> None:
        """Since the first start."""
        self._hours.set(hours)

    def failed(self, what: str) -> None:
        """One of `FAILURES`."""
        self._failures.labels(what).inc()

    def changed(self, role: Role, outcome: str) -> None:
        """A change of a pool ended."""
        self._changes.labels(role, outcome).inc()

    def exposition(self) -> bytes:
        """The text format."""
        return generate_latest(self._registry)


def gpus_of(pools: Mapping[Role, Pool], per_engine: Mapping[Role, int]) -> int:
    """GPUs of ready workers."""
    return sum(pool.ready * per_engine.get(role, 0) for role, pool in pools.items())
