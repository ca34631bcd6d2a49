# SPDX-License-Identifier: Apache-2.0
"""A set of block chains in which shared prefixes are stored and counted once.

A block's key is a chained hash: it stands for the whole prefix up to its block, so a key has one parent for ever, and a
set of chains is closed under prefixes. Hence membership along a prompt is monotone (binary search finds the shared depth),
and adding or releasing a chain touches only the blocks that no other chain has. Not thread-safe.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_ROOT = -1
"""Parent of a first block; keys are unsigned."""


class ChainSet:
    """Chains of block keys; a chain added twice must be released twice."""

    __slots__ = ("_extra", "parents")

    def __init__(self) -> None:
        self.parents: dict[int, int] = {}
        """Block -> the block before it; to be read only."""
        # Holders (children and chains that end here) beyond the first; nearly every block has just one.
        self._extra: dict[int, int] = {}

    def __len__(self) -> int:
        """Unique blocks."""
        return len(self.parents)

    def depth(self, keys: Sequence[int]) -> int:
        """How many leading keys are in the set, in O(log n) look-ups."""
        parents = self.parents
        if not keys or keys[0] not in parents:
            return 0
        low, high = 1, len(keys) + 1  # the answer is in [low, high)
        if keys[-1] in parents:
            return len(keys)
        while high - low > 1:
            middle = (low + high) // 2
            if keys[middle - 1] in parents:
                low = middle
            else:
                high = middle
        return low

    def add(self, keys: Sequence[int]) -> int:
        """Adds one chain (not empty) and returns how many blocks are new."""
        known = self.depth(keys)
        new = keys[known:]
        if known:
            self._hold(keys[known - 1])
        if new:
            self.parents.update(zip(new, [keys[known - 1] if known else _ROOT, *new[:-1]], strict=True))
        return len(new)

    def release(self, last_key: int) -> int:
        """Releases one chain by its last key and returns how many blocks left the set."""
        gone = 0
        key = last_key
        parents, extra = self.parents, self._extra
        while key != _ROOT and key not in extra:
            key = parents.pop(key, _ROOT)
            gone += 1
        if key != _ROOT:
            self._let_go(key)
        return gone

    def _hold(self, key: int) -> None:
        self._extra[key] = self._extra.get(key, 0) + 1

    def _let_go(self, key: int) -> None:
        self._extra[key] -= 1
        if not self._extra[key]:
            del self._extra[key]

    def check_integrity(self, last_keys: Iterable[int]) -> None:
        """Recounts all holders, given the last keys of all chains; AssertionError if the set is wrong."""
        holders = Counter(last_keys)
        holders.update(parent for parent in self.parents.values() if parent != _ROOT)
        if holders != Counter({key: 1 + self._extra.get(key, 0) for key in self.parents}):
            raise AssertionError(f"holders of blocks are miscounted: {len(holders)} held, {len(self.parents)} stored")


def depths(chains: Sequence[ChainSet], keys: Sequence[int]) -> NDArray[np.int32]:
    """Shared depth of `keys` (not empty) with each set, in blocks, shape (len(chains),).

    Most sets have either nothing of a prompt or just the system prompt, so the smallest depth found so far is tried first.
    """
    found = [0] * len(chains)
    first, guess = keys[0], len(keys)
    for at, chain in enumerate(chains):
        blocks = chain.parents
        if first not in blocks:
            continue
        if keys[guess - 1] not in blocks:
            guess = found[at] = chain.depth(keys)
        else:
            found[at] = guess if guess == len(keys) or keys[guess] not in blocks else chain.depth(keys)
    return np.array(found, np.int32)
