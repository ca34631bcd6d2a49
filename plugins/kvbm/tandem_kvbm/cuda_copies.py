# SPDX-License-Identifier: Apache-2.0
"""How pages move between a GPU's KV cache and the host tier: by a kernel or by the driver's batched copies. Edge module.

A long prompt is tens of thousands of pages that lie scattered on the GPU. The driver's batched copies take about a microsecond of the
calling thread for each, which is the model runner's; a kernel reads the same list of addresses on the GPU and comes closer to the link's
bandwidth (benchmarks/README.md), at the price of a few multiprocessors while it runs. Which one is faster depends on page size, link
and driver, so both are measured when the worker starts.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm.triton_utils import HAS_TRITON, tl, triton

log = logging.getLogger(__name__)

IN_FLIGHT_BYTES: Final = 256 << 10
"""Read at once by all programs of the kernel: at 12 times 16 KiB a link of PCIe 5 was full in both directions on an H200, and at 16 times
4 KiB it was at half for reads of host memory, whose latency must be covered."""
MOST_PROGRAMS: Final = 64
WARPS: Final = 8
MOST_WORDS: Final = 2048
"""64-bit words that one program moves at once."""
TRIAL_BYTES: Final = 128 << 20
TRIAL_BLOCKS: Final = 1024
_REPEATS: Final = 3

Copy = Callable[..., None]
"""(source addresses, target addresses, sizes in bytes, is_src_access_order_any=): int64 tensors in pinned memory, on the current stream."""


class Pages(NamedTuple):
    """Pages to copy, as vLLM lists them: pinned int64 tensors of one length."""

    sources: torch.Tensor
    targets: torch.Tensor
    sizes: torch.Tensor


# Without annotations, since Triton compiles those of the arguments, too.
@triton.jit(do_not_specialize=["pages"])  # type: ignore[untyped-decorator]
def _move_pages(sources, targets, sizes, pages, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    offsets = tl.arange(0, WORDS)
    for page in range(tl.program_id(0), pages, tl.num_programs(0)):
        source = tl.load(sources + page).to(tl.pointer_type(tl.int64))
        target = tl.load(targets + page).to(tl.pointer_type(tl.int64))
        words = tl.load(sizes + page) // 8
        for first in range(0, words, WORDS):
            place = first + offsets
            inside = place < words
            tl.store(target + place, tl.load(source + place, mask=inside), mask=inside)


def kernel_copy(words: int) -> Copy:
    """Copies by the kernel, `words` (a power of two) 64-bit words at a time. Sizes and addresses must be multiples of 8 bytes."""

    def copy(sources: torch.Tensor, targets: torch.Tensor, sizes: torch.Tensor, *, is_src_access_order_any: bool = False) -> None:
        del is_src_access_order_any  # the driver's matter
        pages = len(sources)
        device = [tensor.to("cuda", non_blocking=True) for tensor in (sources, targets, sizes)]
        _move_pages[(min(programs(words), pages),)](*device, pages, WORDS=words, num_warps=WARPS)

    return copy


def programs(words: int) -> int:
    """How many programs, of `words` 64-bit words each, keep the link busy without taking more of the GPU than that."""
    return min(MOST_PROGRAMS, max(1, IN_FLIGHT_BYTES // (8 * words)))


def choose_copies(worker: Any, method: str) -> None:
    """Gives vLLM's CPUOffloadingWorker its way of copying: `kernel`, `dma`, or with `auto` the faster one of each direction.

    The trial copies blocks to the host tier and back to where they were, so it changes nothing; it must run before any job.
    """
    stores, loads = worker._store_handler, worker._load_handler  # noqa: SLF001 - vLLM offers no other way
    for name, handler in (("store", stores), ("load", loads)):
        ways = _ways(handler, pinned=worker._mmap_region is None or worker._mmap_region.is_pinned)  # noqa: SLF001
        if method in ways:
            ways = {method: ways[method]}
        rates = dict.fromkeys(ways, 0.0) if len(ways) == 1 else _measure(ways, trial_pages(handler.src_tensors, handler.dst_tensors))
        way = fastest(rates)
        handler._swap_blocks_batch = ways[way]  # noqa: SLF001
        log.info("kvbm.copies direction=%s way=%s %s", name, way, " ".join(f"{each}_gb_per_s={rate:.1f}" for each, rate in rates.items()))


def fastest(rates: Mapping[str, float]) -> str:
    """The way with the highest rate; the first of equals."""
    return max(rates, key=lambda way: rates[way])


def kernel_words(page_sizes: list[int]) -> int | None:
    """Words per step of the kernel for pages of these bytes; None where it can't move them."""
    if not page_sizes or any(size % 8 for size in page_sizes):
        return None
    words = max(page_sizes) // 8
    return min(1 << max(0, words - 1).bit_length(), MOST_WORDS)


def trial_pages(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> Pages:
    """The first pages of each tensor pair (rows of int8), about TRIAL_BYTES in all, the smaller row of a pair being the page."""
    page_bytes = [min(source.shape[1], target.shape[1]) for source, target in zip(sources, targets, strict=True)]
    rows = min(TRIAL_BLOCKS, *(len(tensor) for tensor in (*sources, *targets)), max(1, TRIAL_BYTES // sum(page_bytes)))
    places = np.arange(rows, dtype=np.int64)
    columns = (
        np.concatenate([tensor.data_ptr() + places * tensor.stride(0) for tensor in sources]),
        np.concatenate([tensor.data_ptr() + places * tensor.stride(0) for tensor in targets]),
        np.repeat(np.asarray(page_bytes, dtype=np.int64), rows),
    )
    return Pages(*(torch.from_numpy(column) for column in columns))


def _ways(handler: Any, *, pinned: bool) -> dict[str, Copy]:
    """What can move this handler's pages. The canonical layout has fragments of its own sizes, and is left to the driver."""
    sizes = [ref.page_size_bytes for group in handler.layer_refs_per_group for ref in group]
    is_aligned = all(tensor.stride(0) % 8 == 0 and tensor.data_ptr() % 8 == 0 for tensor in (*handler.src_tensors, *handler.dst_tensors))
    words = kernel_words(sizes) if is_aligned and handler._canonical_copy_plans is None else None  # noqa: SLF001
    ways: dict[str, Copy] = {"dma": ops.swap_blocks_batch}
    if HAS_TRITON and pinned and words is not None:
        ways["kernel"] = kernel_copy(words)
    return ways


def _measure(ways: Mapping[str, Copy], pages: Pages) -> dict[str, float]:
    """GB/s of each way, the best of some runs; a way that fails has none."""
    rates = {}
    for name, copy in ways.items():
        try:
            rates[name] = _rate(copy, Pages(*(column.pin_memory() for column in pages)))
        except Exception:
            log.exception("kvbm.copy_trial_failed way=%s", name)
            rates[name] = 0.0
    return rates


def _rate(copy: Copy, pages: Pages) -> float:
    stream, size = torch.cuda.Stream(), int(pages.sizes.sum())
    times = []
    with torch.cuda.stream(stream):
        for _ in range(_REPEATS + 1):  # the first one compiles the kernel
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(stream)
            copy(*pages, is_src_access_order_any=False)
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return float(size / min(times[1:]) / 1e6)
