# SPDX-License-Identifier: Apache-2.0
"""The contract of vLLM's `OffloadingManager` for host memory over a tier of ours, whatever store lies below: the tier's tests inherit it.

Each test does what vLLM's scheduler does in its steps, and looks at the bytes in host memory.
"""

import threading
import time
import uuid
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from vllm.v1.kv_offload.base import LookupResult, Medium, OffloadingEvent, ReqContext, ScheduleEndContext
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager

from store_contract import BLOCK_BYTES, CAPACITY, WAIT_S, Make, block_of, key_of
from tandem_kvbm.manager import KvbmManager
from tandem_kvbm.sizing import TierPlan
from tandem_kvbm.stats import KvbmStats, Level
from tandem_kvbm.tier import StoreTier

HOST_BLOCKS = 4
SPEC = SimpleNamespace(kv_events_config=SimpleNamespace(enable_kv_cache_events=True))


class Scheduler:
    """A manager over one tier, and the scheduler's part. `close` ends both."""

    def __init__(self, make: Make) -> None:
        self._region = SharedOffloadRegion(engine_id=f"test-{uuid.uuid4()}", num_chunks=HOST_BLOCKS, rank=None,
                                           kv_bytes_per_chunk=BLOCK_BYTES, cpu_page_size=BLOCK_BYTES)
        primary = CPUPrimaryTierOffloadingManager(num_chunks=HOST_BLOCKS, cache_policy="lru", cache_policy_module_path=None,
                                                  enable_events=True, mmap_region=self._region)
        view = primary.get_kv_memoryview()
        self.rows = np.asarray(view)
        self.tier = StoreTier(SPEC, view, "TestTier", make())
        stats = KvbmStats((Level.HOST, Level.DISK), 1, 10)
        plan = TierPlan(BLOCK_BYTES, HOST_BLOCKS, staging=False, disk_blocks=CAPACITY, object_blocks=None)
        self.manager = KvbmManager(primary, [self.tier], plan, stats, 0.0)
        self.requests: list[ReqContext] = []

    def request(self) -> ReqContext:
        """A new one."""
        self.requests.append(ReqContext(req_id=f"r{len(self.requests)}"))
        self.manager.on_new_request(self.requests[-1])
        return self.requests[-1]

    def begin_store(self, request: ReqContext, *numbers: int) -> list[bytes]:
        """Blocks of the device go to host memory; what the manager took of them, still being written."""
        output = self.manager.prepare_store([key_of(number) for number in numbers], request)
        assert output is not None
        by_key = {key_of(number): number for number in numbers}
        for key, row in zip(output.keys_to_store, output.store_spec.block_ids, strict=True):
            self.rows[row] = np.frombuffer(block_of(by_key[key]), np.uint8)
        return output.keys_to_store

    def store(self, *numbers: int) -> ReqContext:
        """A request that computes blocks, until the tier has them, too."""
        request = self.request()
        self.manager.complete_store(self.begin_store(request, *numbers), request)
        self.settle()
        self.manager.on_request_finished(request)
        return request

    def lookup(self, request: ReqContext, number: int) -> LookupResult:
        """The answer, after as many steps as it takes; a block on its way is waited for."""
        deadline = time.monotonic() + WAIT_S
        while (answer := self.manager.lookup(key_of(number), request)) in (LookupResult.RETRY, LookupResult.HIT_PENDING):
            assert time.monotonic() < deadline, "no answer"
            self.step()
        return answer

    def found(self, *numbers: int) -> list[bool]:
        """What a new request finds, and that it is right."""
        request = self.request()
        answers = []
        for number in numbers:
            answers.append(self.lookup(request, number) is LookupResult.HIT)
            if answers[-1]:
                assert self.load(request, number) == block_of(number)
        self.manager.on_request_finished(request)
        return answers

    def load(self, request: ReqContext, number: int) -> bytes:
        """To the device."""
        spec = self.manager.prepare_load([key_of(number)], request)
        content = bytes(self.rows[spec.block_ids[0]])
        self.manager.complete_load([key_of(number)], request)
        return content

    def step(self) -> None:
        """The end of a step."""
        self.manager.on_schedule_end(ScheduleEndContext((), ()))
        threading.Event().wait(0.001)  # a step of the engine takes time, too

    def settle(self) -> None:
        """Steps until nothing is under way."""
        deadline = time.monotonic() + WAIT_S
        while self.manager._transfer_jobs or self.tier._pool.active:
            assert time.monotonic() < deadline, "a job does not end"
            self.step()

    def events(self) -> list[OffloadingEvent]:
        """Since the last call."""
        return list(self.manager.take_events())

    def close(self) -> None:
        """As the engine ends."""
        del self.rows
        self.manager.shutdown()


