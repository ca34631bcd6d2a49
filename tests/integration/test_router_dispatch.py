# SPDX-License-Identifier: Apache-2.0
"""The router in front of mock workers: placement, faults, migration, cancellation. Real gRPC, ZMQ and discovery, no engines.

A mock's next token is a function of all tokens before it, so an answer that moved to another worker equals an unbroken one only if
every token was handed on exactly once.
"""

import operator
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from etcds import BINARY, Etcd
from models import make_tiny_model
from routers import LocalRouter, Mocks, Recorder, mocks, router, until
from servers import get_json, get_text, post_json, wait_for
from tandem_cli.status_fleet import parse_fleet
from tandem_protocol.discovery import LEASE_TTL_S
from tandem_protocol.errors import RequestCancelledError, RequestError, UnavailableError
from tandem_router.overrides import Overrides

SLOW = ("--speedup", "1")
CHUNKS = ("--speedup", "0.1", "--max-num-seqs", "1", "--max-num-batched-tokens", "64")
FREED_S = 1.0
"""Within which everything must be free after a client left."""


def prompt(seed: int, blocks: int = 8) -> list[int]:
    """Token ids of so many blocks of 16, and one more."""
    return [(seed * 7919 + i * 31) % 30000 + 1 for i in range(16 * blocks + 1)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's; the prompts here are token ids, but a router without a tokenizer doesn't start."""
    return make_tiny_model(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Iterator[tuple[Mocks, LocalRouter]]:
    """Four aggregated workers and a router, for tests that break nothing."""
    folder = tmp_path_factory.mktemp("calm")
    with mocks(folder, "--workers", "4", *SLOW) as running, router(folder, 4, tokenizer) as local:
        yield running, local


@pytest.fixture
def fragile(tmp_path: Path, tokenizer: Path) -> Iterator[tuple[Mocks, LocalRouter]]:
    """The same, for one test that kills workers."""
    with mocks(tmp_path, "--workers", "4", *SLOW) as running, router(tmp_path, 4, tokenizer, TANDEM_ROUTER_DOWN_S="1") as local:
        yield running, local


def test_a_prefix_goes_to_the_worker_that_has_it(calm: tuple[Mocks, LocalRouter]) -> None:
    """Its own count of cached tokens proves it; another prompt goes elsewhere."""
    _, local = calm
    ours, other = prompt(1), prompt(2)
    assert local.send(ours, returns=("num_cached_tokens",)).first("num_cached_tokens") == 0
    assert local.send([*ours, 5, 6, 7], returns=("num_cached_tokens",)).first("num_cached_tokens") == 128
    cached, cold = local.query(ours)["worker"], local.query(other)["worker"]
    assert cached["cached_tokens"] == 128
    assert cold["cached_tokens"] == 0
    assert cold["id"] != cached["id"]
    assert len(cached["candidates"]) == 4


def test_the_fleet_is_told_as_tandem_status_reads_it(calm: tuple[Mocks, LocalRouter]) -> None:
    """Workers in placement with what the index holds of them, and the load of a request in flight."""
    _, local = calm
    sent = local.send(prompt(3), "shown", max_tokens=2000)
    until(lambda: bool(sent.responses), "the first token")
    fleet = parse_fleet(get_text(f"{local.admin}/fleet").encode())
    local.router.abort("shown")
    assert sorted(worker.id for worker in fleet.workers if worker.placed) == sorted(local.placed())
    assert sum(worker.active_requests for worker in fleet.workers) == 1
    [busy] = [worker for worker in fleet.workers if worker.active_requests]
    assert (busy.active_blocks, busy.state, busy.role) == (9, "ready", "aggregated")
    assert all(worker.index_blocks > 0 and worker.total_blocks > 0 for worker in fleet.workers)
    assert isinstance(sent.wait().error, RequestCancelledError)


def test_a_burst_of_different_prompts_spreads(calm: tuple[Mocks, LocalRouter]) -> None:
    """Nobody has anything: the least loaded gets the next."""
    _, local = calm
    sent = [local.send(prompt(100 + i)) for i in range(8)]
    until(lambda: local.router.active_requests == 8 or all(one.done.is_set() for one in sent), "all to be in flight")
    loads = [load.active_requests for load in local.router.fleet.generating.loads()]
    assert max(loads) - min(loads) <= 1
    assert all(one.text for one in sent)


def test_streams_go_on_elsewhere_when_workers_die(fragile: tuple[Mocks, LocalRouter]) -> None:
    """Eight streams, two workers killed in the middle: every text equals the unbroken one."""
    fleet, local = fragile
    unbroken = [local.send(prompt(200 + i), max_tokens=100).text for i in range(8)]
    sent = [local.send(prompt(200 + i), max_tokens=100) for i in range(8)]
    until(lambda: all(one.responses for one in sent), "every stream to have begun")
    fleet.kill(0)
    fleet.kill(1)
    assert [one.text for one in sent] == unbroken
    assert local.metric("tandem_router_model_migration_total") >= 1


def test_counts_of_a_moved_answer_are_those_of_one_answer(fragile: tuple[Mocks, LocalRouter]) -> None:
    """The client can't tell from its outputs."""
    fleet, local = fragile
    sent = local.send(prompt(7), max_tokens=60, returns=("num_input_tokens", "num_output_tokens", "output_ids", "finish_reason"))
    until(lambda: bool(sent.responses), "the first token")
    loads = sorted(local.router.fleet.generating.loads(), key=lambda load: load.worker_id)
    [busy] = [i for i, load in enumerate(loads) if load.active_requests]
    fleet.kill(busy)
    assert sent.text
    with_tokens = [arrays for arrays in sent.responses if arrays.get("num_output_tokens") is not None]
    assert {int(arrays["num_input_tokens"][0]) for arrays in with_tokens} == {129}
    assert sum(int(arrays["num_output_tokens"][0]) for arrays in with_tokens) == 60
    assert sum(len(arrays["output_ids"]) for arrays in with_tokens) == 60
    assert [arrays["finish_reason"][0] for arrays in with_tokens][-1] == b"length"
    assert local.metric("tandem_router_model_migration_total") == 1


def test_a_dead_fleet_is_unavailable(fragile: tuple[Mocks, LocalRouter]) -> None:
    """Within the placement deadline, and with the fix in the message."""
    fleet, local = fragile
    for worker in range(4):
        fleet.kill(worker)
    error = local.send(prompt(9)).wait().error
    assert isinstance(error, UnavailableError)
    assert "worker" in str(error)


def test_a_draining_worker_leaves_placement(fragile: tuple[Mocks, LocalRouter]) -> None:
    """What it has still finishes."""
    fleet, local = fragile
    sent = local.send(prompt(10), max_tokens=100)
    until(lambda: bool(sent.responses), "the first token")
    for worker in range(3):
        fleet.drain(worker)
    local.wait_placed(1)
    assert sent.text
    assert local.query(prompt(10))["worker"]["id"] in local.placed()


def test_a_client_that_leaves_frees_the_worker(calm: tuple[Mocks, LocalRouter]) -> None:
    """The router's books and the worker are empty again."""
    fleet, local = calm
    sent = local.send(prompt(11), max_tokens=2000)
    until(lambda: bool(sent.responses), "the first token")
    sent.gone = True
    assert isinstance(sent.wait().error, RequestCancelledError)
    until(lambda: fleet.metric("vllm:num_requests_running") == 0, "the worker to be idle")
    assert sum(load.active_requests for load in local.router.fleet.generating.loads()) == 0


def test_an_abort_by_id_ends_the_stream(calm: tuple[Mocks, LocalRouter]) -> None:
    """As on a worker."""
    fleet, local = calm
    sent = local.send(prompt(12), "mine", max_tokens=2000)
    until(lambda: bool(sent.responses), "the first token")
    local.router.abort("mine")
    assert isinstance(sent.wait().error, RequestCancelledError)
    until(lambda: fleet.metric("vllm:num_requests_running") == 0, "the worker to be idle")


def test_a_request_has_its_own_deadline(calm: tuple[Mocks, LocalRouter]) -> None:
    """It is neither retried nor left running."""
    fleet, local = calm
    sent = local.send(prompt(13), max_tokens=2000, timeout_s=0.5)
    assert isinstance(sent.wait().error, UnavailableError)
    assert "timed out" in str(sent.error)
    until(lambda: fleet.metric("vllm:num_requests_running") == 0, "the worker to be idle")


def test_a_pinned_worker_gets_the_request(calm: tuple[Mocks, LocalRouter]) -> None:
    """Whatever it costs; an unknown one is an error that names the known."""
    _, local = calm
    worker = local.placed()[2]
    sent = local.send(prompt(14), overrides=Overrides(worker_id=worker), max_tokens=100)
    until(lambda: bool(sent.responses), "the first token")
    assert [load.worker_id for load in local.router.fleet.generating.loads() if load.active_requests] == [worker]
    assert sent.text
    error = local.send(prompt(15), overrides=Overrides(worker_id="nobody")).wait().error
    assert isinstance(error, RequestError)
    assert worker in str(error)


def test_busy_thresholds_are_set_at_run_time(calm: tuple[Mocks, LocalRouter]) -> None:
    """All workers beyond them: UNAVAILABLE; none set: served again."""
    _, local = calm
    until(lambda: local.router.active_requests == 0, "the requests of other tests to end")
    assert post_json(f"{local.admin}/busy_threshold", {"active_decode_blocks": 0})["active_decode_blocks"] == 0
    sent = [local.send(prompt(300 + i), f"busy-{i}", max_tokens=5000) for i in range(4)]
    until(lambda: all(one.responses for one in sent), "four requests in flight, one on each worker")
    error = local.send(prompt(400)).wait().error
    assert isinstance(error, UnavailableError)
    assert "all workers are busy" in str(error)
    post_json(f"{local.admin}/busy_threshold", {"active_decode_blocks": None})
    assert local.send(prompt(16)).text
    for i, one in enumerate(sent):
        local.router.abort(f"busy-{i}")
        assert isinstance(one.wait().error, RequestCancelledError)
    assert get_json(f"{local.admin}/busy_threshold")["active_decode_blocks"] is None
    assert "active_decode_blocks" in post_json(f"{local.admin}/busy_threshold", {"nonsense": 1})["error"]


def test_a_wrong_block_size_is_refused_with_a_sentence(calm: tuple[Mocks, LocalRouter]) -> None:
    """The others go on."""
    _, local = calm
    with mocks(Path(local.router.settings.discovery.removeprefix("file:")), "--block-size", "32", "--name", "odd"):
        fleet = f"{local.admin}/fleet"
        until(lambda: any("expects blocks of 16" in worker["reason"] for worker in get_json(fleet)["workers"]), "a refusal")
        assert local.send(prompt(17)).text


@pytest.fixture
def prefill(tmp_path: Path) -> Iterator[Mocks]:
    """One prefill worker."""
    with mocks(tmp_path, "--role", "prefill", "--name", "p") as running:
        yield running


@pytest.fixture
def decode(tmp_path: Path) -> Iterator[Mocks]:
    """Two decode workers."""
    with mocks(tmp_path, "--role", "decode", "--workers", "2", "--name", "d") as running:
        yield running


def test_prefill_and_decode_are_two_workers(tmp_path: Path, prefill: Mocks, decode: Mocks, tokenizer: Path) -> None:
    """The prompt is computed once, by the prefill worker."""
    with router(tmp_path, 3, tokenizer) as local:
        answer = local.query(prompt(20))
        assert answer["prefill"]["remote"]
        before = prefill.metric("vllm:prompt_tokens_total")
        assert local.send(prompt(20)).text
        assert prefill.metric("vllm:prompt_tokens_total") - before == 129


def test_without_prefill_the_decode_worker_serves_alone(tmp_path: Path, prefill: Mocks, decode: Mocks, tokenizer: Path) -> None:
    """The text is the same; the fallback is counted."""
    with router(tmp_path, 3, tokenizer) as local:
        text = local.send(prompt(21)).text
        prefill.kill(0)
        assert local.send(prompt(21)).text == text


def test_a_lost_prefill_worker_is_replaced_by_another(tmp_path: Path, prefill: Mocks, decode: Mocks, tokenizer: Path) -> None:
    """The decode worker prefills by itself only when no other is left."""
    turns = {"DYN_ROUTER_MODE": "round-robin"}
    with mocks(tmp_path, "--role", "prefill", "--name", "q") as other, router(tmp_path, 4, tokenizer, **turns) as local:
        assert local.send(prompt(40)).text
        prefill.kill(0)
        before = other.metric("vllm:prompt_tokens_total")
        for number in range(41, 45):
            assert local.send(prompt(number)).text
        assert other.metric("vllm:prompt_tokens_total") - before == 4 * 129


def test_enforced_disaggregation_fails_instead(tmp_path: Path, prefill: Mocks, decode: Mocks, tokenizer: Path) -> None:
    """An operator who wants that gets an error that says so."""
    with router(tmp_path, 3, tokenizer, DYN_ENFORCE_DISAGG="true") as local:
        assert local.send(prompt(22)).text
        prefill.kill(0)
        error = local.send(prompt(23)).wait().error
        assert isinstance(error, UnavailableError)
        assert "disaggregation is enforced" in str(error)


def test_a_transfer_that_never_ends_costs_its_bound_once(tmp_path: Path, prefill: Mocks, tokenizer: Path) -> None:
    """The only decode worker then prefills by itself, also for those after it, and isn't taken for dead."""
    settings = {"TANDEM_ROUTER_TRANSFER_TIMEOUT_S": "1"}
    with mocks(tmp_path, "--role", "decode", "--name", "d", "--transfer-gbps", "1e-9"), router(tmp_path, 2, tokenizer, **settings) as local:
        began = time.monotonic()
        assert local.send(prompt(30)).text
        assert 1.0 <= time.monotonic() - began < 4.0
        before, began = prefill.metric("vllm:prompt_tokens_total"), time.monotonic()
        assert local.send(prompt(31)).text
        assert time.monotonic() - began < 1.0
        assert prefill.metric("vllm:prompt_tokens_total") == before
        assert len(local.placed()) == 2


def test_short_prompts_are_prefilled_by_the_decode_worker(tmp_path: Path, prefill: Mocks, decode: Mocks, tokenizer: Path) -> None:
    """Conditional disaggregation goes by what the decode worker has not cached, exactly."""
    settings = {"DYN_ROUTER_CONDITIONAL_DISAGG": "true", "TANDEM_CONDITIONAL_DISAGG_TOKENS": "129"}
    with router(tmp_path, 3, tokenizer, **settings) as local:
        before = prefill.metric("vllm:prompt_tokens_total")
        assert local.send(prompt(24)[:128]).text
        assert prefill.metric("vllm:prompt_tokens_total") == before
        assert local.send(prompt(25)).text
        assert prefill.metric("vllm:prompt_tokens_total") - before == 129


@dataclass(frozen=True)
class Stages:
    """A prefill worker and a decode worker that take their time, and a router."""

    prefill: Mocks
    decode: Mocks
    local: LocalRouter

    def held(self) -> tuple[float, ...]:
        """All that somebody keeps for requests: requests and blocks of both workers, handoffs, the books, the router's own."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "tandem_mock_held_handoffs")
        booked = sum(load.active_requests for pool in self.local.router.fleet.pools.values() for load in pool.loads())
        return (*(side.metric(name) for side in (self.prefill, self.decode) for name in names), booked, self.local.router.active_requests)

    def leave(self, sent: Recorder, before: tuple[float, ...]) -> None:
        """The client goes away, and within a second all that was kept for it is free."""
        sent.gone = True
        wait_for(lambda: sent.done.is_set() and all(map(operator.le, self.held(), before)), FREED_S, "all to be free")
        assert isinstance(sent.error, RequestCancelledError)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Iterator[Stages]:
    """A prompt of 3,200 tokens takes seconds to prefill, in many steps, one prompt at a time; one of 128 takes seconds to transfer."""
    folder = tmp_path_factory.mktemp("stages")
    with mocks(folder, "--role", "prefill", "--name", "p", *CHUNKS) as prefill, \
            mocks(folder, "--role", "decode", "--name", "d", "--transfer-gbps", "0.01") as decode, router(folder, 2, tokenizer) as local:
        yield Stages(prefill, decode, local)


def test_a_client_that_leaves_during_prefill_frees_both_sides(stages: Stages) -> None:
    """The prefill worker computes for nobody else."""
    before = stages.held()
    sent = stages.local.send(prompt(26, blocks=200))
    until(lambda: stages.prefill.metric("vllm:num_requests_running") == 1, "the prefill")
    stages.leave(sent, before)


def test_a_client_that_leaves_the_queue_frees_its_place(stages: Stages) -> None:
    """Whoever is before it goes on."""
    first = stages.local.send(prompt(27, blocks=200), "first")
    until(lambda: stages.prefill.metric("vllm:num_requests_running") == 1, "the first one's prefill")
    second = stages.local.send(prompt(28, blocks=200))
    until(lambda: stages.prefill.metric("vllm:num_requests_waiting") == 1, "the second one to queue")
    second.gone = True
    wait_for(lambda: second.done.is_set() and stages.prefill.metric("vllm:num_requests_waiting") == 0, FREED_S, "its place to be free")
    assert isinstance(second.error, RequestCancelledError)
    until(lambda: stages.local.router.active_requests == 1, "the router to have only the first one")
    assert not first.done.is_set()
    stages.local.router.abort("first")
    assert isinstance(first.wait().error, RequestCancelledError)


def test_a_client_that_leaves_during_decode_frees_both_sides(stages: Stages) -> None:
    """After a remote prefill."""
    before = stages.held()
    sent = stages.local.send(prompt(30)[:2], max_tokens=5000)
    until(lambda: bool(sent.responses), "the first token")
    stages.leave(sent, before)


def test_a_client_that_leaves_during_the_transfer_frees_both_sides(stages: Stages) -> None:
    """The prefill worker's blocks don't wait for their lease. The last of these tests: a mock's link stays busy with what was given up."""
    before = stages.held()
    sent = stages.local.send(prompt(29))
    until(lambda: stages.decode.metric("vllm:num_requests_waiting") == 1, "the transfer")
    assert not sent.responses
    stages.leave(sent, before)


def test_a_client_that_leaves_before_there_is_a_worker_ends_its_wait(tmp_path: Path, tokenizer: Path) -> None:
    """The router holds nothing for it."""
    with router(tmp_path, 0, tokenizer) as local:
        sent = local.send(prompt(31))
        until(lambda: local.router.active_requests == 1, "the request to wait")
        sent.gone = True
        wait_for(lambda: sent.done.is_set() and local.router.active_requests == 0, FREED_S, "the end of the request")
        assert isinstance(sent.error, RequestCancelledError)


@pytest.mark.skipif(BINARY is None, reason="etcd is not installed (Debian: apt-get install etcd-server)")
def test_traffic_goes_on_while_etcd_is_away(tmp_path: Path, tokenizer: Path) -> None:
    """Killed with traffic running, away for longer than a lease, started again empty: no request is lost, no worker forgotten."""
    etcd = Etcd(tmp_path)
    etcd.start()
    try:
        with mocks(etcd.url, "--workers", "2", *SLOW) as _, router(etcd.url, 2, tokenizer) as local:
            sent = [local.send(prompt(500 + i), max_tokens=100) for i in range(4)]
            etcd.kill(wipe=True)
            away = time.monotonic()
            while time.monotonic() - away < LEASE_TTL_S + 2:
                sent.append(local.send(prompt(500 + len(sent)), max_tokens=30))
                assert sent[-1].text
            etcd.start()
            until(etcd.answers, "etcd to be back")
            sent.append(local.send(prompt(600)))
            assert all(one.text for one in sent)
            assert len(local.placed()) == 2
    finally:
        etcd.kill()
