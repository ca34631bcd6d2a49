# SPDX-License-Identifier: Apache-2.0
"""Transfer threads that hang in the kernel: seen by the clock, left alone, and of use again when they come back."""

import threading
from collections.abc import Iterator

import pytest

from store_contract import BLOCK_BYTES, WAIT_S
from tandem_kvbm.transfers import Copy, Transfer, TransferPool

DEADLINE_S = 30.0


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Hanging:
    """A store whose transfers hang until they are let go, one by one."""

    def __init__(self) -> None:
        self.entered, self.let_go = threading.Semaphore(0), threading.Semaphore(0)

    def move(self, transfer: Transfer, buffer: memoryview, copy: Copy) -> bool:
        self.entered.release()
        return self.let_go.acquire(timeout=WAIT_S)

    def wait_entered(self, count: int) -> None:
        for _ in range(count):
            assert self.entered.acquire(timeout=WAIT_S)


@pytest.fixture
def hanging() -> Hanging:
    return Hanging()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pool(hanging: Hanging, clock: Clock) -> Iterator[TransferPool]:
    made = TransferPool(hanging.move, name="test", block_bytes=BLOCK_BYTES, threads=2, queue_blocks=8, deadline_s=DEADLINE_S, clock=clock)
    yield made
    hanging.let_go.release(100)
    made.close()


def until_idle(pool: TransferPool) -> None:
    """Until no thread has a block."""
    with pool._changed:
        assert pool._changed.wait_for(lambda: not pool._busy_since, WAIT_S)


def test_a_pool_is_stuck_when_every_thread_hangs_longer_than_a_job_may_take(pool: TransferPool, hanging: Hanging, clock: Clock) -> None:
    """And not before."""
    assert not pool.stuck()
    pool.submit_load(1, [(b"a", 0), (b"b", 1)])
    hanging.wait_entered(2)
    assert not pool.stuck()
    clock.now += DEADLINE_S - 0.1
    assert not pool.stuck()
    clock.now += 0.2
    assert pool.stuck()


def test_one_free_thread_is_enough(pool: TransferPool, hanging: Hanging, clock: Clock) -> None:
    """Stores may take all threads but one."""
    pool.submit_store(1, [(b"a", 0), (b"b", 1)])
    hanging.wait_entered(1)
    clock.now += 10 * DEADLINE_S
    assert not pool.stuck()
    pool.submit_load(2, [(b"c", 2)])
    hanging.wait_entered(1)
    assert not pool.stuck(), "the load has only begun"


def test_jobs_of_a_stuck_pool_are_reported_and_its_threads_are_of_use_again(pool: TransferPool, hanging: Hanging, clock: Clock) -> None:
    """A disk that comes back after minutes is a disk again; what it says of jobs that are over is forgotten."""
    pool.submit_load(1, [(b"a", 0), (b"b", 1)])
    hanging.wait_entered(2)
    pool.submit_load(2, [(b"c", 2)])
    clock.now += DEADLINE_S + 1
    assert {job.id: (job.expired, job.moved) for job in pool.finished()} == {1: (True, []), 2: (True, [])}
    assert pool.stuck()
    assert pool.active == 0
    hanging.let_go.release(2)
    until_idle(pool)
    assert not pool.stuck()
    assert pool.finished() == []
    pool.submit_load(3, [(b"d", 3)])
    hanging.wait_entered(1)
    hanging.let_go.release()
    pool.drain(WAIT_S)
    assert [(job.id, job.expired, job.moved) for job in pool.finished()] == [(3, False, [b"d"])]


def test_the_end_of_a_stuck_pool_has_a_bound(pool: TransferPool, hanging: Hanging, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's end is not the disk's."""
    monkeypatch.setattr("tandem_kvbm.transfers._CLOSE_S", 0.05)
    pool.submit_load(1, [(b"a", 0), (b"b", 1)])
    hanging.wait_entered(2)
    pool.close()
    assert [(job.id, job.expired) for job in pool.finished()] == [(1, True)]
    assert any(thread.is_alive() for thread in pool._threads), "daemons that hang in the kernel"