class ManagerContract:
    """What holds over every store of CAPACITY blocks that nobody else uses; subclasses give the fixture `make`."""

    @pytest.fixture
    def scheduler(self, make: Make) -> Iterator[Scheduler]:
        """With an empty store."""
        made = Scheduler(make)
        yield made
        made.close()

    def test_blocks_are_found_in_both_tiers_and_right(self, scheduler: Scheduler) -> None:
        """From host memory, and after its reset from below."""
        scheduler.store(1, 2)
        assert scheduler.found(1, 2, 3) == [True, True, False]
        scheduler.manager.reset_cache()
        assert scheduler.found(1, 2, 3) == [True, True, False]

    def test_a_block_that_is_being_stored_is_pending_and_then_found(self, scheduler: Scheduler) -> None:
        """Nobody reads half a block."""
        request = scheduler.request()
        stored = scheduler.begin_store(request, 1)
        assert scheduler.manager.lookup(key_of(1), scheduler.request()) is LookupResult.HIT_PENDING
        scheduler.manager.complete_store(stored, request)
        assert scheduler.found(1) == [True]

    def test_a_store_that_failed_leaves_no_block_anywhere(self, scheduler: Scheduler) -> None:
        """Nor an announcement."""
        request = scheduler.request()
        scheduler.manager.complete_store(scheduler.begin_store(request, 1), request, success=False)
        scheduler.settle()
        assert scheduler.found(1) == [False]
        assert scheduler.tier.store.stats().blocks == 0
        assert scheduler.events() == []

    def test_storing_again_stores_nothing(self, scheduler: Scheduler) -> None:
        """A block that is there is only touched."""
        scheduler.store(1)
        request = scheduler.request()
        assert scheduler.begin_store(request, 1, 2) == [key_of(2)]

    def test_blocks_that_are_being_loaded_are_not_given_up(self, scheduler: Scheduler) -> None:
        """However many others come: then nothing is stored, and what was promised is there."""
        scheduler.store(1, 2, 3, 4)
        reader = scheduler.request()
        assert [scheduler.lookup(reader, number) for number in (1, 2, 3)] == [LookupResult.HIT] * 3
        keys = [key_of(number) for number in (1, 2, 3)]
        spec = scheduler.manager.prepare_load(keys, reader)
        writer = scheduler.request()
        assert scheduler.manager.prepare_store([key_of(number) for number in (11, 12)], writer) is None
        scheduler.store(13)
        assert [bytes(scheduler.rows[row]) for row in spec.block_ids] == [block_of(number) for number in (1, 2, 3)]
        scheduler.manager.complete_load(keys, reader)
        assert scheduler.found(13) == [True]

    def test_blocks_on_their_way_down_are_not_given_up(self, scheduler: Scheduler) -> None:
        """Their rows are read by the tier's threads until they have arrived: what arrives is theirs."""
        first, second = scheduler.request(), scheduler.request()
        scheduler.manager.complete_store(scheduler.begin_store(first, 1, 2, 3, 4), first)
        output = scheduler.manager.prepare_store([key_of(5)], second)
        if output is not None:  # a quick store has some of them already
            scheduler.rows[output.store_spec.block_ids[0]] = 0
            scheduler.manager.complete_store(output.keys_to_store, second, success=False)
        scheduler.settle()
        scheduler.manager.reset_cache()
        assert scheduler.found(1, 2, 3, 4) == [True] * 4

    def test_more_blocks_than_host_memory_come_back_from_below(self, scheduler: Scheduler) -> None:
        """As many as the store holds, the last ones."""
        for number in range(CAPACITY + 2):
            scheduler.store(number)
        assert scheduler.found(*range(CAPACITY + 2)) == [False] * 2 + [True] * CAPACITY
        assert scheduler.tier.store.stats().blocks == CAPACITY

    def test_work_that_is_pending_ends_by_steps_alone(self, scheduler: Scheduler) -> None:
        """vLLM steps an idle engine while there is any, and only then."""
        request = scheduler.request()
        scheduler.manager.complete_store(scheduler.begin_store(request, 1, 2), request)
        assert scheduler.manager.has_pending_work()
        deadline = time.monotonic() + WAIT_S
        while scheduler.manager.has_pending_work():
            assert time.monotonic() < deadline, "the engine would never rest"
            scheduler.step()
            scheduler.events()
        assert scheduler.tier.store.stats().blocks == 2

    def test_a_reset_with_blocks_on_their_way_waits_for_them(self, scheduler: Scheduler) -> None:
        """The rows are given to others afterwards."""
        request = scheduler.request()
        scheduler.manager.complete_store(scheduler.begin_store(request, 1, 2), request)
        scheduler.manager.reset_cache()
        assert scheduler.manager.host_blocks_used == 0
        scheduler.rows[:] = 0
        assert scheduler.found(1, 2) == [True, True]

    def test_every_removal_follows_its_arrival(self, scheduler: Scheduler) -> None:
        """Per medium; in the end the listener believes what is true."""
        believed: dict[Medium, set[bytes]] = {Medium.CPU: set(), Medium.STORAGE: set()}
        for number in range(2 * CAPACITY):
            scheduler.store(number)
            for event in scheduler.events():
                known, keys = believed[event.medium], set(event.keys)
                assert keys <= known if event.removed else not keys & known
                known ^= keys
        held = {key_of(number) for number in range(2 * CAPACITY) if scheduler.tier.store.probe([key_of(number)])[0]}
        assert believed[Medium.STORAGE] == held
        assert len(believed[Medium.CPU]) == scheduler.manager.host_blocks_used

    def test_a_reset_of_the_tier_empties_it_and_says_so(self, scheduler: Scheduler) -> None:
        """Host memory keeps its own."""
        scheduler.store(1, 2)
        scheduler.events()
        assert scheduler.tier.reset() == 2
        assert [(sorted(event.keys), event.removed) for event in scheduler.events()] == [(sorted([key_of(1), key_of(2)]), True)]
        assert scheduler.found(1, 2) == [True, True]
        scheduler.manager.reset_cache()
        assert scheduler.found(1, 2) == [False, False]


