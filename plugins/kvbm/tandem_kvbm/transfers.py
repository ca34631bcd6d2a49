# SPDX-License-Identifier: Apache-2.0
"""Threads that move blocks between the primary tier's memory and a store.

The scheduler's thread submits jobs and collects them, and never waits for more than a lock that is held for a few
instructions. Transfer threads take one block at a time, loads before stores. Every thread has a buffer of its own, and a block
passes through it in both directions: the copy into or out of the primary tier is the only moment at which a thread touches that
memory, and a job that is over refuses it. So a job past its deadline can be reported at once, while a read or write that hangs
in the kernel still can't corrupt a slot that was given to another block. The price is one copy per block in memory.
"""

import logging
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

log = logging.getLogger(__name__)
_CLOSE_S: Final = 5.0
"""How long `close` waits for threads in the kernel; they are daemons and touch nothing of ours afterwards."""
_COPY_S: Final = 1.0
"""Far more than a copy of one block takes."""


@dataclass
class Job:
    """Blocks that travel together. All fields are guarded by the pool's lock until the job is finished."""

    id: int
    is_load: bool
    deadline_s: float
    priority: int
    left: int
    submitted_s: float
    copying: int = 0
    over: bool = False
    expired: bool = False
    moved: list[bytes] = field(default_factory=list)
    finished_s: float = 0.0


class Transfer(NamedTuple):
    """One block of a job: its key, and its slot in the primary tier."""

    job: Job
    key: bytes
    slot: int


Copy = Callable[[Job, memoryview, memoryview], bool]
"""Copies into its second argument from its third, unless the job is over; TransferPool.copy."""
Move = Callable[[Transfer, memoryview, Copy], bool]
"""Moves one block through the buffer of block size; True if it arrived. Called by transfer threads."""


class TransferPool:
    """A fixed number of threads over two queues.

    The store queue holds at most `queue_blocks` blocks; the load queue is bounded by the primary tier, in which each load has a slot
    already. One thread is kept from stores (where there are several), so that a slow store never holds up loads.
    """

    def __init__(self, move: Move, *, name: str, block_bytes: int, threads: int, queue_blocks: int, deadline_s: float,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self._move, self._block_bytes, self._clock = move, block_bytes, clock
        self._queue_blocks, self._deadline_s = queue_blocks, deadline_s
        self._loads: deque[Transfer] = deque()
        self._stores: deque[Transfer] = deque()
        self._active: dict[int, Job] = {}
        self._finished: deque[Job] = deque()
        self._busy_since: dict[int, float] = {}
        self._storing, self._max_storing = 0, max(1, threads - 1)
        self._stopping = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    # Called by the scheduler's thread.

    def submit_load(self, job_id: int, blocks: Sequence[tuple[bytes, int]]) -> None:
        """Queues a load of (key, slot) pairs, at least one."""
        with self._changed:
            job = self._begin(job_id, True, len(blocks), 0)
            self._loads.extend(Transfer(job, key, slot) for key, slot in blocks)
            self._changed.notify(len(blocks))

    def submit_store(self, job_id: int, blocks: Sequence[tuple[bytes, int]], priority: int = 0) -> int:
        """Queues as many of the blocks as there is room for, the first ones (a prefix is of use, a suffix isn't); returns how many."""
        with self._changed:
            taken = blocks[: max(0, self._queue_blocks - len(self._stores))]
            if taken:
                job = self._begin(job_id, False, len(taken), priority)
                self._stores.extend(Transfer(job, key, slot) for key, slot in taken)
                self._changed.notify(len(taken))
            return len(taken)

    def finished(self) -> list[Job]:
        """Jobs that ended since the last call, those among them whose deadline passed, too."""
        now = self._clock()
        with self._changed:
            for job in [job for job in self._active.values() if now >= job.deadline_s]:
                self._expire(job)
            jobs = list(self._finished)
            self._finished.clear()
        return jobs

    def stuck(self) -> bool:
        """Whether every thread has been with one block for longer than a job may take."""
        limit = self._clock() - self._deadline_s
        busy = list(self._busy_since.values())
        return len(busy) == len(self._threads) and all(since <= limit for since in busy)

    @property
    def active(self) -> int:
        """Jobs that were submitted and have not ended."""
        return len(self._active)

    def drain(self, timeout_s: float) -> None:
        """Waits until every job has ended; those that haven't within `timeout_s` are ended as failed. They appear in `finished`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._active, timeout_s)
            while self._active:
                for job in list(self._active.values()):
                    self._expire(job)
                self._changed.wait_for(lambda: not any(job.copying for job in self._active.values()), _COPY_S)

    def close(self) -> None:
        """Ends all jobs and threads; once it has returned, no thread touches the primary tier."""
        self.drain(0.0)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        deadline = time.monotonic() + _CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    # Called by transfer threads.

    def copy(self, job: Job, into: memoryview, source: memoryview) -> bool:
        """Copies unless the job is over, in which case the primary tier's slot may already be another block's."""
        with self._copying(job) as allowed:
            if allowed:
                np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(source, np.uint8))  # releases the GIL, as slicing doesn't
        return allowed

    @contextmanager
    def _copying(self, job: Job) -> Iterator[bool]:
        with self._changed:
            allowed = not job.over
            job.copying += allowed
        try:
            yield allowed
        finally:
            with self._changed:
                job.copying -= allowed
                self._changed.notify_all()

    def _run(self) -> None:
        buffer = memoryview(mmap.mmap(-1, self._block_bytes))  # page-aligned, for direct I/O
        while (transfer := self._take()) is not None:
            arrived = False
            try:
                arrived = self._move(transfer, buffer, self.copy)
            except Exception:
                log.exception("kvbm.transfer_failed job=%d", transfer.job.id)
            self._put_down(transfer, arrived)

    def _take(self) -> Transfer | None:
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._next_queue() is not None)
            queue = self._next_queue()
            if self._stopping or queue is None:
                return None
            transfer = queue.popleft()
            self._storing += not transfer.job.is_load
            self._busy_since[me] = self._clock()
            return transfer

    def _next_queue(self) -> deque[Transfer] | None:
        if self._loads:
            return self._loads
        return self._stores if self._stores and self._storing < self._max_storing else None

    def _put_down(self, transfer: Transfer, arrived: bool) -> None:
        job = transfer.job
        with self._changed:
            del self._busy_since[threading.get_ident()]
            self._storing -= not job.is_load
            if not job.over:
                job.left -= 1
                if arrived:
                    job.moved.append(transfer.key)
                if job.left == 0:
                    self._end(job)
            self._changed.notify_all()

    # Called with the lock held.

    def _begin(self, job_id: int, is_load: bool, blocks: int, priority: int) -> Job:
        now = self._clock()
        job = Job(job_id, is_load, now + self._deadline_s, priority, blocks, now)
        self._active[job_id] = job
        return job

    def _expire(self, job: Job) -> None:
        """Ends a job now, or as soon as the copies that have begun are done, which takes memory's time, not the store's."""
        job.over = job.expired = True
        queue = self._loads if job.is_load else self._stores
        kept = [transfer for transfer in queue if transfer.job is not job]
        if len(kept) < len(queue):
            queue.clear()
            queue.extend(kept)
        if not job.copying:
            self._end(job)

    def _end(self, job: Job) -> None:
        job.over = True
        job.finished_s = self._clock()
        if self._active.pop(job.id, None) is not None:
            self._finished.append(job)
