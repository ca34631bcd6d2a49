# SPDX-License-Identifier: Apache-2.0
"""Tallies: histograms for the token path."""

import itertools
import random
import subprocess
import sys

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from tandem_protocol.tallies import SECONDS, TOKENS, TallyHistogram

BOUNDS = (0.1, 1.0, 10.0)


def texts_without_created(registry: CollectorRegistry) -> list[str]:
    """The exposition's lines, without the times of creation that only Prometheus' own client adds."""
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


def test_a_tally_is_exposed_as_prometheus_own_histogram_is() -> None:
    """The same observations, line by line; edges belong to the bucket below them."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tally = TallyHistogram("seconds", "Of a thing.", ("model",), BOUNDS, ours).labels("m")
    child = Histogram("seconds", "Of a thing.", ["model"], buckets=BOUNDS, registry=theirs).labels("m")
    rng = random.Random(7)
    for value in (0.1, 1.0, 10.0, 0.0, 11.0, *(rng.expovariate(1) for _ in range(200))):
        tally.observe(value)
        child.observe(value)
    assert texts_without_created(ours) == texts_without_created(theirs)


def test_a_weight_is_so_many_observations() -> None:
    """Of four tokens that came together, each counts."""
    registry = CollectorRegistry()
    tally = TallyHistogram("seconds", "Of a thing.", (), BOUNDS, registry).labels()
    tally.observe(0.5, 4)
    tally.observe(5.0)
    assert registry.get_sample_value("seconds_count") == 5
    assert registry.get_sample_value("seconds_sum") == 7.0
    assert registry.get_sample_value("seconds_bucket", {"le": "1.0"}) == 4


def test_a_histogram_without_labels_is_there_before_its_first_observation() -> None:
    """With labels there is nothing to show yet: nobody knows the values."""
    registry = CollectorRegistry()
    TallyHistogram("one", "Of a thing.", (), BOUNDS, registry)
    labelled = TallyHistogram("two", "Of a thing.", ("model",), BOUNDS, registry)
    assert registry.get_sample_value("one_count") == 0
    assert registry.get_sample_value("two_count", {"model": "m"}) is None
    assert labelled.labels("m") is labelled.labels("m")


def test_edges_rise_and_read_well() -> None:
    """A quantile is as good as its bucket is narrow."""
    assert list(SECONDS) == sorted(set(SECONDS))
    assert list(TOKENS) == sorted(set(TOKENS))
    assert max(high / low for low, high in itertools.pairwise(SECONDS)) < 1.51
    assert all(len(str(edge)) <= 7 for edge in SECONDS)


def test_the_protocol_is_importable_without_prometheus_client() -> None:
    """Only who wants tallies needs it."""
    subprocess.run([sys.executable, "-c", "import sys, tandem_protocol.streams; assert 'prometheus_client' not in sys.modules"],
                   check=True, timeout=60)
