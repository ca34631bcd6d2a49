# SPDX-License-Identifier: Apache-2.0
"""The router over mock workers in each of its modes, with its bounds and its metrics. Real gRPC, ZMQ and discovery, no engines."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from models import make_tiny_model
from routers import LocalRouter, Mocks, mocks, router, until, url_of
from servers import get_json, get_text
from tandem_protocol.discovery import open_discovery
from tandem_protocol.errors import RequestCancelledError, RequestError, UnavailableError
from tandem_protocol.roles import Role
from tandem_protocol.workers import WorkerRecord, WorkerState
from tandem_router.overrides import Overrides

WORKERS = 4
REQUESTS = 8
BLOCK, SHARED = 16, 20
SLOW = ("--speedup", "0.01")
"""Steps of half a second."""
SHORT_S = "0.2"


def prompt(seed: int, turn: int = 0) -> list[int]:
    """Blocks that all turns share, then a block of this turn, and one token more."""
    shared = [(seed * 7919 + i * 31) % 30000 + 1 for i in range(BLOCK * SHARED)]
    return [*shared, *((seed * 104729 + turn * 6151 + i * 17) % 30000 + 1 for i in range(BLOCK + 1))]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A router without a tokenizer doesn't start; prompts here are token ids."""
    return make_tiny_model(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The discovery of the shared workers."""
    return tmp_path_factory.mktemp("modes")


@pytest.fixture(scope="module")
def fleet(store: Path) -> Iterator[Mocks]:
    """Four workers for all tests that break nothing."""
    with mocks(store, "--workers", str(WORKERS)) as running:
        yield running


@contextmanager
def registered(store: Path, record: WorkerRecord) -> Iterator[None]:
    """Within, discovery has this record, too."""
    with asyncio.Runner() as runner:
        discovery = open_discovery(url_of(store))
        runner.run(discovery.register(record))
        try:
            yield
        finally:
            runner.run(discovery.close())


def tokens_by_worker(fleet: Mocks) -> dict[str, int]:
    """Prompt tokens that each worker was sent so far."""
    lines = get_text(f"http://{fleet.admin}/metrics").splitlines()
    found = [line for line in lines if line.startswith("vllm:prompt_tokens_total{")]
    return {line.split('"')[1]: int(float(line.rsplit(" ", 1)[1])) for line in found}


def shares(fleet: Mocks, local: LocalRouter, seed: int, overrides: Overrides | None = None) -> list[int]:
    """Requests per worker, fewest first, of eight one after another that share a prefix."""
    before = tokens_by_worker(fleet)
    for turn in range(REQUESTS):
        assert local.send(prompt(seed, turn), overrides=overrides, max_tokens=4).text
    after = tokens_by_worker(fleet)
    return sorted((after[name] - before[name]) // len(prompt(0)) for name in after)


@pytest.mark.parametrize(
    ("seed", "settings", "expected"),
    [(1, {"DYN_ROUTER_MODE": "kv"}, [0, 0, 0, 8]), (2, {"DYN_KV_EVENTS": "false"}, [0, 0, 0, 8]),
     (3, {"DYN_ROUTER_MODE": "round-robin"}, [2, 2, 2, 2]), (4, {"DYN_ROUTER_MODE": "least-loaded"}, [2, 2, 2, 2])],
    ids=["kv", "approximate", "round-robin", "least-loaded"],
)
def test_modes_without_chance(fleet: Mocks, store: Path, tokenizer: Path, seed: int, settings: dict[str, str], expected: list[int]) -> None:
    """kv stays with the prefix, with events and without; the others take turns while nothing is in flight."""
    with router(store, WORKERS, tokenizer, **settings) as local:
        assert shares(fleet, local, seed) == expected


@pytest.mark.parametrize("mode", ["random", "power-of-two"])
def test_modes_by_chance_use_several(fleet: Mocks, store: Path, tokenizer: Path, mode: str) -> None:
    """All on one worker would happen once in 4^7 runs."""
    with router(store, WORKERS, tokenizer, DYN_ROUTER_MODE=mode) as local:
        found = shares(fleet, local, 5)
        assert sum(found) == REQUESTS
        assert found[-1] < REQUESTS


def test_direct_goes_where_the_request_says(fleet: Mocks, store: Path, tokenizer: Path) -> None:
    """Without a name it is refused with the parameter's name."""
    with router(store, WORKERS, tokenizer, DYN_ROUTER_MODE="direct") as local:
        assert shares(fleet, local, 6, Overrides(worker_id=local.placed()[1])) == [0, 0, 0, 8]
        error = local.send(prompt(6)).wait().error
        assert isinstance(error, RequestError)
        assert "worker_id" in str(error)


def test_a_pipelines_worker_in_the_same_discovery_gets_nothing(fleet: Mocks, store: Path, tokenizer: Path) -> None:
    """Though it has the model's name: nobody listens at its address, so that a request for it would fail."""
    record = WorkerRecord(id="omni-1", role=Role.OMNI, state=WorkerState.READY, model="mock", grpc_url="127.0.0.1:1", triton_model="omni",
                          block_size=0, total_blocks=0, max_num_seqs=0, max_num_batched_tokens=0)
    with registered(store, record), router(store, WORKERS, tokenizer, DYN_ROUTER_MODE="round-robin") as local:
        assert shares(fleet, local, 20) == [2, 2, 2, 2]
        assert "omni-1" not in [worker["id"] for worker in get_json(f"{local.admin}/fleet")["workers"]]


def test_a_request_can_set_weight_and_temperature(fleet: Mocks, store: Path, tokenizer: Path) -> None:
    """Weight 0 leaves only the load in the cost; a high temperature draws among all, though one has the prefix."""
    with router(store, WORKERS, tokenizer) as local:
        assert local.send(prompt(7), max_tokens=4).text
        until(lambda: local.query(prompt(7))["worker"]["overlap_blocks"]["gpu"] >= SHARED, "the prefix in the index")
        answer = json.loads(local.send(prompt(7), overrides=Overrides(query=True, overlap_weight=0)).text)
        assert all(term["cost"] == term["decode_blocks"] for term in answer["worker"]["candidates"])
        asked = [local.send(prompt(7), overrides=Overrides(query=True, temperature=1000)) for _ in range(60)]
        drawn = {json.loads(one.text)["worker"]["id"] for one in asked}
        assert drawn == set(local.placed())


def test_metrics_tell_decisions_hits_loads_and_the_feed(fleet: Mocks, store: Path, tokenizer: Path) -> None:
    """Of a prompt that is sent twice: what was predicted is what the worker found."""
    with router(store, WORKERS, tokenizer) as local:
        for _ in range(2):
            assert local.send(prompt(8), max_tokens=4, returns=("num_cached_tokens",)).text
        lines = get_text(f"{local.admin}/metrics").splitlines()
        values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}
    assert values['tandem_router_decisions_total{role="aggregated"}'] == 2
    assert values['tandem_router_decision_seconds_count{role="aggregated"}'] == 2
    assert values["tandem_router_tokenize_seconds_count"] == 2
    assert values['tandem_router_hit_blocks_total{tier="gpu"}'] == SHARED + 1
    assert {values[f"tandem_router_{which}_cached_tokens_total"] for which in ("predicted", "actual")} == {BLOCK * (SHARED + 1)}
    assert values['tandem_router_requests_total{outcome="ok"}'] == 2
    for what, family in (("active_requests", "worker_load"), ("active_blocks", "worker_load"), ("gaps", "feed"), ("synced", "feed")):
        named = {name: value for name, value in values.items() if name.startswith(f"tandem_router_{family}{{") and f'what="{what}"' in name}
        assert len(named) == WORKERS
        assert set(named.values()) == {1.0 if what == "synced" else 0.0}


