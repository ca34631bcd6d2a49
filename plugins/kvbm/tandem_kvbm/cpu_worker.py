# SPDX-License-Identifier: Apache-2.0
"""Copies between a CPU engine's KV cache and the host tier. Edge module: vLLM's own worker for this needs a GPU.

Copies run on one thread, in the order of their submission, as vLLM's run on chained streams: a step of the scheduler never waits for
one, unless vLLM asks for it (`wait`). They are NumPy's, which lets go of the GIL and uses one core; torch would start a second team of
OpenMP threads on the cores that the model computes on. The other methods belong to the engine's thread.
"""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, GPULoadStoreSpec, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

log = logging.getLogger(__name__)

WAIT_TIMEOUT_S = 300.0
"""Longer than copying the whole of any host tier takes; beyond it the engine is stuck, and saying so beats hanging."""
Bytes = npt.NDArray[np.int8]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PageMoves:
    """Pages of one KV-cache group: device block i lies in chunk `chunks[i]` at place `places[i]`. Arrays of one length."""

    device_blocks: Ids
    chunks: Ids
    places: Ids


def page_moves(device_blocks: npt.ArrayLike, chunks: npt.ArrayLike, group_sizes: Sequence[int], block_indices: Sequence[int],
               blocks_per_chunk: int) -> list[PageMoves]:
    """Which device block of each group goes with which place of which chunk.

    A group's blocks are contiguous in its request from block `block_indices[g]` on; its first and last chunk may be covered in part.
    Raises ValueError if blocks or chunks are left over.
    """
    blocks, rows = np.asarray(device_blocks, dtype=np.int64), np.asarray(chunks, dtype=np.int64)
    moves, first_block, first_row = [], 0, 0
    for size, index in zip(group_sizes, block_indices, strict=True):
        logical = index % blocks_per_chunk + np.arange(size)
        count = int(logical[-1]) // blocks_per_chunk + 1 if size else 0
        group_rows = rows[first_row:first_row + count]
        if len(group_rows) != count:
            raise ValueError(f"{len(rows)} chunks are too few for groups of {list(group_sizes)} blocks")
        moves.append(PageMoves(blocks[first_block:first_block + size], group_rows[logical // blocks_per_chunk] if size else rows[:0],
                               logical % blocks_per_chunk))
        first_block, first_row = first_block + size, first_row + count
    if (first_block, first_row) != (len(blocks), len(rows)):
        raise ValueError(f"{len(blocks)} blocks and {len(rows)} chunks, but the groups use {first_block} and {first_row}")
    return moves


class HostCopyWorker(OffloadingWorker):  # type: ignore[misc]  # vLLM's classes are Any here
    """vLLM's worker contract on a CPU platform. Owns `region` from here on; `shutdown` releases it."""

    def __init__(self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion) -> None:
        self._blocks_per_chunk = blocks_per_chunk
        self._refs = kv_caches.group_data_refs
        self._page_bytes = [int(cache.page_size_bytes) for cache in kv_caches.tensors]
        self._device: list[Bytes] = [cache.tensor.view(torch.int8).view((-1, cache.page_size_bytes)).numpy() for cache in kv_caches.tensors]
        self._host: list[Bytes] = [region.create_next_worker_view(size * blocks_per_chunk).numpy() for size in self._page_bytes]
        self._region: SharedOffloadRegion | None = region
        # Its queue needs no bound of its own: every job pins chunks of the host tier, and there are only so many.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvbm-copy")
        self._jobs: dict[int, Future[TransferResult]] = {}

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: Any) -> bool:
        """Starts copying blocks of the KV cache into chunks of the host tier."""
        return self._submit(job_id, src_spec, dst_spec, store=True)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: GPULoadStoreSpec) -> bool:
        """Starts copying chunks of the host tier into blocks of the KV cache."""
        return self._submit(job_id, dst_spec, src_spec, store=False)

    def get_finished(self) -> list[TransferResult]:
        """Jobs that ended since the last call, in the order of their submission."""
        done = [job_id for job_id, future in self._jobs.items() if future.done()]
        return [self._jobs.pop(job_id).result() for job_id in done]

    def wait(self, job_ids: set[int]) -> None:
        """Until these jobs have ended; jobs that ended earlier are no wait. `get_finished` still reports them."""
        pending = [self._jobs[job_id] for job_id in job_ids if job_id in self._jobs]
        if wait(pending, WAIT_TIMEOUT_S).not_done:
            raise TimeoutError(f"copies to or from the host tier did not end within {WAIT_TIMEOUT_S:g} s")

    def shutdown(self) -> None:
        """Ends when the copies that were started have ended; a second call does nothing."""
        self._thread.shutdown(wait=True)
        self._jobs.clear()
        self._device.clear()
        self._host.clear()  # the region can't be unmapped while arrays look into it
        if self._region is not None:
            self._region.cleanup()
            self._region = None

    def _submit(self, job_id: int, device: GPULoadStoreSpec, host: Any, *, store: bool) -> bool:
        moves = page_moves(device.block_ids, host.block_ids, device.group_sizes, device.block_indices, self._blocks_per_chunk)
        self._jobs[job_id] = self._thread.submit(self._run, job_id, moves, store=store)
        return True

    def _run(self, job_id: int, moves: list[PageMoves], *, store: bool) -> TransferResult:
        started = time.perf_counter()
        try:
            size = sum(self._copy_group(group, move, store=store) for group, move in enumerate(moves))
        except Exception:
            log.exception("kvbm.copy_failed job=%d store=%s", job_id, store)
            return TransferResult(job_id=job_id, success=False)
        return TransferResult(job_id=job_id, success=True, transfer_size=size, transfer_time=time.perf_counter() - started)

    def _copy_group(self, group: int, move: PageMoves, *, store: bool) -> int:
        """Copies the pages of one group; returns the bytes."""
        total = 0
        for ref in self._refs[group]:
            device, host, used = self._device[ref.tensor_idx], self._host[ref.tensor_idx], int(ref.page_size_bytes)
            starts = move.places * self._page_bytes[ref.tensor_idx]
            for block, chunk, start in zip(move.device_blocks.tolist(), move.chunks.tolist(), starts.tolist(), strict=True):
                page, place = device[block, :used], host[chunk, start:start + used]
                np.copyto(*((place, page) if store else (page, place)))
            total += used * len(move.chunks)
        return total
