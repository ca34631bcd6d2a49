# SPDX-License-Identifier: Apache-2.0
"""The copy worker of CPU engines: vLLM's contract for workers, byte for byte."""

import threading
import uuid
from collections.abc import Iterator

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor, GPULoadStoreSpec  # noqa: E402
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec  # noqa: E402
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion  # noqa: E402

from tandem_kvbm import cpu_worker  # noqa: E402
from tandem_kvbm.cpu_worker import HostCopyWorker, page_moves  # noqa: E402

PAGES = (4096, 2048, 2048)
"""Bytes of a block in each tensor: the first group has the first two, the second group the last."""
BLOCKS, CHUNKS = 12, 8


def caches(used: int = 0) -> CanonicalKVCaches:
    """Three tensors of random bytes; of the last tensor's pages only `used` bytes belong to its layer (0: all)."""
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randint(-128, 128, (BLOCKS, page), dtype=torch.int8, generator=generator) for page in PAGES]
    groups = [[CanonicalKVCacheRef(0, PAGES[0]), CanonicalKVCacheRef(1, PAGES[1])], [CanonicalKVCacheRef(2, used or PAGES[2])]]
    return CanonicalKVCaches([CanonicalKVCacheTensor(tensor, page) for tensor, page in zip(tensors, PAGES, strict=True)], groups)


def region(blocks_per_chunk: int) -> SharedOffloadRegion:
    """A host tier of CHUNKS chunks for one rank."""
    size = sum(PAGES) * blocks_per_chunk
    return SharedOffloadRegion(engine_id=f"test-{uuid.uuid4()}", num_chunks=CHUNKS, rank=0, kv_bytes_per_chunk=size, cpu_page_size=size)


@pytest.fixture(params=[1, 3])
def blocks_per_chunk(request: pytest.FixtureRequest) -> int:
    """How many blocks travel together."""
    return int(request.param)


@pytest.fixture
def kv() -> CanonicalKVCaches:
    """The KV cache."""
    return caches()


@pytest.fixture
def worker(kv: CanonicalKVCaches, blocks_per_chunk: int) -> Iterator[HostCopyWorker]:
    """A worker over it, shut down at the end."""
    made = HostCopyWorker(kv, blocks_per_chunk, region(blocks_per_chunk))
    yield made
    made.shutdown()


def device(blocks: list[int], sizes: tuple[int, int], indices: tuple[int, int] = (0, 0)) -> GPULoadStoreSpec:
    """Blocks of two groups."""
    return GPULoadStoreSpec(blocks, group_sizes=sizes, block_indices=indices)


def images(kv: CanonicalKVCaches) -> list[np.ndarray]:  # type: ignore[type-arg]
    """What the tensors hold now."""
    return [cache.tensor.numpy().copy() for cache in kv.tensors]


def ended(worker: HostCopyWorker, *jobs: int) -> dict[int, bool]:
    """Waits for the jobs; job -> success."""
    worker.wait(set(jobs))
    return {result.job_id: result.success for result in worker.get_finished()}


@pytest.mark.parametrize(("per_chunk", "index", "chunks", "places"), [
    (1, 0, [4, 5, 6], [0, 0, 0]), (1, 7, [4, 5, 6], [0, 0, 0]), (2, 0, [4, 4, 5], [0, 1, 0]), (2, 5, [4, 5, 5], [1, 0, 1]),
    (4, 2, [4, 4, 5], [2, 3, 0]), (4, 1, [4, 4, 4], [1, 2, 3]),
])
def test_a_group_may_begin_and_end_within_a_chunk(per_chunk: int, index: int, chunks: list[int], places: list[int]) -> None:
    """Blocks of a group are contiguous in their request."""
    [move] = page_moves([7, 8, 9], sorted(set(chunks)), [3], [index], per_chunk)
    assert (move.device_blocks.tolist(), move.chunks.tolist(), move.places.tolist()) == ([7, 8, 9], chunks, places)


def test_groups_follow_one_another_and_may_be_empty() -> None:
    """Each has chunks of its own."""
    first, empty, last = page_moves([1, 2, 3], [5, 6], [2, 0, 1], [0, 3, 1], 2)
    assert (first.chunks.tolist(), empty.chunks.tolist(), last.chunks.tolist()) == ([5, 5], [], [6])
    assert (last.device_blocks.tolist(), last.places.tolist()) == ([3], [1])


@pytest.mark.parametrize(("blocks", "chunks", "sizes"), [([1, 2], [5], [2]), ([1], [5, 6], [1]), ([1, 2], [5], [1])])
def test_what_does_not_fit_together_is_refused(blocks: list[int], chunks: list[int], sizes: list[int]) -> None:
    """Copying some other block would be worse than failing."""
    with pytest.raises(ValueError, match="chunks"):
        page_moves(blocks, chunks, sizes, [0], 1)