def test_the_queue_is_bounded(fleet: Mocks, store: Path, tokenizer: Path) -> None:
    """A request beyond the bound is refused at once and counted; when one ends, the next is taken."""
    with router(store, WORKERS, tokenizer, TANDEM_ROUTER_MAX_QUEUED_REQUESTS="2") as local:
        held = [local.send(prompt(9, turn), f"held-{turn}", max_tokens=5000) for turn in range(2)]
        until(lambda: all(one.responses for one in held), "two requests in flight")
        error = local.send(prompt(9, 2)).wait().error
        assert isinstance(error, UnavailableError)
        assert "holds 2 requests" in str(error)
        for turn, one in enumerate(held):
            local.router.abort(f"held-{turn}")
            assert isinstance(one.wait().error, RequestCancelledError)
        until(lambda: local.router.active_requests == 0, "the room")
        assert local.send(prompt(9, 2), max_tokens=4).text
        assert 'tandem_router_requests_total{outcome="refused"} 1.0' in get_text(f"{local.admin}/metrics")


@pytest.mark.parametrize(("stage", "begun"), [("FIRST", False), ("NEXT", True)])
def test_a_silent_worker_is_left_in_time(tmp_path: Path, tokenizer: Path, stage: str, begun: bool) -> None:
    """Before its first token and in the middle; the request ends when it may not move on, the worker is freed."""
    settings = {"DYN_MIGRATION_LIMIT": "0", f"TANDEM_ROUTER_{stage}_TOKEN_TIMEOUT_S": SHORT_S}
    with mocks(tmp_path, *SLOW) as running, router(tmp_path, 1, tokenizer, **settings) as local:
        sent = local.send(prompt(10), max_tokens=50)
        assert isinstance(sent.wait().error, UnavailableError)
        assert f"sent nothing for {SHORT_S} s" in str(sent.error)
        assert bool(sent.responses) is begun
        until(lambda: running.metric("vllm:num_requests_running") == 0, "the worker to be idle")


def test_a_slow_prefill_worker_is_passed_over_in_time(tmp_path: Path, tokenizer: Path) -> None:
    """The decode worker prefills by itself; that is counted."""
    with mocks(tmp_path, "--role", "prefill", "--name", "p", *SLOW), mocks(tmp_path, "--role", "decode", "--name", "d"), \
            router(tmp_path, 2, tokenizer, TANDEM_ROUTER_PREFILL_TIMEOUT_S=SHORT_S) as local:
        assert local.query(prompt(11))["prefill"]["remote"]
        assert local.send(prompt(11), max_tokens=4).text
        assert local.metric("tandem_router_prefill_fallbacks_total") == 1
