# SPDX-License-Identifier: Apache-2.0
"""The workers of one pool as arrays, one row per data-parallel rank, made anew whenever the fleet changes."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tandem_protocol.errors import RequestError
from tandem_protocol.workers import WorkerRecord
from tandem_router.busy import Capacities

Positions = NDArray[np.int64]
Place = Callable[[str, int], tuple[int, int]]
"""(worker id, dp rank) -> its column in the books and its slot in the index."""


@dataclass(frozen=True)
class Refusal:
    """A worker that is kept out of placement, and the sentence that says why."""

    worker_id: str
    reason: str


@dataclass(frozen=True)
class Pool:
    """n candidates; every array has shape (n,)."""

    workers: dict[str, WorkerRecord]
    """By id."""
    records: tuple[WorkerRecord, ...]
    names: tuple[tuple[str, int], ...]
    """(worker id, dp rank) of each candidate."""
    columns: Positions
    slots: Positions
    capacities: Capacities
    everyone: Positions
    refused: tuple[Refusal, ...]

    def with_lora(self, lora: str) -> Positions:
        """Those that list the adapter; RequestError naming the known ones if there are none: an adapter is never loaded unasked."""
        positions = self._where([lora in record.loras for record in self.records])
        if not len(positions):
            known = sorted({name for record in self.records for name in record.loras})
            raise RequestError(f"LoRA adapter {lora!r} is on no worker: load it with POST /v1/loras. Known: {', '.join(known) or 'none'}")
        return positions

    def without(self, positions: Positions, worker_ids: Collection[str]) -> Positions:
        """Of these positions, those of other workers."""
        return positions[[self.names[at][0] not in worker_ids for at in positions.tolist()]]

    def of_worker(self, positions: Positions, worker_id: str) -> Positions:
        """Of these positions, those of the worker."""
        return positions[[self.names[at][0] == worker_id for at in positions.tolist()]]

    def why_not(self, record: WorkerRecord) -> str:
        """Why a worker takes no part, in words that follow its id."""
        reasons = [refusal.reason for refusal in self.refused if refusal.worker_id == record.id]
        return f"refused: {reasons[0]}" if reasons else f"is {record.state.value}"

    def _where(self, mask: list[bool]) -> Positions:
        return np.flatnonzero(np.array(mask, np.bool_))


def form_pool(records: tuple[WorkerRecord, ...], block_size: int, place: Place) -> Pool:
    """The pool of those that are placeable and have the pool's block size; keys of another size would never match."""
    refused = tuple(
        Refusal(record.id, f"its block size is {record.block_size}, the router's {block_size}: start it with --block-size {block_size}")
        for record in records if record.block_size != block_size
    )
    misfits = {refusal.worker_id for refusal in refused}
    workers = {record.id: record for record in records if record.placeable and record.id not in misfits}
    rows = [(record, rank) for record in workers.values() for rank in dp_ranks(record)]
    places = np.array([place(record.id, rank) for record, rank in rows], np.int64).reshape(-1, 2)
    return Pool(
        workers=workers, records=tuple(record for record, _ in rows), names=tuple((record.id, rank) for record, rank in rows),
        columns=places[:, 0], slots=places[:, 1], capacities=_capacities([record for record, _ in rows]),
        everyone=np.arange(len(rows)), refused=refused,
    )


def dp_ranks(record: WorkerRecord) -> tuple[int, ...]:
    """Ranks that can be addressed: those that publish events; one without events is rank 0."""
    return tuple(sorted({source.dp_rank for source in record.event_sources})) or (0,)


def _capacities(records: list[WorkerRecord]) -> Capacities:
    """A record counts the blocks of all its ranks."""
    return Capacities(
        np.array([record.total_blocks // len(dp_ranks(record)) for record in records], np.int64),
        np.array([record.max_num_batched_tokens for record in records], np.int64),
    )
