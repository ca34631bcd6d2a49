# SPDX-License-Identifier: Apache-2.0
"""What is in flight on every worker, effective from the moment of a decision.

A request counts from `add` until `free`; nothing expires by age, since a long generation is as real as a short one. Orphans
are found by their owner: `forget_worker` when a worker is gone, `forget_replica` when the router that placed them is.
Routers of the same workers tell each other by `BookEvent`s; books keep a remote request like an own one. A column stands for
one data-parallel rank of one worker. Not thread-safe: the router's event loop alone calls it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from tandem_router.book_events import Add, BookEvent, Free, Output, PrefillDone, Publisher, publish_nothing
from tandem_router.chains import ChainForest, Keys, Run
from tandem_router.cost import Loads

_Key = tuple[str, int]
"""(replica, ticket)."""


@dataclass(frozen=True)
class PlacedPrompt:
    """What the books keep of a request's prompt."""

    keys: Keys
    isl: int
    block_size: int
    prefill_tokens: int
    expected_output_tokens: int = 0


@dataclass(slots=True)
class _Held:
    """One request in flight."""

    add: Add
    column: int
    run: Run | None
    """Its chain; None if no block of it can be shared."""
    unshared: int
    """Prompt blocks outside the chains: the last one if it is filled in part, or all."""
    prefill_tokens: int
    produced: int = 0
    output_blocks: float = 0.0

    def output_load(self) -> float:
        """Blocks of generated tokens, fading as the expected end, which frees them, comes near."""
        size, isl = self.add.block_size, self.add.isl
        grown = -(-(isl + self.produced) // size) - -(-isl // size)
        expected = self.add.expected_output_tokens
        return grown * max(0.0, 1 - self.produced / expected) if expected else float(grown)


@dataclass
class Misses:
    """Events that could not be applied, for metrics."""

    unknown: int = 0
    """Of a request that isn't held: freed, forgotten, or its Add was lost."""
    duplicate: int = 0


class Books:
    """Requests in flight of one pool of workers."""

    def __init__(self, *, pool: str, replica: str = "", assume_kv_reuse: bool = True, track_output: bool = False,
                 publish: Publisher = publish_nothing) -> None:
        self.misses = Misses()
        self.pool = pool
        self._replica, self._publish = replica, publish
        self._reuse, self._track_output = assume_kv_reuse, track_output
        self._held: dict[_Key, _Held] = {}
        self._columns: dict[tuple[str, int], int] = {}
        self._spare: list[int] = []
        self._registered: set[str] = set()
        self._chains = ChainForest()
        self._prefill = np.zeros(0, np.int64)
        self._blocks = np.zeros(0, np.int64)
        self._output = np.zeros(0, np.float64)
        self._requests = np.zeros(0, np.int64)

    def __len__(self) -> int:
        """Requests in flight."""
        return len(self._held)

    def register(self, worker: str, dp_rank: int) -> int:
        """The column of a worker's rank, kept until `forget_worker`."""
        self._registered.add(worker)
        return self._column(worker, dp_rank)

    def count_of(self, replica: str) -> int:
        """Requests in flight that a router placed; looks at all, so it is for reports."""
        return sum(owner == replica for owner, _ in self._held)

    def columns_of(self, worker: str) -> tuple[int, ...]:
        """The columns of a worker's ranks."""
        return tuple(column for (name, _), column in self._columns.items() if name == worker)

    def loads(self, columns: NDArray[np.int64]) -> Loads:
        """A copy of what is in flight on these columns."""
        return Loads(self._prefill[columns], self._blocks[columns] + self._output[columns], self._requests[columns])

    def shared(self, keys: Keys, columns: NDArray[np.int64]) -> NDArray[np.int32]:
        """Leading blocks of a prompt that requests in flight hold already, per column."""
        if not self._reuse or not len(keys):
            return np.zeros(len(columns), np.int32)
        return self._chains.depths(keys, columns)

    def add(self, ticket: int, worker: str, dp_rank: int, prompt: PlacedPrompt) -> None:
        """Books an own request, at once."""
        keys = np.asarray(prompt.keys, "<u8").tobytes() if self._reuse else b""
        event = Add(replica=self._replica, pool=self.pool, ticket=ticket, worker=worker, dp_rank=dp_rank, keys=keys, isl=prompt.isl,
                    block_size=prompt.block_size, prefill_tokens=prompt.prefill_tokens,
                    expected_output_tokens=prompt.expected_output_tokens)
        self._apply(event)
        self._publish(event)

    def prefill_done(self, ticket: int) -> bool:
        """The worker has computed the prompt; false if the request is not held, or was done before."""
        held = self._held.get((self._replica, ticket))
        if held is None or held.prefill_tokens == 0:
            return False
        event = PrefillDone(replica=self._replica, pool=self.pool, ticket=ticket)
        self._apply(event)
        self._publish(event)
        return True

    def output(self, ticket: int, tokens: int) -> bool:
        """Counts generated tokens if that is asked for; replicas hear of it per block, not per token."""
        held = self._held.get((self._replica, ticket))
        if held is None or not self._track_output:
            return False
        before = held.output_blocks
        self._grow(held, held.produced + tokens)
        if held.output_blocks != before:
            self._publish(Output(replica=self._replica, pool=self.pool, ticket=ticket, produced=held.produced))
        return True

    def free(self, ticket: int) -> bool:
        """The request is over, however it ended; false if it is not held."""
        if (self._replica, ticket) not in self._held:
            return False
        event = Free(replica=self._replica, pool=self.pool, ticket=ticket)
        self._apply(event)
        self._publish(event)
        return True

    def apply_remote(self, event: BookEvent) -> bool:
        """Takes another replica's event; false if it is of another pool, or our own come back."""
        if event.pool != self.pool or event.replica == self._replica:
            return False
        self._apply(event)
        return True

    def own_requests(self) -> Iterator[Add]:
        """Own requests as they stand now, for a replica that has just come up."""
        for (replica, _), held in self._held.items():
            if replica == self._replica:
                yield msgspec.structs.replace(held.add, prefill_tokens=held.prefill_tokens, produced=held.produced)

    def forget_worker(self, worker: str) -> int:
        """A worker is gone, and with it what was in flight there; returns how many requests."""
        self._registered.discard(worker)
        gone = [key for key, held in self._held.items() if held.add.worker == worker]
        for key in gone:
            self._release(self._held.pop(key))
        for name, rank in [place for place in self._columns if place[0] == worker]:
            self._drop_column(name, rank)
        return len(gone)

    def forget_replica(self, replica: str) -> int:
        """Another router is gone; its clients are too. Returns how many requests it had in flight."""
        gone = [key for key in self._held if key[0] == replica]
        for key in gone:
            self._release(self._held.pop(key))
        return len(gone)

    def check_integrity(self) -> None:
        """Recounts everything from the requests held; AssertionError if a figure is off."""
        requests = Counter(held.column for held in self._held.values())
        self._chains.check_integrity((held.column, held.run) for held in self._held.values() if held.run is not None)
        for column in range(len(self._requests)):
            here = [held for held in self._held.values() if held.column == column]
            blocks = self._chains.blocks(column) + sum(held.unshared for held in here)
            figures = (requests[column], sum(held.prefill_tokens for held in here), blocks)
            stored = (int(self._requests[column]), int(self._prefill[column]), int(self._blocks[column]))
            if stored != figures:
                raise AssertionError(f"column {column} holds {stored} requests, prefill tokens and blocks, but they sum up to {figures}")
            output = sum(held.output_blocks for held in here)
            if not np.isclose(self._output[column], output, atol=1e-6) or self._output[column] < 0:
                raise AssertionError(f"column {column} holds {self._output[column]} output blocks, but they sum up to {output}")

    def _apply(self, event: BookEvent) -> None:
        held = self._held.get((event.replica, event.ticket))
        match event:
            case Add():
                self._hold(event, held)
            case _ if held is None:
                self.misses.unknown += 1
            case PrefillDone():
                self._prefill[held.column] -= held.prefill_tokens
                held.prefill_tokens = 0
            case Output():
                self._grow(held, event.produced)
            case Free():
                self._release(self._held.pop((event.replica, event.ticket)))

    def _hold(self, add: Add, known: _Held | None) -> None:
        if known is not None:
            self.misses.duplicate += 1
            return
        column = self._column(add.worker, add.dp_rank)
        keys = np.frombuffer(add.keys if self._reuse else b"", "<u8")
        unshared = max(0, -(-add.isl // add.block_size) - len(keys))
        before = self._chains.blocks(column)
        held = _Held(add, column, self._chains.add(column, keys) if len(keys) else None, unshared, add.prefill_tokens)
        self._held[(add.replica, add.ticket)] = held
        self._blocks[column] += unshared + self._chains.blocks(column) - before
        self._prefill[column] += add.prefill_tokens
        self._requests[column] += 1
        if add.produced:
            self._grow(held, add.produced)

    def _grow(self, held: _Held, produced: int) -> None:
        held.produced = produced
        load = held.output_load() if self._track_output else 0.0
        self._output[held.column] = max(0.0, self._output[held.column] + load - held.output_blocks)
        held.output_blocks = load

    def _release(self, held: _Held) -> None:
        column = held.column
        before = self._chains.blocks(column)
        if held.run is not None:
            self._chains.release(column, held.run)
        self._blocks[column] -= held.unshared + before - self._chains.blocks(column)
        self._prefill[column] -= held.prefill_tokens
        self._requests[column] -= 1
        # Fractions don't sum back to zero exactly; an empty column does.
        self._output[column] = max(0.0, self._output[column] - held.output_blocks) if self._requests[column] else 0.0
        if not self._requests[column] and held.add.worker not in self._registered:
            self._drop_column(held.add.worker, held.add.dp_rank)

    def _column(self, worker: str, dp_rank: int) -> int:
        column = self._columns.get((worker, dp_rank))
        if column is None:
            column = self._spare.pop() if self._spare else self._widen()
            self._columns[(worker, dp_rank)] = column
        return column

    def _widen(self) -> int:
        self._prefill, self._blocks, self._requests = (np.append(array, 0) for array in (self._prefill, self._blocks, self._requests))
        self._output = np.append(self._output, 0.0)
        return len(self._requests) - 1

    def _drop_column(self, worker: str, dp_rank: int) -> None:
        column = self._columns.pop((worker, dp_rank), None)
        if column is not None:
            self._spare.append(column)