def test_blocks_come_back_as_they_were(worker: HostCopyWorker, kv: CanonicalKVCaches, blocks_per_chunk: int) -> None:
    """Stored, overwritten on the device, loaded to other blocks: the bytes are those stored, and no others change."""
    before = images(kv)
    chunks = CPULoadStoreSpec([6, 1, 3, 2, 0] if blocks_per_chunk == 1 else [6, 2])
    assert worker.submit_store(1, device([0, 1, 2, 4, 5], (3, 2)), chunks)
    assert ended(worker, 1) == {1: True}
    for cache in kv.tensors:
        cache.tensor[:6] = 0
    assert worker.submit_load(2, chunks, device([9, 8, 7, 10, 11], (3, 2)))
    assert ended(worker, 2) == {2: True}
    after = images(kv)
    for tensor in (0, 1):
        assert (after[tensor][[9, 8, 7]] == before[tensor][[0, 1, 2]]).all()
        assert (after[tensor][[6, 10, 11]] == before[tensor][[6, 10, 11]]).all()
    assert (after[2][[10, 11]] == before[2][[4, 5]]).all()
    assert (after[2][6:10] == before[2][6:10]).all()


def test_a_chunk_is_filled_and_read_in_parts() -> None:
    """Three blocks per chunk: the request's second and third block are stored first, its first later, then two are loaded."""
    kv = caches()
    worker = HostCopyWorker(kv, 3, region(3))
    before = images(kv)
    worker.submit_store(1, device([1, 2], (2, 0), (1, 0)), CPULoadStoreSpec([5]))
    worker.submit_store(2, device([0], (1, 0), (0, 0)), CPULoadStoreSpec([5]))
    worker.submit_load(3, CPULoadStoreSpec([5]), device([7, 8], (2, 0), (0, 0)))
    assert ended(worker, 1, 2, 3) == {1: True, 2: True, 3: True}
    assert (images(kv)[0][[7, 8]] == before[0][[0, 1]]).all()
    worker.shutdown()


def test_padding_of_a_page_is_left_alone() -> None:
    """Only the bytes that a layer uses are its own."""
    kv = caches(used=1000)
    worker = HostCopyWorker(kv, 1, region(1))
    before = images(kv)[2]
    worker.submit_store(1, device([3], (0, 1)), CPULoadStoreSpec([4]))
    worker.submit_load(2, CPULoadStoreSpec([4]), device([9], (0, 1)))
    ended(worker, 1, 2)
    after = images(kv)[2]
    assert (after[9, :1000] == before[3, :1000]).all()
    assert (after[9, 1000:] == before[9, 1000:]).all()
    worker.shutdown()


def test_results_name_bytes_and_time(worker: HostCopyWorker, blocks_per_chunk: int) -> None:
    """vLLM's metrics are made of them; each result comes once."""
    worker.submit_store(1, device([0, 1, 2], (2, 1)), CPULoadStoreSpec([0, 1, 2] if blocks_per_chunk == 1 else [0, 1]))
    worker.wait({1})
    [result] = worker.get_finished()
    assert result.transfer_size == 2 * (PAGES[0] + PAGES[1]) + PAGES[2]
    assert result.transfer_time > 0
    assert worker.get_finished() == []


def test_submitting_waits_for_no_copy(worker: HostCopyWorker, blocks_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's step goes on while a copy is held up; jobs end in the order of their submission."""
    gate, inside = threading.Event(), threading.Event()
    copy = HostCopyWorker._copy_group

    def held(self: HostCopyWorker, group: int, move: cpu_worker.PageMoves, *, store: bool) -> int:
        inside.set()
        assert gate.wait(10)
        return copy(self, group, move, store=store)

    monkeypatch.setattr(HostCopyWorker, "_copy_group", held)
    for job in (7, 3, 5):
        worker.submit_store(job, device([job], (1, 0)), CPULoadStoreSpec([job]))
    assert inside.wait(10)
    assert worker.get_finished() == []
    gate.set()
    worker.wait({3, 5, 7, 99})
    assert [result.job_id for result in worker.get_finished()] == [7, 3, 5]


def test_a_copy_that_fails_is_reported(worker: HostCopyWorker) -> None:
    """vLLM decides what follows; later jobs are copied all the same."""
    worker.submit_store(1, device([BLOCKS + 1], (1, 0)), CPULoadStoreSpec([0]))
    worker.submit_store(2, device([0], (1, 0)), CPULoadStoreSpec([0]))
    assert ended(worker, 1, 2) == {1: False, 2: True}


def test_waiting_has_an_end(worker: HostCopyWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that never ends must not hang the engine without a word."""
    gate = threading.Event()

    def held(*_: object, **__: object) -> int:
        gate.wait(10)
        return 0

    monkeypatch.setattr(HostCopyWorker, "_copy_group", held)
    monkeypatch.setattr(cpu_worker, "WAIT_TIMEOUT_S", 0.01)
    worker.submit_store(1, device([0], (1, 0)), CPULoadStoreSpec([0]))
    with pytest.raises(TimeoutError, match="did not end within"):
        worker.wait({1})
    gate.set()


def test_shutdown_ends_copies_and_gives_the_memory_back(kv: CanonicalKVCaches) -> None:
    """Twice does no harm."""
    memory = region(1)
    worker = HostCopyWorker(kv, 1, memory)
    worker.submit_store(1, device([0], (1, 0)), CPULoadStoreSpec([0]))
    worker.shutdown()
    worker.shutdown()
    assert memory.mmap_obj is None
    assert memory.fd is None
