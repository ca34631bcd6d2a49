# SPDX-License-Identifier: Apache-2.0
"""The contract of vLLM's `OffloadingWorker`, as a suite over every worker that KvbmSpec builds: ours on a CPU, vLLM's on a GPU.

Each test drives the worker as the engine does, by device blocks and chunks of the host tier, and looks at both memories byte by byte.
`tests/unit/test_kvbm_cpu_worker.py` and `tests/gpu/test_kvbm_gpu.py` inherit it.
"""

import itertools
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    CanonicalPageMapping,
    GPULoadStoreSpec,
    TransferResult,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from tandem_kvbm.spec import KvbmSpec

TOKENS = 16
Image = npt.NDArray[np.int8]
Specs = tuple[GPULoadStoreSpec, CPULoadStoreSpec]


@dataclass(frozen=True)
class Shape:
    """A KV cache and a host tier of one rank."""

    pages: tuple[int, ...] = (4096, 2048, 2048)
    """Bytes of a block in each tensor."""
    groups: tuple[tuple[int, ...], ...] = ((0, 1), (2,))
    """The tensors of each KV-cache group."""
    padding: int = 0
    """Bytes at the end of the last tensor's pages that belong to no layer."""
    blocks: int = 12
    chunks: int = 8
    blocks_per_chunk: int = 1

    @property
    def used(self) -> tuple[int, ...]:
        """Bytes of each tensor's page that are a layer's."""
        return (*self.pages[:-1], self.pages[-1] - self.padding)

    def chunks_for(self, sizes: Sequence[int], indices: Sequence[int]) -> list[int]:
        """How many chunks each group's blocks lie in."""
        return [-(-(index % self.blocks_per_chunk + size) // self.blocks_per_chunk) if size else 0
                for size, index in zip(sizes, indices, strict=True)]


def offloading_config(shape: Shape, engine_id: str, *, rank: int = 0, ranks: int = 1, canonical: bool = False) -> OffloadingConfig:
    """What vLLM tells the spec of a rank that has this share of the KV cache."""
    groups = tuple(OffloadingGroupConfig(tokens_per_block=TOKENS, layer_names=(str(number),), group_id=number)
                   for number in range(len(shape.groups)))
    return OffloadingConfig(
        groups=groups, worker_kv_bytes_per_block=sum(shape.pages), enable_kv_cache_events=False,
        extra_config={"kvbm": {"cpu_cache_override_num_blocks": shape.chunks}}, engine_id=engine_id,
        model=OffloadingModelConfig("model", "bfloat16"), cache=OffloadingCacheConfig(TOKENS, shape.blocks_per_chunk),
        parallel=OffloadingParallelConfig(rank=rank, world_size=ranks, tp_size=ranks, pp_size=1, pcp_size=1, dcp_size=1,
                                          data_parallel_index=0, data_parallel_size=1, data_parallel_rank_local=None,
                                          is_parallelism_agnostic=False),
        canonical_layout=canonical,
    )


def random_caches(shape: Shape, device: str) -> CanonicalKVCaches:
    """Tensors of random bytes, seeded."""
    generator = torch.Generator(device).manual_seed(1)
    tensors = [torch.randint(-128, 128, (shape.blocks, page), dtype=torch.int8, device=device, generator=generator)
               for page in shape.pages]
    return caches_of(tensors, [[(tensor, shape.used[tensor], None) for tensor in group] for group in shape.groups])


def caches_of(tensors: list[torch.Tensor],
              groups: list[list[tuple[int, int, CanonicalPageMapping | None]]]) -> CanonicalKVCaches:
    """(Number of the tensor, bytes used, mapping) per layer and group. A tensor's page is all that it has of a block."""
    flat = [CanonicalKVCacheTensor(tensor, tensor.nbytes // tensor.shape[0]) for tensor in tensors]
    return CanonicalKVCaches(flat, [[CanonicalKVCacheRef(number, used, mapping) for number, used, mapping in refs] for refs in groups])


class Rig:
    """A worker as KvbmSpec builds it, and the host tier as the scheduler's process and the tiers below see it. `close` ends it."""

    def __init__(self, shape: Shape, kv: CanonicalKVCaches, config: OffloadingConfig | None = None) -> None:
        self.shape, self.kv = shape, kv
        self.config = config or offloading_config(shape, f"test-{uuid.uuid4()}")
        spec = KvbmSpec(self.config)
        self.worker: Any = spec.get_worker(kv)
        self._region = spec._region(rank=None)
        self._view = self._region.create_kv_memoryview()
        self.host = np.asarray(self._view)
        """One row per chunk, that of the first tensor's blocks first."""
        self._jobs = itertools.count(1)

    @property
    def file(self) -> Path:
        """The host tier."""
        return Path(self._region.mmap_path)

    def device(self) -> list[Image]:
        """What the tensors hold now."""
        return [cache.tensor.cpu().view(torch.int8).reshape(cache.tensor.shape[0], -1).numpy().copy() for cache in self.kv.tensors]

    def submit(self, blocks: Sequence[Sequence[int]], chunks: Sequence[int], *, store: bool, indices: Sequence[int] = ()) -> int:
        """Starts a job with each group's device blocks; returns its number."""
        return self.start(*self.specs(blocks, chunks, indices), store=store)

    def specs(self, blocks: Sequence[Sequence[int]], chunks: Sequence[int], indices: Sequence[int] = ()) -> Specs:
        """What the worker is given."""
        sizes = [len(group) for group in blocks]
        device = GPULoadStoreSpec([block for group in blocks for block in group], group_sizes=sizes,
                                  block_indices=list(indices) or [0] * len(sizes))
        return device, CPULoadStoreSpec(list(chunks))

    def start(self, device: GPULoadStoreSpec, host: CPULoadStoreSpec, *, store: bool) -> int:
        """The submission alone."""
        job = next(self._jobs)
        assert self.worker.submit_store(job, device, host) if store else self.worker.submit_load(job, host, device)
        return job

    def finish(self, *jobs: int) -> list[TransferResult]:
        """Waits for the jobs; what has ended, in the order in which it is reported."""
        self.worker.wait(set(jobs))
        return list(self.worker.get_finished())

    def store(self, blocks: Sequence[Sequence[int]], chunks: Sequence[int], indices: Sequence[int] = ()) -> TransferResult:
        """To the host tier, until it is there."""
        [result] = self.finish(self.submit(blocks, chunks, store=True, indices=indices))
        assert result.success
        return result

    def load(self, blocks: Sequence[Sequence[int]], chunks: Sequence[int], indices: Sequence[int] = ()) -> TransferResult:
        """From the host tier, until it is there."""
        [result] = self.finish(self.submit(blocks, chunks, store=False, indices=indices))
        assert result.success
        return result

    def close(self) -> None:
        """Ends the worker and unmaps the host tier."""
        self.worker.shutdown()
        del self.host
        self._view.release()
        self._region.cleanup()


Make = Callable[[Shape], Rig]


@dataclass
class Model:
    """The same memories as arrays, moved by the plainest of loops."""

    shape: Shape
    device: list[Image]
    host: list[Image]

    def move(self, blocks: Sequence[Sequence[int]], chunks: Sequence[int], indices: Sequence[int], *, store: bool) -> None:
        """One job."""
        left = list(chunks)
        for tensors, group, index in zip(self.shape.groups, blocks, indices, strict=True):
            [count] = self.shape.chunks_for([len(group)], [index])
            own, left = left[:count], left[count:]
            for offset, block in enumerate(group):
                row, place = divmod(index % self.shape.blocks_per_chunk + offset, self.shape.blocks_per_chunk)
                for tensor in tensors:
                    self._page(tensor, block, own[row], place, store)
        assert not left

    def _page(self, tensor: int, block: int, chunk: int, place: int, store: bool) -> None:
        page, used = self.shape.pages[tensor], self.shape.used[tensor]
        device, host = self.device[tensor][block, :used], self.host[tensor][chunk, place * page : place * page + used]
        host[:], device[:] = (device, device) if store else (host, host)


class WithRigs:
    """Fixtures of tests that make rigs on `device`."""

    device: ClassVar[str]

    @pytest.fixture(autouse=True)
    def no_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The environment of whoever runs the tests doesn't matter."""
        from tandem_kvbm import config

        for name in config.os.environ:
            if "KVBM" in name:
                monkeypatch.delenv(name)

    @pytest.fixture
    def make(self) -> Iterator[Make]:
        """Rigs over random bytes, closed at the end."""
        rigs: list[Rig] = []

        def made(shape: Shape) -> Rig:
            rigs.append(Rig(shape, random_caches(shape, self.device)))
            return rigs[-1]

        yield made
        for rig in rigs:
            rig.close()


class CopyContract(WithRigs):
    """What holds for every worker. Subclasses say where the KV cache lies and how large its pages are."""

    pages: ClassVar[tuple[int, int, int]] = (4096, 2048, 2048)

    @pytest.fixture(params=[1, 3], ids="{} blocks per chunk".format)
    def shape(self, request: pytest.FixtureRequest) -> Shape:
        """Two groups over three tensors."""
        return Shape(pages=self.pages, blocks_per_chunk=request.param)

    def test_blocks_come_back_as_they_were(self, make: Make, shape: Shape) -> None:
        """Stored, overwritten on the device, loaded to other blocks: the bytes are those stored, and no others change."""
        rig = make(shape)
        before = rig.device()
        chunks = [6, 1, 3, 2, 0] if shape.blocks_per_chunk == 1 else [6, 2]
        rig.store([[0, 1, 2], [4, 5]], chunks)
        for cache in rig.kv.tensors:
            cache.tensor[:6] = 0
        rig.load([[9, 8, 7], [10, 11]], chunks)
        after = rig.device()
        for tensor in (0, 1):
            assert (after[tensor][[9, 8, 7]] == before[tensor][[0, 1, 2]]).all()
            assert (after[tensor][[6, 10, 11]] == before[tensor][[6, 10, 11]]).all()
            assert not after[tensor][:6].any()
        assert (after[2][[10, 11]] == before[2][[4, 5]]).all()
        assert (after[2][6:10] == before[2][6:10]).all()

    def test_the_tiers_below_see_what_was_stored(self, make: Make, shape: Shape) -> None:
        """In one row per chunk, tensor by tensor: what they write to a disk is what the device had."""
        rig = make(shape)
        before, untouched, count = rig.device(), rig.host.copy(), shape.blocks_per_chunk
        rig.store([list(range(count)), [7]], [5, 2])
        first, second = shape.pages[0] * count, shape.pages[1] * count
        assert (rig.host[5, :first].view(np.int8) == before[0][:count].ravel()).all()
        assert (rig.host[5, first : first + second].view(np.int8) == before[1][:count].ravel()).all()
        assert (rig.host[2, first + second : first + second + shape.pages[2]].view(np.int8) == before[2][7]).all()
        others = [0, 1, 3, 4, 6, 7]
        assert (rig.host[others] == untouched[others]).all()

    def test_a_chunk_is_filled_and_read_in_parts(self, make: Make) -> None:
        """Three blocks per chunk: the request's second and third block are stored first, its first later, then two are loaded."""
        rig = make(Shape(pages=self.pages, blocks_per_chunk=3))
        before = rig.device()
        rig.store([[1, 2], []], [5], (1, 0))
        rig.store([[0], []], [5], (0, 0))
        rig.load([[7, 8], []], [5], (0, 0))
        rig.load([[9], []], [5], (5, 0))
        after = rig.device()
        assert (after[0][[7, 8, 9]] == before[0][[0, 1, 2]]).all()
        assert (after[2] == before[2]).all()

    def test_padding_of_a_page_is_left_alone(self, make: Make, shape: Shape) -> None:
        """Only the bytes that a layer uses are its own."""
        rig = make(replace(shape, padding=1048))
        used = rig.shape.used[2]
        before = rig.device()[2]
        rig.store([[], [3]], [4])
        rig.load([[], [9]], [4])
        after = rig.device()[2]
        assert (after[9, :used] == before[3, :used]).all()
        assert (after[9, used:] == before[9, used:]).all()

    def test_results_name_bytes_and_time_once(self, make: Make, shape: Shape) -> None:
        """vLLM's metrics are made of them."""
        rig = make(shape)
        chunks = [0, 1, 2] if shape.blocks_per_chunk == 1 else [0, 1]
        for result in (rig.store([[0, 1], [2]], chunks), rig.load([[3, 4], [5]], chunks)):
            assert result.transfer_size == 2 * (self.pages[0] + self.pages[1]) + self.pages[2]
            assert result.transfer_time > 0
        assert rig.worker.get_finished() == []

    def test_jobs_of_one_direction_end_in_their_order(self, make: Make, shape: Shape) -> None:
        """Submitted one after another without a wait; a job that nobody knows is no wait."""
        rig = make(shape)
        jobs = [rig.submit([[block], []], [block], store=True) for block in (7, 3, 5)]
        assert [result.job_id for result in rig.finish(*reversed(jobs), 999)] == jobs

    def test_any_jobs_move_what_a_naive_model_moves(self, make: Make, shape: Shape) -> None:
        """Random jobs over partly covered chunks, seeded; then both memories are compared whole."""
        shape = replace(shape, blocks=40, chunks=24, padding=8)
        rig, random = make(shape), np.random.default_rng(7)
        width = sum(shape.pages) * shape.blocks_per_chunk
        ends = np.cumsum([page * shape.blocks_per_chunk for page in shape.pages])
        model = Model(shape, rig.device(), np.split(rig.host[:, :width].view(np.int8).copy(), ends[:-1], axis=1))
        for step in range(60):
            blocks = [random.permutation(shape.blocks)[:size].tolist() for size in random.integers(0, 10, size=2)]
            indices = random.integers(0, 9, size=2).tolist()
            count = sum(shape.chunks_for([len(group) for group in blocks], indices))
            chunks = random.permutation(shape.chunks)[:count].tolist()
            if not count:
                continue
            (rig.store if step % 2 else rig.load)(blocks, chunks, indices)
            model.move(blocks, chunks, indices, store=bool(step % 2))
        assert all((now == then).all() for now, then in zip(rig.device(), model.device, strict=True))
        assert (rig.host[:, :width].view(np.int8) == np.concatenate(model.host, axis=1)).all()

    def test_the_end_waits_for_copies_and_gives_the_memory_back(self, make: Make, shape: Shape) -> None:
        """Ended in mid-copy: all that was submitted is there, the file is gone, and a second end does no harm."""
        rig = make(shape)
        before = rig.device()[2]
        for block in range(shape.chunks):
            rig.submit([[], [block]], [block], store=True)
        rig.worker.shutdown()
        assert not rig.file.exists()
        start = (shape.pages[0] + shape.pages[1]) * shape.blocks_per_chunk
        assert (rig.host[:, start : start + shape.pages[2]].view(np.int8) == before[: shape.chunks]).all()
        rig.worker.shutdown()
