# SPDX-License-Identifier: Apache-2.0
"""A store as a tier: what the scheduler sees, and that nothing late touches a slot."""

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.kv_offload.base import LookupResult, OffloadPolicy, ReqContext
from vllm.v1.kv_offload.tiering.base import JobResult, TransferJob
from vllm.v1.request import Request

from store_contract import BLOCK_BYTES, WAIT_S, block_of, key_of
from tandem_kvbm.memory_store import MemoryStore
from tandem_kvbm.policies.admission import Admission
from tandem_kvbm.store import BlockStore, StoreUnavailableError, Written
from tandem_kvbm.tier import StoreTier, TierOptions
from tandem_worker.sampling import generation_params, parse_sampling

ROWS = 16
SPEC = SimpleNamespace(kv_events_config=SimpleNamespace(enable_kv_cache_events=True))


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class SlowStore(MemoryStore):
    """Holds reads and writes at a gate; refuses them on demand; can pretend that only a probe knows."""

    def __init__(self, capacity: int = 8) -> None:
        super().__init__(capacity, BLOCK_BYTES)
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.gate.set()
        self.broken = self.only_probes = False

    def holds(self, key: bytes) -> bool | None:
        return None if self.only_probes else super().holds(key)

    def probe(self, keys: Any) -> list[bool]:
        self._pass()
        return super().probe(keys)

    def read(self, key: bytes, into: memoryview) -> None:
        self._pass()
        super().read(key, into)

    def write(self, key: bytes, block: memoryview, priority: int = 0) -> Written:
        self._pass()
        return super().write(key, block, priority)

    def _pass(self) -> None:
        self.entered.release()
        assert self.gate.wait(WAIT_S)
        if self.broken:
            raise StoreUnavailableError("broken")


class Bench:
    """A tier over rows of memory, and what vLLM would do with it."""

    def __init__(self, store: BlockStore, clock: Clock, admission: Admission | None = None, **options: Any) -> None:
        self.memory = np.zeros((ROWS, BLOCK_BYTES), np.uint8)
        self.tier = StoreTier(SPEC, memoryview(self.memory), "TestTier", store, options=TierOptions(**{"threads": 2, **options}),
                              admission=admission, clock=clock)
        self.request = ReqContext(req_id="r")
        self._jobs = 0

    def fill(self, row: int, number: int) -> None:
        self.memory[row] = np.frombuffer(block_of(number), np.uint8)

    def job(self, blocks: dict[int, int], load: bool) -> int:
        """Blocks by number -> row; returns the job's id."""
        self._jobs += 1
        rows = np.array(list(blocks.values()), np.int32)
        job = TransferJob(job_id=self._jobs, keys=[key_of(number) for number in blocks], chunk_ids=rows,
                          is_promotion=load, req_context=self.request)
        (self.tier.submit_load if load else self.tier.submit_store)(job)
        return self._jobs

    def store(self, *numbers: int) -> JobResult:
        for row, number in enumerate(numbers):
            self.fill(row, number)
        return self.result(self.job({number: row for row, number in enumerate(numbers)}, load=False))

    def load(self, number: int, row: int) -> JobResult:
        return self.result(self.job({number: row}, load=True))

    def result(self, job_id: int) -> JobResult:
        found: list[JobResult] = []
        until(lambda: found.extend(self.tier.get_finished_jobs()) or bool(found))
        assert [result.job_id for result in found] == [job_id]
        return found[0]

    def lookup(self, number: int) -> LookupResult:
        return self.tier.lookup(key_of(number), self.request)

    def events(self) -> list[tuple[set[bytes], bool]]:
        return [(set(event.keys), event.removed) for event in self.tier.take_events()]


def until(condition: Callable[[], bool]) -> None:
    """Waits on a condition, within a bound that only a failing test reaches."""
    deadline, pause = time.monotonic() + WAIT_S, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        pause.wait(0.002)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def slow() -> SlowStore:
    return SlowStore()


@pytest.fixture
def bench(slow: SlowStore, clock: Clock) -> Iterator[Bench]:
    made = Bench(slow, clock, queue_blocks=3)
    yield made
    slow.gate.set()
    made.tier.shutdown()


def test_a_block_goes_down_and_comes_back(bench: Bench) -> None:
    assert bench.store(1, 2) == JobResult(1, True, None, 0.0, 2 * BLOCK_BYTES)
    assert bench.lookup(1) is LookupResult.HIT
    assert bench.lookup(3) is LookupResult.MISS
    result = bench.load(2, row=9)
    assert result.success
    assert bytes(bench.memory[9]) == block_of(2)
    counts = bench.tier.counters.take()
    assert (counts["stored"], counts["loaded"], counts["hits"], counts["misses"]) == (2, 1, 1, 1)


