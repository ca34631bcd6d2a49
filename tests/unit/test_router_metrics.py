# SPDX-License-Identifier: Apache-2.0
"""The router's metrics of requests: what a meter makes of the responses that came, and which parts of a decision are timed."""

import shutil
import subprocess

import numpy as np
import pytest

from router_fleet import BLOCK, placement, prompt, workers
from tandem_protocol import tensors
from tandem_protocol.requests import GenerationRequest
from tandem_router.meters import RequestMeter, cached_of, count_tokens, sequences_of
from tandem_router.metrics import RouterMetrics
from tandem_router.placement import RouteRequest

NAMES = ("time_to_first_token_seconds", "inter_token_latency_seconds", "request_duration_seconds", "input_sequence_tokens",
         "output_sequence_tokens", "cached_tokens")


def samples(metrics: RouterMetrics) -> dict[str, float]:
    """Every sample by its name with labels."""
    lines = [line for line in metrics.exposition().decode().splitlines() if not line.startswith("#")]
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def sum_and_count(metrics: RouterMetrics, name: str, labels: str = '{model="m"}') -> tuple[float, float]:
    """Of one histogram; zeros where it has no series."""
    found = samples(metrics)
    return found.get(f"tandem_router_{name}_sum{labels}", 0.0), found.get(f"tandem_router_{name}_count{labels}", 0.0)


def metered(responses: list[tuple[int, float]], *, streamed: bool = True, sequences: int = 1, ends: float = 10.0) -> RouterMetrics:
    """After one request of 100 tokens, taken at 1 s, whose responses came as (tokens, time)."""
    metrics = RouterMetrics()
    meter = RequestMeter(1.0, streamed=streamed, sequences=sequences)
    meter.begin(metrics.tallies_of("m"), 100)
    for tokens, now in responses:
        meter.received(tokens, 48, now)
    meter.ended(ends)
    return metrics


def request(**sampling: object) -> GenerationRequest:
    """A streamed request."""
    return GenerationRequest(request_id="r", prompt=[1], images=(), stream=True, prepend_input=False, sampling=sampling,
                             returns=frozenset(), handoff=None, priority=0, timeout_s=None)


def test_a_stream_is_measured_as_its_client_sees_it() -> None:
    """First token at 3 s, two tokens one second later, one half a second after them; the end at 5 s."""
    metrics = metered([(1, 3.0), (2, 4.0), (1, 4.5), (0, 4.6)], ends=5.0)
    assert sum_and_count(metrics, "time_to_first_token_seconds") == (2.0, 1)
    assert sum_and_count(metrics, "inter_token_latency_seconds") == (1.5, 3)
    assert samples(metrics)['tandem_router_inter_token_latency_seconds_bucket{le="0.6",model="m"}'] == 3
    assert sum_and_count(metrics, "request_duration_seconds") == (4.0, 1)
    assert sum_and_count(metrics, "input_sequence_tokens") == (100, 1)
    assert sum_and_count(metrics, "output_sequence_tokens") == (4, 1)
    assert sum_and_count(metrics, "cached_tokens") == (48, 1)


def test_sequences_side_by_side_share_their_gaps() -> None:
    """Four sequences with a token each per second: the gap is a second for all of them."""
    metrics = metered([(4, 2.0), (4, 3.0), (4, 4.0)], sequences=4)
    assert sum_and_count(metrics, "inter_token_latency_seconds") == (8.0, 8)
    assert sum_and_count(metrics, "output_sequence_tokens") == (12, 1)


def test_an_answer_in_one_piece_has_no_first_token_to_be_timed() -> None:
    """Its duration and its tokens count."""
    metrics = metered([(20, 3.0)], streamed=False)
    assert sum_and_count(metrics, "time_to_first_token_seconds") == (0, 0)
    assert sum_and_count(metrics, "inter_token_latency_seconds") == (0, 0)
    assert sum_and_count(metrics, "request_duration_seconds") == (9.0, 1)
    assert sum_and_count(metrics, "output_sequence_tokens") == (20, 1)


def test_a_request_without_a_token_counts_nowhere() -> None:
    """It has failed, and `requests` says how."""
    metrics = metered([(0, 2.0)])
    assert [sum_and_count(metrics, name) for name in NAMES] == [(0, 0)] * len(NAMES)


def test_a_request_that_was_never_routed_may_end() -> None:
    """No model is known then."""
    meter = RequestMeter(1.0, streamed=True, sequences=1)
    assert meter.waiting
    meter.received(1, 0, 2.0)
    meter.ended(3.0)
    assert meter.waiting


def test_tokens_are_counted_by_ids_or_by_the_workers_count() -> None:
    """Ids are asked for where a stream may move to another worker, counts elsewhere."""
    assert count_tokens({tensors.OUTPUT_IDS: np.array([5, 6, 7], np.int32)}) == 3
    assert count_tokens({tensors.NUM_OUTPUT_TOKENS: np.array([2, 0, 3], np.uint32)}) == 5
    assert count_tokens({}) == 0


def test_cached_tokens_are_the_workers_where_it_was_asked() -> None:
    """Else the index's."""
    assert cached_of({tensors.NUM_CACHED_TOKENS: np.array([32], np.uint32)}, 16) == 32
    assert cached_of({}, 16) == 16


@pytest.mark.parametrize(("n", "expected"), [(3, 3), (None, 1), (0, 1), ("x", 1)])
def test_how_many_sequences_a_request_has(n: object, expected: int) -> None:
    """Nonsense is the worker's to refuse."""
    assert sequences_of(request(n=n)) == expected


def test_the_parts_of_a_decision_are_timed() -> None:
    """Each of them is a share of the whole, and both are told."""
    placed, metrics = placement(workers(4)), RouterMetrics()
    for seed in range(10):
        decision = placed.choose(RouteRequest(isl=9 * BLOCK, keys=prompt(4, 4, seed)))
        assert min(decision.timing) > 0
        metrics.decided(sum(decision.timing), decision)
    whole = sum_and_count(metrics, "decision_seconds", '{role="aggregated"}')
    parts = [sum_and_count(metrics, "decision_part_seconds", f'{{part="{part}"}}') for part in ("match", "choice", "books")]
    assert whole[1] == 10
    assert {count for _, count in parts} == {10}
    assert sum(total for total, _ in parts) == pytest.approx(whole[0])


def test_queued_requests_are_told_under_the_model() -> None:
    """Of those in flight."""
    metrics = RouterMetrics()
    metrics.in_flight("", 0, 0)
    assert "tandem_router_queued_requests{" not in metrics.exposition().decode()
    metrics.in_flight("m", 3, 2)
    found = samples(metrics)
    assert (found["tandem_router_active_requests"], found['tandem_router_queued_requests{model="m"}']) == (3, 2)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
def test_promtool_accepts_the_names() -> None:
    """Of every kind of metric."""
    metrics = metered([(1, 3.0), (2, 4.0)])
    checked = subprocess.run(["promtool", "check", "metrics"], input=metrics.exposition(), capture_output=True, timeout=60, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")
