# SPDX-License-Identifier: Apache-2.0
"""The copy worker of CPU engines: vLLM's contract for workers, byte for byte, and what is its own."""

import threading

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")

from copy_contract import CopyContract, Make, Shape
from tandem_kvbm import cpu_worker
from tandem_kvbm.cpu_worker import HostCopyWorker, page_moves


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


class TestOnTheCpu(CopyContract):
    """What every worker does, and how this one fails and waits."""

    device = "cpu"

    def test_submitting_waits_for_no_copy(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        """The engine's step goes on while a copy is held up."""
        gate, inside = threading.Event(), threading.Event()
        copy = HostCopyWorker._copy_group

        def held(self: HostCopyWorker, group: int, move: cpu_worker.PageMoves, *, store: bool) -> int:
            inside.set()
            assert gate.wait(10)
            return copy(self, group, move, store=store)

        monkeypatch.setattr(HostCopyWorker, "_copy_group", held)
        rig = make(Shape())
        jobs = [rig.submit([[block], []], [block], store=True) for block in (7, 3, 5)]
        assert inside.wait(10)
        assert rig.worker.get_finished() == []
        gate.set()
        assert [result.job_id for result in rig.finish(*jobs)] == jobs

    def test_a_copy_that_fails_is_reported(self, make: Make) -> None:
        """vLLM decides what follows; later jobs are copied all the same."""
        rig = make(Shape())
        failing, good = rig.submit([[rig.shape.blocks + 1], []], [0], store=True), rig.submit([[0], []], [0], store=True)
        assert {result.job_id: result.success for result in rig.finish(failing, good)} == {failing: False, good: True}

    def test_waiting_has_an_end(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        """A copy that never ends must not hang the engine without a word."""
        gate = threading.Event()

        def held(*_: object, **__: object) -> int:
            gate.wait(10)
            return 0

        monkeypatch.setattr(HostCopyWorker, "_copy_group", held)
        monkeypatch.setattr(cpu_worker, "WAIT_TIMEOUT_S", 0.01)
        rig = make(Shape())
        job = rig.submit([[0], []], [0], store=True)
        with pytest.raises(TimeoutError, match="did not end within"):
            rig.worker.wait({job})
        gate.set()
