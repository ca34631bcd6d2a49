# SPDX-License-Identifier: Apache-2.0
"""Metrics that are shown in another place: what is told there adds up to what is exposed here."""

import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tandem_protocol.metric_mirror import PER_TOKEN, Mirror, MirrorThread

EDGES = (0.1, 1.0, 10.0)


@dataclass
class Elsewhere:
    """A registry that is told as Triton is."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    calls: int = 0
    families: dict[str, Counter | Gauge | Histogram] = field(default_factory=dict)

    def show(self, name: str, text: str, kind: str, labels: Mapping[str, str], edges: Sequence[float] | None) -> "Series":
        """A series; Prometheus' client adds `_total` to counters by itself."""
        if name not in self.families:
            names, bare = tuple(labels), name.removesuffix("_total")
            if edges is not None:
                self.families[name] = Histogram(bare, text, names, buckets=tuple(edges), registry=self.registry)
            else:
                self.families[name] = (Counter if kind == "counter" else Gauge)(bare, text, names, registry=self.registry)
        family = self.families[name]
        return Series(self, family.labels(**labels) if labels else family)

    def values(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Every sample."""
        return values(self.registry)


@dataclass
class Series:
    """What Triton calls a Metric."""

    elsewhere: Elsewhere
    child: Counter | Gauge | Histogram

    def increment(self, value: float) -> None:
        """A counter refuses to fall, as Triton's does."""
        self.elsewhere.calls += 1
        assert isinstance(self.child, Counter)
        self.child.inc(value)

    def set(self, value: float) -> None:
        """A gauge."""
        self.elsewhere.calls += 1
        assert isinstance(self.child, Gauge)
        self.child.set(value)

    def observe(self, value: float) -> None:
        """A histogram."""
        self.elsewhere.calls += 1
        assert isinstance(self.child, Histogram)
        self.child.observe(value)


def values(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample but the times of creation."""
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for family in registry.collect() for sample in family.samples
            if not sample.name.endswith("_created")}


@pytest.fixture
def here() -> CollectorRegistry:
    """What is exposed."""
    return CollectorRegistry()


def test_what_is_told_adds_up_to_what_is_exposed(here: CollectorRegistry) -> None:
    """Over five updates: counters, gauges that fall, and histograms in each bucket and in their sum."""
    counter = Counter("things", "Of a kind.", ["model"], registry=here).labels("m")
    gauge = Gauge("level", "Of a kind.", registry=here)
    histogram = Histogram("seconds", "Of a kind.", ["model"], buckets=EDGES, registry=here).labels("m")
    elsewhere, rng = Elsewhere(), random.Random(3)
    mirror = Mirror(here.collect, elsewhere.show)
    for _ in range(5):
        counter.inc(rng.randrange(5))
        gauge.set(rng.uniform(-3, 3))
        for _ in range(rng.randrange(30)):
            histogram.observe(rng.choice((0.0, 0.1, rng.uniform(0, 1), rng.uniform(0, 30), 10.0, 1000.0)))
        mirror.update()
        assert elsewhere.values() == pytest.approx(values(here))


@pytest.mark.parametrize("observed", [[0.0], [0.1], [10.0], [10.1], [1e6], [0.0] * 5, [0.1, 0.100001], [11.0, 0.05], [0.2, 0.2, 1e4]])
def test_observations_at_the_edges_stay_in_their_buckets(here: CollectorRegistry, observed: list[float]) -> None:
    """An edge belongs to the bucket below it."""
    histogram = Histogram("seconds", "Of a kind.", buckets=EDGES, registry=here)
    elsewhere = Elsewhere()
    for value in observed:
        histogram.observe(value)
    Mirror(here.collect, elsewhere.show).update()
    assert elsewhere.values() == pytest.approx(values(here), abs=1e-6)


def test_nothing_is_told_where_nothing_changed(here: CollectorRegistry) -> None:
    """Each call is a round trip to Triton."""
    Counter("things", "Of a kind.", registry=here).inc(2)
    Gauge("level", "Of a kind.", registry=here).set(1)
    Histogram("seconds", "Of a kind.", buckets=EDGES, registry=here).observe(0.5)
    elsewhere = Elsewhere()
    mirror = Mirror(here.collect, elsewhere.show)
    mirror.update()
    told = elsewhere.calls
    mirror.update()
    assert (told, elsewhere.calls) == (3, 3)


def test_a_counter_that_began_anew_goes_on_rising_elsewhere(here: CollectorRegistry) -> None:
    """As Prometheus reads a reset."""
    counter = Counter("things", "Of a kind.", registry=here)
    elsewhere = Elsewhere()
    mirror = Mirror(here.collect, elsewhere.show)
    counter.inc(5)
    mirror.update()
    counter.reset()
    counter.inc(2)
    mirror.update()
    assert elsewhere.values()["things_total", ()] == 7


def test_a_series_that_left_is_forgotten(here: CollectorRegistry) -> None:
    """Workers come and go; what is shown must not grow for ever."""
    load = Gauge("load", "Of a worker.", ["worker"], registry=here)
    load.labels("a").set(1)
    elsewhere = Elsewhere()
    shown = Mirror(here.collect, elsewhere.show)
    shown.update()
    load.clear()
    load.labels("b").set(2)
    shown.update()
    assert list(shown._shown) == [("load", (("worker", "b"),))]


def test_what_is_counted_per_token_is_left_out(here: CollectorRegistry) -> None:
    """A round trip per token would cost more than the token; so would what Python says of itself be of no use there."""
    name = min(PER_TOKEN)
    Histogram(name, "Between tokens.", registry=here).observe(0.1)
    Gauge("python_info", "Of the process.", registry=here).set(1)
    elsewhere = Elsewhere()
    Mirror(here.collect, elsewhere.show).update()
    assert elsewhere.calls == 0


def test_the_thread_tells_at_once_and_forgets_at_its_end(here: CollectorRegistry) -> None:
    """Triton wants metrics to be gone before the model is."""
    Gauge("level", "Of a kind.", registry=here).set(4)
    elsewhere = Elsewhere()
    mirror = Mirror(here.collect, elsewhere.show)
    thread = MirrorThread(mirror, 3600.0)
    thread.start()
    thread.stop()
    assert elsewhere.values() == {("level", ()): 4}
    assert not mirror._shown


def test_a_place_that_refuses_is_asked_again_and_named_once(here: CollectorRegistry, caplog: pytest.LogCaptureFixture) -> None:
    """A server with its metrics off serves all the same."""
    Gauge("level", "Of a kind.", registry=here).set(4)
    asked, thrice = [], threading.Event()

    def refuse(*_: object) -> Series:
        asked.append(1)
        if len(asked) == 3:
            thrice.set()
        raise RuntimeError("metrics are off")

    thread = MirrorThread(Mirror(here.collect, refuse), 0.001)
    thread.start()
    assert thrice.wait(10.0)
    thread.stop()
    assert caplog.text.count("metrics.mirror_failed") == 1
