# SPDX-License-Identifier: Apache-2.0
"""LMCache's metrics (`lmcache:*`), which the engine's processes leave in files.

vLLM's own reach the stub with each step; LMCache's stay in the process that counts them, unless PROMETHEUS_MULTIPROC_DIR names a folder.
Prometheus' client then keeps every process's values there, and this adds them up. Only LMCache's are taken: the stub has the others.
"""

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

_PREFIX = "lmcache:"


class LMCacheMetrics(Collector):
    """All processes' values, summed where Prometheus' client sums them."""

    def __init__(self, folder: str) -> None:
        """Raises ValueError if the folder isn't there."""
        self._files: Any = MultiProcessCollector(CollectorRegistry(), path=folder)  # type: ignore[no-untyped-call]

    def collect(self) -> Iterable[Metric]:
        """Reads the files."""
        return [metric for metric in self._files.collect() if metric.name.startswith(_PREFIX)]


def lmcache_metrics(folder: str) -> bytes:
    """In Prometheus' text format; nothing without a folder. Raises ValueError if the folder isn't there."""
    if not folder:
        return b""
    registry = CollectorRegistry()
    registry.register(LMCacheMetrics(folder))
    return generate_latest(registry)
