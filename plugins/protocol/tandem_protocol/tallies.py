# SPDX-License-Identifier: Apache-2.0
"""Prometheus histograms for the token path: one observation costs well under a microsecond and may count several times.

Prometheus' own client takes two locks per observation and knows no weights, but a response that brings n tokens is n observations of
one gap. Each tally has one writer, a thread or an event loop; whoever scrapes copies the counts, which is one step under the GIL, so
that a scrape may miss the latest observation's sum, never more.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

_STEPS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)


def decades(first: int, last: int) -> tuple[float, ...]:
    """Edges of buckets from 10**first to 10**last, seven to a decade: a quantile is off by a fifth at most."""
    return (*(step * 10.0**exponent for exponent in range(first, last) for step in _STEPS), 10.0**last)


SECONDS = tuple(float(f"{edge:.2g}") for edge in decades(-4, 3))
"""From 0.1 ms to 1,000 s; rounded, so that an edge reads 0.0015 and not 0.0015000000000000002."""
TOKENS = (1.0, 4.0, 16.0, *(2.0**power for power in range(5, 21)))
"""Up to a million."""


class Tally:
    """The observations of one series."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts a value so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._total += value * times

    def read(self) -> tuple[list[int], float]:
        """Observations per bucket, the last being those beyond all edges; and the sum of all values."""
        return self._counts.copy(), self._total


class TallyHistogram(Collector):
    """One metric: a tally per combination of label values. `labels` belongs to the writer; look a tally up once, not per token."""

    def __init__(self, name: str, text: str, labels: tuple[str, ...], bounds: tuple[float, ...], registry: CollectorRegistry) -> None:
        self._name, self._text, self._labels, self._bounds = name, text, labels, bounds
        self._tallies: dict[tuple[str, ...], Tally] = {}
        if not labels:
            self.labels()
        registry.register(self)

    def labels(self, *values: str) -> Tally:
        """The tally of these values, made if it is new."""
        found = self._tallies.get(values)
        if found is None:
            found = Tally(self._bounds)
            self._tallies = {**self._tallies, values: found}  # a new dict: a scrape may be reading the old one
        return found

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """The metric with all its series."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for values, tally in self._tallies.items():
            counts, total = tally.read()
            family.add_metric(values, list(self._cumulated(counts)), total)
        return [family]

    def _cumulated(self, counts: list[int]) -> Iterator[tuple[str, float]]:
        seen = 0
        for bound, count in zip((*self._bounds, float("inf")), counts, strict=True):
            seen += count
            yield floatToGoString(bound), float(seen)  # type: ignore[no-untyped-call]
