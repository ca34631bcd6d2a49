# SPDX-License-Identifier: Apache-2.0
"""One router in front of 64 mock workers in real time: how long decisions take, and whether the load spreads."""

import math
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from models import make_tiny_model
from routers import LocalRouter, Mocks, mocks, router

WORKERS = 64
PREFIXES = 2 * WORKERS
"""All in flight together, so that an even spread is two per worker."""
ROUNDS = 3
BLOCK = 16
SHARED_BLOCKS, OWN_BLOCKS = 24, 4
DECISION_P99_S = 0.02
"""Generous: the router shares its cores with the mock workers here, and perhaps with another test."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mocks, LocalRouter]]:
    """64 aggregated workers in one process, and a router that has them all in placement."""
    folder = tmp_path_factory.mktemp("many")
    tokenizer = make_tiny_model(folder / "tokenizer")
    with mocks(folder / "store", "--workers", str(WORKERS), "--speedup", "1") as running, \
            router(folder / "store", WORKERS, tokenizer) as local:
        yield running, local


def prompt(prefix: int, turn: int) -> list[int]:
    """Blocks that all turns of a prefix share, then this turn's own, and one token more."""
    shared = [(prefix * 7919 + i * 31) % 30000 + 1 for i in range(BLOCK * SHARED_BLOCKS)]
    return [*shared, *((prefix * 104729 + turn * 6151 + i * 17) % 30000 + 1 for i in range(BLOCK * OWN_BLOCKS + 1))]


def prompts_by_worker(running: Mocks) -> Counter[str]:
    """Prompt tokens that each worker was sent so far."""
    with urllib.request.urlopen(f"http://{running.admin}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = [line for line in lines if line.startswith("vllm:prompt_tokens_total{")]
    return Counter({line.split('"')[1]: int(float(line.rsplit(" ", 1)[1])) for line in found})


def decision_bound_s(local: LocalRouter, share: float) -> float:
    """Upper edge of the histogram's bucket in which this share of all decisions lies."""
    name = "tandem_router_decision_seconds_bucket{"
    lines = [line for line in local.router.metrics.exposition().decode().splitlines() if line.startswith(name)]
    buckets = sorted((float(line.split('le="')[1].split('"')[0]), float(line.rsplit(" ", 1)[1])) for line in lines)
    assert buckets[-1][0] == math.inf
    return next(edge for edge, count in buckets if count >= share * buckets[-1][1])


def answer_round(local: LocalRouter, turn: int) -> int:
    """One prompt of every prefix, all in flight together; how many of them found their whole prefix cached."""
    sent = [local.send(prompt(prefix, turn), max_tokens=16, returns=("num_cached_tokens",)) for prefix in range(PREFIXES)]
    texts = [one.text for one in sent]
    assert all(texts)
    assert len(set(texts)) == PREFIXES  # a mock's text depends on its whole prompt
    return sum(one.first("num_cached_tokens") >= BLOCK * SHARED_BLOCKS for one in sent)


def test_64_workers_answer_all_reuse_prefixes_and_share_the_load(
        fleet: tuple[Mocks, LocalRouter], record_testsuite_property: Callable[[str, object], None]) -> None:
    """Three rounds of 128 prompts: the first is computed, the others find their prefixes; nobody is left out or overrun."""
    running, local = fleet
    before = prompts_by_worker(running)
    reused = [answer_round(local, turn) for turn in range(ROUNDS)]
    sent = prompts_by_worker(running) - before
    requests = {worker: tokens // len(prompt(0, 0)) for worker, tokens in sent.items()}
    p99_s = decision_bound_s(local, 0.99)
    for name, value in (("reused", reused), ("decision_p50_s", decision_bound_s(local, 0.5)), ("decision_p99_s", p99_s),
                        ("fullest", max(requests.values())), ("emptiest", min(requests.values()))):
        record_testsuite_property(f"router_many_{name}", value)
    assert sum(requests.values()) == ROUNDS * PREFIXES
    assert len(requests) == WORKERS
    assert max(requests.values()) <= 2 * ROUNDS * PREFIXES / WORKERS
    assert reused[0] == 0
    assert min(reused[1:]) >= 0.9 * PREFIXES
    assert p99_s <= DECISION_P99_S
    assert local.metric("tandem_router_active_requests") == 0