def test_a_block_that_was_written_anew_is_found_at_once(bench: Bench, clock: Clock) -> None:
    """A load that failed keeps requests from its block for a while, but not from its successor."""
    bench.job({1: 0}, load=True)
    until(lambda: not all(result.success for result in bench.tier.get_finished_jobs()))
    assert bench.store(1).success
    assert bench.lookup(1) is LookupResult.HIT


def test_a_partial_load_names_what_arrived_and_avoids_the_rest_for_a_while(bench: Bench, clock: Clock) -> None:
    bench.store(1)
    result = bench.result(bench.job({1: 5, 2: 6}, load=True))
    assert not result.success
    assert result.successful_keys == (key_of(1),)
    bench.tier.store.write(key_of(2), memoryview(block_of(2)))  # by another worker
    assert bench.lookup(2) is LookupResult.MISS, "its load failed just now"
    clock.now += 11.0
    assert bench.lookup(2) is LookupResult.HIT


def test_a_load_past_its_deadline_never_writes_into_its_slot(bench: Bench, slow: SlowStore, clock: Clock) -> None:
    bench.store(1)
    assert slow.entered.acquire(timeout=WAIT_S)
    slow.gate.clear()
    job = bench.job({1: 7}, load=True)
    assert slow.entered.acquire(timeout=WAIT_S)
    clock.now += 31.0
    assert not bench.result(job).success
    bench.fill(7, 99)
    slow.gate.set()
    until(lambda: not bench.tier._pool._busy_since)
    assert bytes(bench.memory[7]) == block_of(99), "the slot was another block's by then"
    assert bench.tier.counters.take()["expired_loads"] == 1


def test_a_store_past_its_deadline_keeps_the_content_of_its_moment(bench: Bench, slow: SlowStore, clock: Clock) -> None:
    slow.gate.clear()
    bench.fill(0, 1)
    job = bench.job({1: 0}, load=False)
    assert slow.entered.acquire(timeout=WAIT_S)
    clock.now += 31.0
    assert not bench.result(job).success
    bench.fill(0, 99)
    slow.gate.set()
    until(lambda: slow.holds(key_of(1)) is True)
    assert bench.load(1, row=3).success
    assert bytes(bench.memory[3]) == block_of(1)


def test_a_full_queue_drops_the_tail_and_counts_it(bench: Bench, slow: SlowStore) -> None:
    slow.gate.clear()
    bench.job({100: 0}, load=False)
    assert slow.entered.acquire(timeout=WAIT_S)
    job = bench.job({number: number for number in range(5)}, load=False)
    slow.gate.set()
    until(lambda: bench.tier._pool.active == 0)
    assert {result.job_id for result in bench.tier.get_finished_jobs()} == {1, job}
    assert [slow.holds(key_of(number)) for number in range(5)] == [True, True, True, False, False]
    assert bench.tier.counters.take()["dropped"] == 2


def test_loads_pass_waiting_stores(bench: Bench, slow: SlowStore) -> None:
    bench.store(50)
    slow.gate.clear()
    bench.job({number: number for number in range(4)}, load=False)
    bench.job({50: 9}, load=True)
    until(lambda: len(bench.tier._pool._busy_since) == 2)
    assert not bench.tier._pool._loads, "one thread is never a store's"
    slow.gate.set()
    until(lambda: bench.tier._pool.active == 0)


def test_a_store_that_fails_is_a_miss_and_a_count(bench: Bench, slow: SlowStore) -> None:
    bench.store(1)
    slow.broken = True
    assert not bench.load(1, row=2).success
    assert bench.store(2).transfer_bytes == 0
    counts = bench.tier.counters.take()
    assert (counts["read_failures"], counts["write_failures"]) == (1, 1)


def test_events_tell_what_came_and_what_was_given_up(bench: Bench) -> None:
    bench.store(*range(3))
    assert bench.events() == [({key_of(number) for number in range(3)}, False)]
    for number in range(3, 9):
        bench.store(number)
    assert bench.events() == [({key_of(number) for number in range(3, 9)}, False), ({key_of(0)}, True)]
    assert bench.events() == []
    assert bench.tier.reset() == 8
    assert bench.events() == [({key_of(number) for number in range(1, 9)}, True)]


def test_a_lookup_that_needs_the_store_is_retried_then_answered(bench: Bench, slow: SlowStore) -> None:
    bench.store(1)
    slow.only_probes = True
    assert bench.lookup(1) is LookupResult.RETRY
    assert bench.lookup(2) is LookupResult.RETRY

    def answered() -> bool:
        bench.tier.on_schedule_end(SimpleNamespace(new_req_ids=(), preempted_req_ids=()))
        return bench.lookup(1) is LookupResult.HIT

    until(answered)
    assert bench.lookup(2) is LookupResult.MISS
    bench.tier.on_request_finished(bench.request)


