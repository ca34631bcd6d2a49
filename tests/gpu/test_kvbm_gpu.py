# SPDX-License-Identifier: Apache-2.0
"""KV tiers on a GPU: vLLM's CUDA copies as KvbmSpec sets them up, in every way that vLLM may choose.

`python -m pytest tests/gpu`: one GPU, 1 GB of /dev/shm, no network. Figures are printed at the end.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from vllm.v1.kv_offload.cpu import gpu_worker, swap_blocks_triton  # noqa: E402

from copy_contract import CopyContract, Make, Rig, Shape, Specs, WithRigs  # noqa: E402
from servers import wait_for  # noqa: E402

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
        ways["batch"] += 1
        batch(*arguments, **options)

    monkeypatch.setattr(gpu_worker.ops, "swap_blocks_batch", counted)
    monkeypatch.setattr(swap_blocks_triton, "_swap_blocks_kernel", Counted(swap_blocks_triton._swap_blocks_kernel, ways))
    return ways


class OnTheGpu(CopyContract):
    """The contract over vLLM's CUDA worker."""

    device = "cuda"
    loads_by: ClassVar[str]

    def test_loads_go_this_way(self, make: Make, shape: Shape, ways: Counter[str]) -> None:
        """What the other tests of this class show, they show of this way. Stores are the driver's in any case."""
        rig = make(shape)
        rig.store([[0], []], [0])
        assert ways == {"batch": 1}
        rig.load([[1], []], [0])
        assert ways == ({"batch": 1, "kernel": 1} if self.loads_by == "kernel" else {"batch": 2})


class TestCopyKernel(OnTheGpu):
    """Small pages from pinned memory: a kernel reads host memory. It is forced for jobs of any size."""

    loads_by = "kernel"

    @pytest.fixture(autouse=True)
    def always(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From the first block on."""
        monkeypatch.setattr(swap_blocks_triton, "MIN_N", 0)


class TestCopyKernelOnLargePages(TestCopyKernel):
    """The same for pages that it is never chosen for, which take several turns of its loop."""

    pages = (36_864, 20_480, 40_960)

    @pytest.fixture(autouse=True)
    def any_page(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However large."""
        monkeypatch.setattr(gpu_worker, "THRESHOLD_BYTES", 1 << 40)


class TestCopyEngine(OnTheGpu):
    """Large pages: batches of copies by the driver."""

    loads_by = "batch"
    pages = (32_768, 16_384, 65_536)


class TestPageableMemory(OnTheGpu):
    """A host tier that could not be pinned, as where the limit on locked memory is low: slower, and as right."""

    loads_by = "batch"

    @pytest.fixture(autouse=True)
    def unpinned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is registered."""
        monkeypatch.setattr(gpu_worker, "pin_mmap_region", lambda region: None)


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

    @pytest.mark.parametrize(("page", "blocks", "way"), [
        pytest.param(4096, 2 * swap_blocks_triton.MIN_N, "kernel", id="many small blocks"),
        pytest.param(4096, swap_blocks_triton.MIN_N - 1, "batch", id="few small blocks"),
        pytest.param(swap_blocks_triton.THRESHOLD_BYTES, 2 * swap_blocks_triton.MIN_N, "batch", id="large blocks"),
        pytest.param(4100, 2 * swap_blocks_triton.MIN_N, "batch", id="blocks of no whole words"),
    ])
    def test_the_size_of_blocks_and_jobs_chooses_the_way(self, make: Make, ways: Counter[str], page: int, blocks: int, way: str) -> None:
        """SmolLM2's blocks are small and an 8B model's large; stores are the driver's in any case."""
        rig = make(Shape(pages=(page,), groups=((0,),), blocks=2 * blocks, chunks=blocks))
        before = rig.device()[0]
        rig.store([list(range(blocks))], range(blocks))
        assert ways == {"batch": 1}
        rig.load([list(range(blocks, 2 * blocks))], range(blocks))
        assert ways[way] == (1 if way == "kernel" else 2)
        assert (rig.device()[0][blocks:] == before[:blocks]).all()

    @pytest.mark.parametrize("store", [True, False], ids=["store", "load"])
    @pytest.mark.parametrize(("page", "blocks"), [(4096, 65_536), (65_536, 4096), (4 * MIB, 64)], ids=str)
    def test_a_submit_returns_long_before_its_copy_ends(self, make: Make, page: int, blocks: int, store: bool,
                                                          note: Callable[[str], None]) -> None:  # fmt: skip
        """The copy's time is that between its CUDA events. Descriptors of many small blocks take time of their own: only noted."""
        rig = make(Shape(pages=(page,), groups=((0,),), blocks=blocks, chunks=blocks))
        specs = rig.specs([list(range(blocks))], range(blocks))
        rig.finish(rig.start(*specs, store=True), rig.start(*specs, store=store))
        runs = [timed(rig, specs, store) for _ in range(5)]
        at_once = [run for run in runs if run.left_copying]
        share = min((run.submit_share for run in at_once), default=1.0)
        note(f"copy {'d2h' if store else 'h2d'} {blocks} blocks of {page} bytes: {max(run.gb_per_s for run in runs):.1f} GB/s, submitting "
             f"took {share:.3f} of it at best, and {len(at_once)} of {len(runs)} submissions returned before the end")
        assert share < 0.5 or page < MIB

    def test_the_engines_stream_goes_on_while_blocks_are_copied(self, make: Make) -> None:
        """A computation that is submitted after a copy ends before it."""
        rig = make(Shape(pages=(4 * MIB,), groups=((0,),), blocks=128, chunks=128))
        rig.store([list(range(128))], range(128))
        one = torch.ones(1, device="cuda")
        torch.cuda.synchronize()
        rig.submit([list(range(128))], range(128), store=True)
        (one + one).cpu()
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
