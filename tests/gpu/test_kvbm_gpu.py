# SPDX-License-Identifier: Apache-2.0
"""KV tiers on a GPU: the CUDA worker as KvbmSpec sets it up, with each way of copying.

`python -m pytest tests/gpu`: one GPU, 1 GB of /dev/shm, no network. Figures are printed at the end.
"""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from typing import Any, ClassVar, NamedTuple

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from vllm.v1.kv_offload.cpu import gpu_worker  # noqa: E402

from copy_contract import CopyContract, Make, Rig, Shape, Specs, WithRigs, random_caches  # noqa: E402
from servers import wait_for  # noqa: E402
from tandem_kvbm import cuda_copies  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

WAIT_S = 60.0
MIB = 1 << 20
BUSY_CYCLES = 400_000_000
"""Of the GPU's clock: some 0.2 s."""


class Counted:
    """A Triton kernel that counts its launches."""

    def __init__(self, kernel: Any, ways: Counter[str]) -> None:
        self._kernel, self._ways = kernel, ways

    def __getitem__(self, grid: Any) -> Any:
        self._ways["kernel"] += 1
        return self._kernel[grid]


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the copy kernel was launched, and how often the driver was given a batch of copies."""
    ways = Counter[str]()
    batch = gpu_worker.ops.swap_blocks_batch

    def counted(*arguments: Any, **options: Any) -> None:
        ways["dma"] += 1
        batch(*arguments, **options)

    monkeypatch.setattr(gpu_worker.ops, "swap_blocks_batch", counted)
    monkeypatch.setattr(cuda_copies, "_move_pages", Counted(cuda_copies._move_pages, ways))
    return ways


class OnTheGpu(CopyContract):
    """The contract over the CUDA worker with one of its ways."""

    device = "cuda"
    method: ClassVar[str]
    way: ClassVar[str]

    @pytest.fixture(autouse=True)
    def chosen(self, no_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """The way is the operator's choice here."""
        monkeypatch.setenv("TANDEM_KVBM_COPY", self.method)

    def test_copies_go_this_way(self, ways: Counter[str], make: Make, shape: Shape) -> None:
        """What the other tests of this class show, they show of this way."""
        rig = make(shape)
        rig.store([[0], []], [0])
        rig.load([[1], []], [0])
        assert ways == {self.way: 2}


class TestCopyKernel(OnTheGpu):
    """Our kernel, over pages of less than one of its turns."""

    method = way = "kernel"


class TestCopyKernelOnLargePages(TestCopyKernel):
    """The same for pages that take several turns, the last of them in part."""

    pages = (36_864, 20_480, 40_960)


class TestCopyKernelOnOddPages(TestCopyKernel):
    """Pages of whole words and of no whole 16 bytes."""

    pages = (4_104, 2_056, 2_056)


class TestCopyEngine(OnTheGpu):
    """The driver's batches."""

    method = way = "dma"
    pages = (32_768, 16_384, 65_536)


class TestPageableMemory(OnTheGpu):
    """A host tier that could not be pinned, as where the limit on locked memory is low: the kernel can't read it, whatever was asked."""

    method, way = "kernel", "dma"

    @pytest.fixture(autouse=True)
    def unpinned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is registered."""
        monkeypatch.setattr(gpu_worker, "pin_mmap_region", lambda region: None)


class TestAutomaticChoice(WithRigs):
    """As it comes: both ways are tried at start, over host memory that nobody uses yet, and the faster one serves."""

    device = "cuda"
    shape = Shape(pages=(65_536, 32_768, 32_768))

    def test_one_of_both_serves(self, ways: Counter[str], make: Make) -> None:
        """Which one is the machine's matter."""
        rig = make(self.shape)
        assert ways == dict.fromkeys(("dma", "kernel"), 2 * (cuda_copies._REPEATS + 1)), "two directions"
        before = rig.device()
        rig.store([[0], []], [0])
        rig.load([[1], []], [0])
        assert ways.total() == 4 * (cuda_copies._REPEATS + 1) + 2
        assert (rig.device()[0][1] == before[0][0]).all()

    def test_the_trial_leaves_the_cache_as_it_was(self) -> None:
        """Blocks go to the host tier and come back to where they were."""
        caches = random_caches(self.shape, self.device)
        before = [cache.tensor.clone() for cache in caches.tensors]
        with closing(Rig(self.shape, caches)):
            for cache, was in zip(caches.tensors, before, strict=True):
                assert torch.equal(cache.tensor, was)


class Timed(NamedTuple):
    """One copy."""

    gb_per_s: float
    submit_share: float
    """Time of the submission in that of the copy."""
    left_copying: bool
    """Whether the copy went on when the submission had returned."""