def test_a_lookup_without_an_answer_is_a_miss_at_its_deadline(bench: Bench, slow: SlowStore, clock: Clock) -> None:
    slow.only_probes = True
    slow.gate.clear()
    assert bench.lookup(1) is LookupResult.RETRY
    bench.tier.on_schedule_end(SimpleNamespace(new_req_ids=(), preempted_req_ids=()))
    clock.now += 1.1
    assert bench.lookup(1) is LookupResult.MISS
    assert bench.tier.counters.take()["lookup_failures"] == 1


def test_an_answer_after_the_deadline_is_dropped(bench: Bench, slow: SlowStore, clock: Clock) -> None:
    """vLLM's own asserts that there is none, which would end the engine."""
    step = SimpleNamespace(new_req_ids=(), preempted_req_ids=())
    bench.store(1)
    slow.only_probes = True
    slow.gate.clear()
    assert bench.lookup(1) is LookupResult.RETRY
    bench.tier.on_schedule_end(step)
    clock.now += 1.1
    assert bench.lookup(1) is LookupResult.MISS
    slow.gate.set()

    def answered() -> bool:
        bench.tier.on_schedule_end(step)
        return bench.lookup(2) is LookupResult.MISS

    until(answered)
    assert bench.lookup(1) is LookupResult.MISS


def test_a_block_whose_load_fails_while_it_is_looked_up_is_a_miss(bench: Bench, slow: SlowStore, clock: Clock) -> None:
    """Asked about, but the question not sent yet, when another request's load of it fails."""
    slow.only_probes = True
    assert bench.lookup(1) is LookupResult.RETRY
    assert not bench.load(1, 0).success
    clock.now += 60.0
    for _ in range(2):
        bench.tier.on_schedule_end(SimpleNamespace(new_req_ids=(), preempted_req_ids=()))
        assert bench.lookup(1) is LookupResult.MISS


def test_the_filter_writes_what_a_second_request_brings_back(clock: Clock) -> None:
    store = MemoryStore(8, BLOCK_BYTES)
    bench = Bench(store, clock, Admission(clock=clock))
    assert bench.tier.on_new_request(bench.request).policy is OffloadPolicy.REQUEST_LEVEL
    assert bench.store(1).success
    assert bench.store(1).success, "offered twice by one request is seen once"
    assert not store.holds(key_of(1))
    bench.tier.on_request_finished(bench.request)
    bench.store(1)
    assert store.holds(key_of(1))
    assert bench.tier.counters.take()["filtered"] == 2
    bench.tier.shutdown()


def test_what_a_request_says_of_its_blocks_decides_what_is_given_up(clock: Clock) -> None:
    """From the client's sampling parameters through vLLM's request to the store."""
    params = generation_params(parse_sampling({"kvbm_priority": "5"}), stream=False, detokenize=False, stream_interval=1)
    asked = Request("dear", [1, 2, 3], params, None)
    bench = Bench(MemoryStore(2, BLOCK_BYTES), clock)
    bench.request = ReqContext(req_id="dear", kv_transfer_params=asked.kv_transfer_params)
    bench.store(1)
    bench.request = ReqContext(req_id="cheap")
    bench.store(2)
    bench.store(3)
    assert [bench.lookup(number) for number in (1, 2, 3)] == [LookupResult.HIT, LookupResult.MISS, LookupResult.HIT]
    bench.request = ReqContext(req_id="odd", kv_transfer_params={"kvbm_priority": "much"})
    assert bench.store(4).success, "no client can end the engine by it"
    bench.tier.shutdown()


def test_a_stuck_store_is_missed_and_spared_until_it_moves_again(bench: Bench, slow: SlowStore, clock: Clock) -> None:
    """Nothing is asked of it and nothing queued for it, so that no request waits and no row of host memory is held."""
    bench.store(1)
    assert slow.entered.acquire(timeout=WAIT_S)
    slow.gate.clear()
    job = bench.job({1: 7, 2: 8}, load=True)
    assert all(slow.entered.acquire(timeout=WAIT_S) for _ in range(2))
    clock.now += 31.0
    assert not bench.result(job).success
    clock.now += 11.0  # the blocks of that load are no longer avoided
    assert bench.lookup(1) is LookupResult.MISS
    assert not bench.store(3).success
    assert bench.tier.counters.take()["dropped"] == 1
    slow.gate.set()
    until(lambda: not bench.tier._pool.stuck())
    assert bench.lookup(1) is LookupResult.HIT
    assert bench.store(3).success


def test_draining_ends_every_job(bench: Bench) -> None:
    jobs = {bench.job({number: number}, load=False) for number in range(3)}
    bench.tier.drain_jobs()
    assert {result.job_id for result in bench.tier.get_finished_jobs()} == jobs


def test_every_count_and_gauge_is_declared(bench: Bench) -> None:
    bench.store(1)
    bench.lookup(2)
    stats = bench.tier.get_stats()
    assert stats is not None
    assert set(stats.data["data"]) <= set(StoreTier.build_metric_definitions({}))
    assert bench.tier.get_stats() is None
