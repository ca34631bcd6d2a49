# SPDX-License-Identifier: Apache-2.0
"""The KV blocks of one mock engine, kept as vLLM's BlockPool keeps them (v1/core/block_pool.py).

Every block is used (referenced) or free. A full block carries its hash and stays findable after it is freed, until it is
needed: free blocks without a hash go first, newest first; then the cached ones, least recently freed first. Two blocks may
carry the same hash (two requests that computed the same tokens); each is announced when stored and again when removed, as
vLLM does, so a reader of the events must count.
"""

from collections import OrderedDict
from collections.abc import Sequence

from tandem_protocol.errors import EngineError


class BlockPool:
    """Allocation and prefix cache over block ids 0..total-1. Not thread-safe."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._references = [0] * total
        self._hash_of: list[int | None] = [None] * total
        self._blank = list(range(total - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._found: dict[int, list[int]] = {}

    @property
    def free(self) -> int:
        """Blocks that can be allocated."""
        return len(self._blank) + len(self._evictable)

    def cached_hashes(self) -> list[int]:
        """The hash of every cached block, used or free; a hash twice if two blocks carry it."""
        return [content for content, blocks in self._found.items() for _ in blocks]

    def match(self, hashes: Sequence[int]) -> list[int]:
        """Blocks of the longest cached prefix. They may be evicted until `touch`ed."""
        matched: list[int] = []
        for content in hashes:
            blocks = self._found.get(content)
            if blocks is None:
                break
            matched.append(blocks[0])
        return matched

    def evictable_among(self, blocks: Sequence[int]) -> int:
        """How many of these are free now, so that touching them takes them from the free ones."""
        return sum(1 for block in blocks if not self._references[block])

    def touch(self, blocks: Sequence[int]) -> None:
        """Takes a reference on each matched block."""
        for block in blocks:
            if not self._references[block]:
                del self._evictable[block]
            self._references[block] += 1

    def allocate(self, count: int) -> tuple[list[int], list[int]]:
        """Takes `count` free blocks; returns them and the hashes evicted for it. Raises EngineError if there are fewer."""
        if count > self.free:
            raise EngineError(f"{count} KV blocks wanted and {self.free} free: the scheduler must check before it allocates")
        blocks: list[int] = []
        evicted: list[int] = []
        for _ in range(count):
            block = self._blank.pop() if self._blank else self._evict(evicted)
            self._references[block] = 1
            blocks.append(block)
        return blocks, evicted

    def _evict(self, evicted: list[int]) -> int:
        block, _ = self._evictable.popitem(last=False)
        evicted.append(self._forget(block))
        return block

    def _forget(self, block: int) -> int:
        content = self._hash_of[block]
        assert content is not None
        self._hash_of[block] = None
        blocks = self._found[content]
        blocks.remove(block)
        if not blocks:
            del self._found[content]
        return content

    def cache(self, blocks: Sequence[int], hashes: Sequence[int]) -> None:
        """Makes used, full blocks findable by their hash."""
        for block, content in zip(blocks, hashes, strict=True):
            self._hash_of[block] = content
            self._found.setdefault(content, []).append(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Drops a request's references, its last block first, so that the tail of a sequence is evicted before its head."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._hash_of[block] is None:
                self._blank.append(block)
            else:
                self._evictable[block] = None

    def clear(self) -> bool:
        """Forgets all cached blocks; refuses (False) while any block is used, as vLLM does."""
        if self.free < self.total:
            return False
        for block in list(self._evictable):
            self._forget(block)
            self._blank.append(block)
        self._evictable.clear()
        return True

    def check_integrity(self) -> None:
        """Raises EngineError if free and used blocks, hashes and references contradict one another."""
        free = {*self._blank, *self._evictable}
        holders = {block for blocks in self._found.values() for block in blocks}
        faults = {
            "a block is free twice": len(free) != self.free,
            "a free block is referenced": any(self._references[block] for block in free),
            "a used block is not referenced": any(self._references[block] < 1 for block in range(self.total) if block not in free),
            "the hash index and the blocks disagree": holders != {b for b in range(self.total) if self._hash_of[b] is not None},
            "a blank block has a hash": any(self._hash_of[block] is not None for block in self._blank),
        }
        found = [fault for fault, present in faults.items() if present]
        if found:
            raise EngineError(f"the block pool is broken: {'; '.join(found)}")