def timed(rig: Rig, specs: Specs, store: bool) -> Timed:
    """Copies once."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    job = rig.start(*specs, store=store)
    took_s = time.perf_counter() - began
    early = rig.worker.get_finished()
    [result] = early or rig.finish(job)
    return Timed(result.transfer_size / result.transfer_time / 1e9, took_s / result.transfer_time, not early)


class TestStreams(WithRigs):
    """What a GPU adds: the choice of the way, streams and events."""

    device = "cuda"

    @pytest.fixture(params=["dma", "kernel"])
    def method(self, request: pytest.FixtureRequest, no_settings: None, monkeypatch: pytest.MonkeyPatch) -> str:
        """Each way in turn."""
        monkeypatch.setenv("TANDEM_KVBM_COPY", request.param)
        return str(request.param)

    def test_pages_of_no_whole_words_are_the_drivers(self, ways: Counter[str], make: Make, method: str) -> None:
        """Whatever was asked for."""
        rig = make(Shape(pages=(4100,), groups=((0,),), blocks=64, chunks=32))
        before = rig.device()[0]
        rig.store([list(range(32))], range(32))
        rig.load([list(range(32, 64))], range(32))
        assert ways == {"dma": 2}
        assert (rig.device()[0][32:] == before[:32]).all()

    @pytest.mark.parametrize("store", [True, False], ids=["store", "load"])
    @pytest.mark.parametrize(("page", "blocks"), [(4096, 65_536), (65_536, 4096), (4 * MIB, 64)], ids=str)
    def test_a_submit_returns_long_before_its_copy_ends(self, method: str, make: Make, page: int, blocks: int, store: bool,
                                                          note: Callable[[str], None]) -> None:  # fmt: skip
        """The copy's time is that between its CUDA events. The driver takes its time for each of many small blocks: only noted."""
        rig = make(Shape(pages=(page,), groups=((0,),), blocks=blocks, chunks=blocks))
        specs = rig.specs([list(range(blocks))], range(blocks))
        rig.finish(rig.start(*specs, store=True), rig.start(*specs, store=store))
        runs = [timed(rig, specs, store) for _ in range(5)]
        at_once = [run for run in runs if run.left_copying]
        share = min((run.submit_share for run in at_once), default=1.0)
        note(f"copy by {method} {'d2h' if store else 'h2d'} {blocks} blocks of {page} bytes: {max(run.gb_per_s for run in runs):.1f} GB/s, "
             f"submitting took {share:.3f} of it at best, and {len(at_once)} of {len(runs)} submissions returned before the end")
        assert share < 0.5 or (page < MIB and method == "dma")

    def test_the_engines_stream_goes_on_while_blocks_are_copied(self, make: Make) -> None:
        """A computation that is submitted after a copy ends before it. (A small copy to the host may well wait behind the blocks.)"""
        rig = make(Shape(pages=(4 * MIB,), groups=((0,),), blocks=128, chunks=128))
        rig.store([list(range(128))], range(128))
        one, computed = torch.ones(1, device="cuda"), torch.cuda.Event()
        one.add_(one)  # its kernel is loaded now, which waits for everything
        torch.cuda.synchronize()
        rig.submit([list(range(128))], range(128), store=True)
        one.add_(one)
        computed.record()
        computed.synchronize()
        assert rig.worker.get_finished() == []
        results: list[Any] = []
        wait_for(lambda: bool(results.extend(rig.worker.get_finished()) or results), WAIT_S, "the copy's event")
        assert [result.success for result in results] == [True]

    def test_a_store_waits_for_the_computation_of_its_blocks(self, make: Make) -> None:
        """The step that fills a block may still run when its store is submitted, which returns all the same."""
        rig = make(Shape())
        torch.cuda._sleep(BUSY_CYCLES)
        rig.kv.tensors[0].tensor[3] = 7
        job = rig.submit([[3], []], [5], store=True)
        assert rig.worker.get_finished() == []
        assert [result.success for result in rig.finish(job)] == [True]
        assert (rig.host[5, : rig.shape.pages[0]] == 7).all()

    def test_a_load_waits_for_what_is_written_to_its_blocks(self, make: Make) -> None:
        """vLLM zeroes new blocks in a step that may still run."""
        rig = make(Shape())
        before = rig.device()[0][3]
        rig.store([[3], []], [5])
        torch.cuda._sleep(BUSY_CYCLES)
        rig.kv.tensors[0].tensor[8] = 0
        rig.load([[8], []], [5])
        assert (rig.device()[0][8] == before).all()
