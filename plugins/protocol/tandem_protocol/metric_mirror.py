# SPDX-License-Identifier: Apache-2.0
"""Shows a process's Prometheus metrics in another place that is told of changes, one by one: Triton's own `/metrics`.

A thread of its own compares, every few seconds, what is exposed with what was shown, and tells the difference: counters by how much they
rose, gauges by their value, histograms by as many observations as each bucket got, placed so that their sum is right, too. What costs
one call per token elsewhere costs nothing on the token path here. Metrics that are counted per token or step are left out of it as
histograms (`PER_TOKEN`): each observation is a round trip to Triton.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client.core import Metric
from prometheus_client.samples import Sample

log = logging.getLogger(__name__)

PER_TOKEN = frozenset({"vllm:inter_token_latency_seconds", "vllm:iteration_tokens_total", "tandem_worker_inter_token_latency_seconds",
                       "tandem_router_inter_token_latency_seconds"})
_OF_THE_PROCESS = ("python_", "process_")
_STOP_TIMEOUT_S = 10.0
_LEAST_SHARE = 1e-9
"""Above 0: a value at the lower edge would belong to the bucket below."""
Labels = tuple[tuple[str, str], ...]
"""Sorted pairs."""
Key = tuple[str, Labels]
"""A series: its name, and its labels."""


class Shown(Protocol):
    """One series elsewhere; Triton's `Metric`."""

    def increment(self, value: float) -> None:
        """Of a counter or gauge."""

    def set(self, value: float) -> None:
        """Of a gauge."""

    def observe(self, value: float) -> None:
        """Of a histogram."""


Show = Callable[[str, str, str, Mapping[str, str], Sequence[float] | None], Shown]
"""(name, text, type, labels, finite edges of buckets or None) -> the series, made when it is first needed."""


@dataclass(frozen=True)
class Counts:
    """A histogram's series as it stands: observations per bucket, not cumulated, and the sum of their values."""

    edges: tuple[float, ...]
    """Upper ones; the last is infinite."""
    buckets: tuple[float, ...]
    total: float

    def since(self, earlier: "Counts | None") -> "Counts":
        """What came since; all of it where the series began anew."""
        if earlier is None or any(now < before for now, before in zip(self.buckets, earlier.buckets, strict=True)):
            return self
        gained = tuple(now - before for now, before in zip(self.buckets, earlier.buckets, strict=True))
        return Counts(self.edges, gained, self.total - earlier.total)

    def observations(self) -> Iterator[float]:
        """Values that fall into these buckets and add up to this sum: all lie at the same share of their bucket's width.

        The last bucket is taken to be as wide as its lower edge is high; values beyond that have what the sum has beyond the others.
        """
        lows = (0.0, *self.edges[:-1])
        widths = (*(high - low for low, high in zip(lows[:-1], self.edges[:-1], strict=True)), lows[-1] or 1.0)
        rest = self.total - _dot(self.buckets, lows)
        share = max(rest / (_dot(self.buckets, widths) or 1.0), _LEAST_SHARE)
        for count, low, width in zip(self.buckets[:-1], lows[:-1], widths[:-1], strict=True):
            yield from [low + min(share, 1.0) * width] * round(count)
        if self.buckets[-1]:
            beyond = max(rest - min(share, 1.0) * _dot(self.buckets[:-1], widths[:-1]), _LEAST_SHARE)
            yield from [lows[-1] + beyond / self.buckets[-1]] * round(self.buckets[-1])


def _dot(counts: Sequence[float], values: Sequence[float]) -> float:
    return sum(count * value for count, value in zip(counts, values, strict=True))


class Mirror:
    """Keeps what is shown elsewhere up to date. One thread at a time."""

    def __init__(self, families: Callable[[], Iterable[Metric]], show: Show) -> None:
        self._families, self._show = families, show
        self._shown: dict[Key, Shown] = {}
        self._values: dict[Key, float] = {}
        self._counts: dict[Key, Counts] = {}

    def update(self) -> None:
        """Tells all that has changed; series that are no longer exposed are forgotten. Raises what the other place raises."""
        seen: set[Key] = set()
        for family in self._families():
            if not family.name.startswith(_OF_THE_PROCESS):
                seen.update(self._family(family))
        for gone in self._shown.keys() - seen:
            for known in (self._shown, self._values, self._counts):
                known.pop(gone, None)

    def clear(self) -> None:
        """Forgets the series, which Triton wants to be gone before the model is."""
        self._shown.clear()

    def _family(self, family: Metric) -> Iterator[Key]:
        if family.type in {"counter", "gauge"}:
            for sample in family.samples:
                yield self._scalar(family, sample)
        elif family.type == "histogram" and family.name not in PER_TOKEN:
            for labels, counts in histograms(family):
                yield self._histogram(family, labels, counts)

    def _scalar(self, family: Metric, sample: Sample) -> Key:
        key = (sample.name, tuple(sorted(sample.labels.items())))
        before = self._values.get(key)
        if sample.value == before or not math.isfinite(sample.value) or sample.name.endswith("_created"):
            return key
        shown = self._series(key, family, None)
        if family.type == "gauge":
            shown.set(sample.value)
        else:
            shown.increment(sample.value - before if before is not None and sample.value > before else sample.value)
        self._values[key] = sample.value
        return key

    def _histogram(self, family: Metric, labels: Labels, counts: Counts) -> Key:
        key = (family.name, labels)
        shown = self._series(key, family, counts.edges[:-1])
        for value in counts.since(self._counts.get(key)).observations():
            shown.observe(value)
        self._counts[key] = counts
        return key

    def _series(self, key: Key, family: Metric, edges: Sequence[float] | None) -> Shown:
        shown = self._shown.get(key)
        if shown is None:
            shown = self._shown[key] = self._show(key[0], family.documentation, family.type, dict(key[1]), edges)
        return shown


def histograms(family: Metric) -> Iterator[tuple[Labels, Counts]]:
    """The series of a histogram by their labels without the edges."""
    cumulated: dict[Labels, list[tuple[float, float]]] = {}
    sums: dict[Labels, float] = {}
    for sample in family.samples:
        labels = tuple(sorted((name, value) for name, value in sample.labels.items() if name != "le"))
        if sample.name.endswith("_bucket"):
            cumulated.setdefault(labels, []).append((float(sample.labels["le"]), sample.value))
        elif sample.name.endswith("_sum"):
            sums[labels] = sample.value
    for labels, pairs in cumulated.items():
        pairs.sort()
        counts = [count for _, count in pairs]
        single = tuple(now - before for now, before in zip(counts, [0.0, *counts[:-1]], strict=True))
        yield labels, Counts(tuple(edge for edge, _ in pairs), single, sums.get(labels, 0.0))


class MirrorThread:
    """Updates a mirror every few seconds until `stop`."""

    def __init__(self, mirror: Mirror, interval_s: float) -> None:
        self._mirror, self._interval_s = mirror, interval_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tandem-mirror", daemon=True)

    def start(self) -> None:
        """The first update comes at once."""
        self._thread.start()

    def stop(self) -> None:
        """After that nothing is told any more, and the series are forgotten. Waits for an update under way, within a bound."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_TIMEOUT_S)
        self._mirror.clear()

    def _run(self) -> None:
        failed = False
        while True:
            try:
                self._mirror.update()
                failed = False
            except Exception:  # metrics elsewhere are off, or something is busy: serving goes on, and the admin port has them all
                if not failed:
                    log.warning("metrics.mirror_failed: trying again every %g s", self._interval_s, exc_info=True)
                failed = True
            if self._stopping.wait(self._interval_s):
                return
