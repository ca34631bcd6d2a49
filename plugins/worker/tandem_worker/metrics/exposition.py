# SPDX-License-Identifier: Apache-2.0
"""All metrics of a worker as one text, each series once, labelled so that fleets can be told apart.

They come from three places: Prometheus' global registry of this process, where vLLM's front end counts; the worker's own registry; and
files in a folder that engine processes write to, because PROMETHEUS_MULTIPROC_DIR names it for them (Prometheus' client then keeps every
process's values there; LMCache's are nowhere else). A metric that is in a registry and in the files is the same counted twice: the
registry's is taken, except for LMCache's, whose counts of the stub say nothing.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from tandem_worker.metrics.labels import Labels

_OF_THE_ENGINE = ("vllm:", "vllm_omni:", "lmcache:", "kvbm_", "dynamo_component_", "tandem_worker_")
"""Prefixes of what is labelled; a process's own figures (`python_`, `process_`) and those about discovery stay as they are."""
_FROM_FILES = "lmcache:"


class Exposition:
    """What `/metrics` says. Any thread may ask."""

    def __init__(self, registries: tuple[CollectorRegistry, ...], folder: Path | None = None, labels: Labels | None = None) -> None:
        """`folder`: where engine processes leave theirs; it may not be there yet."""
        self._registries = registries
        self._folder = folder
        self._labels = labels or Labels()

    def families(self) -> list[Metric]:
        """Every metric once."""
        files = {metric.name: metric for metric in self._in_files()}
        found: dict[str, Metric] = {name: metric for name, metric in files.items() if name.startswith(_FROM_FILES)}
        for registry in self._registries:
            for metric in registry.collect():
                found.setdefault(metric.name, metric)
        return [self._labelled(metric) for metric in (found | {name: files[name] for name in files.keys() - found.keys()}).values()]

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(_Collected(self.families))

    def _in_files(self) -> Iterable[Metric]:
        if self._folder is None or not self._folder.is_dir():
            return ()
        collector: Any = MultiProcessCollector(None, path=str(self._folder))  # type: ignore[no-untyped-call]
        return list(collector.collect())

    def _labelled(self, metric: Metric) -> Metric:
        if not metric.name.startswith(_OF_THE_ENGINE):
            return metric
        labelled = Metric(metric.name, metric.documentation, metric.type, metric.unit)
        labelled.samples = [sample._replace(labels=self._labels.added_to(sample.labels)) for sample in metric.samples]
        return labelled


class _Collected(Collector):
    """What `generate_latest` reads."""

    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """All metrics."""
        return self._families()
