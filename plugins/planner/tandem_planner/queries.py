# SPDX-License-Identifier: Apache-2.0
"""Every PromQL expression of the planner, in one place. Pure text.

Requests are those that arrived (`_arrivals`). Means are `increase(sum) / increase(count)` over the interval, as the reference planner has
them; percentiles are of the same histograms. All routers of a model are summed before anything is divided. Each ratio is one expression,
since two queries are answered at two instants.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

KV_USE = 'max by (instance, model_name) (vllm:kv_cache_usage_perc{triton_instance=""})'
"""Of a worker's fullest engine core: 0 to 1. Series with a `triton_instance` are those of Triton's port, which shows the same again."""
WAITING = 'sum by (instance, model_name) (vllm:num_requests_waiting{triton_instance=""})'
WORKER_AGE = 'time() - min by (instance, model_name) (timestamp(vllm:kv_cache_usage_perc{triton_instance=""}))'
"""Seconds since a worker was scraped, of its oldest series."""
PREFILL_TOKENS = 'max by (worker) (tandem_router_worker_load{what="active_prefill_tokens"})'
"""By `worker id/rank`. Routers that share their books show the same load, so that a sum would count it twice."""
ACTIVE_REQUESTS = 'max by (worker) (tandem_router_worker_load{what="active_requests"})'
"""Likewise: requests that routers have on a worker."""
ROUTER_AGE = "time() - max by (worker) (timestamp(tandem_router_worker_load))"
PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
REQUESTS, AGE, CACHED_FRACTION = "requests", "age", "cached_fraction"


class Source(StrEnum):
    """Whose metrics tell of the traffic."""

    ROUTER = "router"
    DYNAMO = "dynamo"


@dataclass(frozen=True)
class TrafficQueries:
    """What to ask about the traffic of one model."""

    source: Source = Source.ROUTER
    model: str = ""
    """Compared in any case; empty for all."""
    namespace: str = ""
    """`dynamo_namespace`, for that source only; empty for all."""

    def over(self, interval_s: float) -> Mapping[str, str]:
        """Figure -> expression, over the last `interval_s` seconds. Times are in seconds, lengths in tokens."""
        window = f"{round(interval_s * 1000)}ms"
        return {
            REQUESTS: self._arrivals(window),
            AGE: f"time() - max(timestamp({self._metric('request_duration_seconds_count')}))",
            "isl": self._mean("input_sequence_tokens", window),
            "osl": self._mean("output_sequence_tokens", window),
            "request_s": self._mean("request_duration_seconds", window),
            CACHED_FRACTION: f"{self._increase('cached_tokens_sum', window)} / {self._increase('input_sequence_tokens_sum', window)}",
            **self._latency("ttft", "time_to_first_token_seconds", window),
            **self._latency("itl", "inter_token_latency_seconds", window),
        }

    def _arrivals(self, window: str) -> str:
        """Of the router: requests that got their first token, and how many more wait for theirs than before.

        Those that ended are late, by a queue even: a burst would show when it is over, and its backlog as traffic. Dynamo's are counted as
        the reference does, by their end.
        """
        if self.source is Source.DYNAMO:
            return self._increase("request_duration_seconds_count", window)
        waiting = f"sum(delta({self._metric('queued_requests')}[{window}]))"
        return f"{self._increase('input_sequence_tokens_count', window)} + ({waiting} or vector(0))"

    def _latency(self, name: str, histogram: str, window: str) -> dict[str, str]:
        buckets = f"sum by (le) (increase({self._metric(f'{histogram}_bucket')}[{window}]))"
        quantiles = {f"{name}_{label}": f"histogram_quantile({share}, {buckets})" for label, share in PERCENTILES.items()}
        return {f"{name}_mean": self._mean(histogram, window), **quantiles}

    def _mean(self, histogram: str, window: str) -> str:
        return f"{self._increase(f'{histogram}_sum', window)} / {self._increase(f'{histogram}_count', window)}"

    def _increase(self, name: str, window: str) -> str:
        return f"sum(increase({self._metric(name)}[{window}]))"

    def _metric(self, name: str) -> str:
        prefix = "tandem_router" if self.source is Source.ROUTER else "dynamo_frontend"
        return f"{prefix}_{name}{self._labels()}"

    def _labels(self) -> str:
        labels = [f'model=~"(?i){escaped(self.model)}"'] if self.model else []
        if self.source is Source.DYNAMO and self.namespace:
            labels.append(f'dynamo_namespace="{self.namespace}"')
        return "{" + ",".join(labels) + "}" if labels else ""


def escaped(name: str) -> str:
    """A name as a literal within a regular expression within a PromQL string."""
    literal = "".join(rf"\{char}" if char in r".+*?()|[]{}^$\\" else char for char in name)
    return literal.replace("\\", "\\\\").replace('"', '\\"')
