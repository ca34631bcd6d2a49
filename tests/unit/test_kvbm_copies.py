# SPDX-License-Identifier: Apache-2.0
"""The choice between the copy kernel and the driver's copies, as far as it needs no GPU; tests/gpu has the rest."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tandem_kvbm import cuda_copies


@pytest.mark.parametrize(("pages", "words"), [([65_536], 2048), ([16_384], 2048), ([8192], 1024), ([2048, 3072], 512), ([8], 1)])
def test_words_per_turn_cover_a_page_up_to_a_bound(pages: list[int], words: int) -> None:
    """A power of two, as the kernel's arrays need it."""
    assert cuda_copies.kernel_words(pages) == words


@pytest.mark.parametrize("pages", [[], [4100], [8192, 12]])
def test_pages_of_no_whole_words_are_the_drivers(pages: list[int]) -> None:
    """The kernel moves 64-bit words."""
    assert cuda_copies.kernel_words(pages) is None


@pytest.mark.parametrize(("words", "programs"), [(2048, 16), (1024, 32), (512, 64), (1, 64)])
def test_small_pages_get_more_programs(words: int, programs: int) -> None:
    """What is on its way matters, up to a bound: the GPU has other work."""
    assert cuda_copies.programs(words) == programs


def test_trial_pages_lie_where_their_tensors_say() -> None:
    """Row by row at both ends, each with its own stride, no page larger than the smaller row."""
    device = [torch.zeros((5, 16), dtype=torch.int8), torch.zeros((5, 8), dtype=torch.int8)]
    rows = torch.zeros((4, 64), dtype=torch.int8)
    host = [rows[:, :32], rows[:, 32:40]]
    pages = cuda_copies.trial_pages(device, host)
    assert pages.sizes.tolist() == [16] * 4 + [8] * 4
    assert (np.diff(pages.sources.numpy()[:4]) == 16).all()
    assert (np.diff(pages.targets.numpy()[:4]) == 64).all()
    assert pages.sources[0] == device[0].data_ptr()
    assert pages.targets[4] == host[1].data_ptr()


def test_a_trial_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time must not grow with the host tier."""
    monkeypatch.setattr(cuda_copies, "TRIAL_BYTES", 64)
    tensors = [torch.zeros((1000, 16), dtype=torch.int8)]
    assert len(cuda_copies.trial_pages(tensors, tensors).sizes) == 4


def test_the_faster_way_is_taken_and_a_failing_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that doesn't compile on some platform costs a log line."""
    rates = {"dma": 40.0, "kernel": 51.0}
    monkeypatch.setattr(cuda_copies, "_rate", lambda copy, pages: rates[copy])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    tensors = [torch.zeros((2, 16), dtype=torch.int8)]
    ways: dict[str, Any] = {"dma": "dma", "kernel": "kernel"}
    pages = cuda_copies.trial_pages(tensors, tensors)
    assert cuda_copies.fastest(cuda_copies._measure(ways, pages)) == "kernel"
    del rates["kernel"]
    assert cuda_copies._measure(ways, pages) == {"dma": 40.0, "kernel": 0.0}


def test_a_direction_that_only_the_driver_can_serve_has_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pageable host memory can't be read by a kernel; a method that is not there falls back to what is."""
    monkeypatch.setattr(cuda_copies, "_measure", lambda ways, pages: pytest.fail("there is nothing to choose from"))
    groups = [[SimpleNamespace(page_size_bytes=4096)]]
    handler = SimpleNamespace(layer_refs_per_group=groups, _canonical_copy_plans=None, _swap_blocks_batch=None, src_tensors=[],
                              dst_tensors=[])
    worker = SimpleNamespace(_store_handler=handler, _load_handler=handler, _mmap_region=SimpleNamespace(is_pinned=False))
    cuda_copies.choose_copies(worker, "kernel")
    assert handler._swap_blocks_batch is cuda_copies.ops.swap_blocks_batch
