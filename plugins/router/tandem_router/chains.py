# SPDX-License-Identifier: Apache-2.0
"""Chains of blocks by column (a worker's rank), in which a shared prefix is stored once and counted once per column.

A block's key is a chained hash: it stands for the whole prefix up to its block, so two chains that agree at one position
agree before it, and where they part is found by binary search. All columns share one tree whose nodes are runs of blocks,
arrays of keys: adding, releasing and looking up a chain cost as many steps as it has branches, not blocks, and one look-up
answers for all columns. Not thread-safe.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]


class Run:
    """Blocks that follow one another without a branch; the handle of the chains that end with it."""

    __slots__ = ("chains", "children", "end", "keys", "parent", "start")

    def __init__(self, keys: Keys, start: int, end: int, parent: "Run | None") -> None:
        self.keys, self.start, self.end, self.parent = keys, start, end, parent
        self.children: dict[int, Run] = {}
        """By their first key."""
        self.chains: dict[int, int] = {}
        """Column -> its chains that pass or end here; a column without any is absent."""

    def __len__(self) -> int:
        """Blocks."""
        return self.end - self.start

    @property
    def first(self) -> int:
        """The first key."""
        return self.keys.item(self.start)


class ChainForest:
    """Chains of block keys; one added twice must be released twice. Keeps only what is new of an array, as a copy."""

    def __init__(self) -> None:
        self._root = Run(np.zeros(0, np.uint64), 0, 0, None)
        self._blocks: Counter[int] = Counter()

    def blocks(self, column: int) -> int:
        """Unique blocks of a column."""
        return self._blocks[column]

    def depths(self, keys: Keys, columns: NDArray[np.int64]) -> NDArray[np.int32]:
        """How many leading keys each of these columns has, shape (len(columns),)."""
        found = np.zeros(1 + max(int(columns.max(initial=0)), max(self._blocks, default=0)), np.int32)
        for run, depth, _ in self._walk(keys):
            found[list(run.chains)] = depth
        return found[columns]

    def add(self, column: int, keys: Keys) -> Run:
        """Adds one chain (not empty) and returns the handle by which it is released."""
        end, depth = self._root, 0
        for run, reached, within in self._walk(keys):
            end = run if within == len(run) else _split(run, within)
            depth = reached
        if depth < len(keys):
            end.children[keys.item(depth)] = end = Run(keys[depth:].copy(), 0, len(keys) - depth, end)
        for run in _upwards(end):
            if column not in run.chains:
                self._blocks[column] += len(run)
            run.chains[column] = run.chains.get(column, 0) + 1
        return end

    def release(self, column: int, end: Run) -> None:
        """Releases one chain; blocks that no other chain has leave the forest."""
        for run in list(_upwards(end)):
            run.chains[column] -= 1
            if not run.chains[column]:
                del run.chains[column]
                self._blocks[column] -= len(run)
                if not run.chains and run.parent is not None:
                    del run.parent.children[run.first]

    def check_integrity(self, held: Iterable[tuple[int, Run]]) -> None:
        """Recounts everything, given (column, handle) of all chains; AssertionError if a figure is off."""
        passing = Counter((id(run), column) for column, end in held for run in _upwards(end))
        runs = list(self._runs())
        if passing != {(id(run), column): count for run in runs for column, count in run.chains.items()}:
            raise AssertionError(f"{len(runs)} runs of blocks are held by other chains than those known")
        blocks = Counter[int]()
        for run in runs:
            blocks.update(dict.fromkeys(run.chains, len(run)))
        if blocks != self._blocks or not all(run.chains for run in runs):
            raise AssertionError(f"blocks per column are miscounted: {dict(self._blocks)}, but they sum up to {dict(blocks)}")

    def _walk(self, keys: Keys) -> Iterator[tuple[Run, int, int]]:
        """The runs along a chain, each with the depth reached at its end and how far the chain goes within."""
        run, depth, length = self._root, 0, len(keys)
        while depth < length:
            child = run.children.get(keys.item(depth))
            if child is None:
                return
            run = child
            within = _common(run, keys, depth, min(len(run), length - depth))
            depth += within
            partly = within < len(run)
            yield run, depth, within
            if partly:
                return

    def _runs(self) -> Iterator[Run]:
        waiting = list(self._root.children.values())
        while waiting:
            run = waiting.pop()
            waiting.extend(run.children.values())
            yield run


def _upwards(run: Run) -> Iterator[Run]:
    """From a run to the first of its chain; the root, which has no blocks, is left out."""
    while run.parent is not None:
        yield run
        run = run.parent


def _common(run: Run, keys: Keys, depth: int, limit: int) -> int:
    """How many of the first `limit` blocks of a run are those of the chain from `depth` on; the first one is."""
    ours, theirs, start = run.keys.item, keys.item, run.start
    if ours(start + limit - 1) == theirs(depth + limit - 1):
        return limit
    low, high = 1, limit  # the first `low` are common, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        if ours(start + middle - 1) == theirs(depth + middle - 1):
            low = middle
        else:
            high = middle
    return low


def _split(run: Run, within: int) -> Run:
    """Cuts a run in two and returns the upper one; handles stay with the lower, where their chains end."""
    parent = run.parent
    if parent is None:
        raise AssertionError("the root has no blocks, so no chain can end within")
    upper = Run(run.keys[run.start : run.start + within].copy(), 0, within, parent)  # a view would keep the longer array alive
    upper.chains = dict(run.chains)
    parent.children[upper.first] = upper
    run.start, run.parent = run.start + within, upper
    upper.children[run.first] = run
    return upper
