# SPDX-License-Identifier: Apache-2.0
"""The index against a model of plain dictionaries, over random histories; its integrity is checked after every step."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_protocol.blocks import hash_blocks
from tandem_protocol.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event, Tier
from tandem_router.index import KvIndex, warm_up

BLOCK = 2
DEPTH = 5
SEQUENCES = tuple(tuple((sequence if depth else sequence // 2) for depth in range(DEPTH)) for sequence in range(4))
"""Prompts by block content; pairs share their first block."""


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    warm_up()


def tokens_of(contents: Sequence[int]) -> np.ndarray:
    return np.repeat(np.array(contents, np.uint32), BLOCK)


def external(worker: int, contents: Sequence[int], alias: int = 0) -> int:
    """An engine's hash of the last block of a prefix: some engines' hashes differ, some are small."""
    number = alias + 2 * sum((content + 1) * 5**depth for depth, content in enumerate(contents))
    return number if worker == 0 else (number * 0x9E3779B97F4A7C15) % 2**64


@dataclass
class ModelSlot:
    """What one slot should hold, by (tier, group): the engine's hashes. `content` is what each of them stands for."""

    groups: dict[Tier, set[int]] = field(default_factory=lambda: {tier: set() for tier in Tier})
    held: dict[tuple[int, Tier], set[int]] = field(default_factory=dict)
    content: dict[int, tuple[int, ...]] = field(default_factory=dict)
    waiting: list[tuple[BlockStored, tuple[int, ...], int, set[int]]] = field(default_factory=list)

    def complete(self, block_hash: int, tier: Tier) -> bool:
        return bool(self.groups[tier]) and self.groups[tier] <= self.held.get((block_hash, tier), set())

    def known(self, block_hash: int) -> bool:
        return any(self.held.get((block_hash, tier)) for tier in Tier)

    def holds(self, contents: tuple[int, ...]) -> Tier | None:
        tiers = [tier for tier in Tier for h, c in self.content.items() if c == contents and self.complete(h, tier)]
        return min(tiers, default=None)


@dataclass(frozen=True)
class Store:
    worker: int
    sequence: int
    begin: int
    end: int
    tier: Tier
    group: int
    bare: bool
    """Hashes without tokens."""
    times: int


@dataclass(frozen=True)
class Remove:
    worker: int
    sequence: int
    begin: int
    end: int
    tier: Tier
    group: int | None


@dataclass(frozen=True)
class Clear:
    worker: int


@dataclass(frozen=True)
class Forget:
    worker: int


workers = st.integers(0, 2)
sequences = st.integers(0, len(SEQUENCES) - 1)
tiers = st.sampled_from([Tier.GPU, Tier.GPU, Tier.CPU, Tier.STORAGE])
spans = st.tuples(st.integers(0, DEPTH - 1), st.integers(1, DEPTH)).map(lambda pair: (min(pair), max(pair[0] + 1, pair[1])))
stores = st.builds(lambda w, s, span, t, g, b, n: Store(w, s, *span, t, g, b, n), workers, sequences, spans, tiers,
                   st.sampled_from([0, 0, 0, 1]), st.sampled_from([False, False, False, True]), st.integers(1, 2))
removes = st.builds(lambda w, s, span, t, g: Remove(w, s, *span, t, g), workers, sequences, spans, tiers, st.sampled_from([None, 0, 0, 1]))
steps = st.one_of(stores, stores, stores, removes, removes, st.builds(Clear, workers), st.builds(Forget, workers))


class Model:
    """The same history on dictionaries."""

    def __init__(self) -> None:
        self.slots = [ModelSlot() for _ in range(3)]

    def store(self, worker: int, event: BlockStored, contents: tuple[int, ...], begin: int) -> None:
        slot = self.slots[worker]
        slot.groups[event.tier].add(event.group)
        bare = len(event.tokens) == 0
        if not bare and event.parent is not None and not slot.known(event.parent):
            slot.waiting.append((event, contents, begin, set()))
            return
        for offset, block_hash in enumerate(event.hashes.tolist()):
            if bare and not slot.known(block_hash):
                continue
            slot.held.setdefault((block_hash, event.tier), set()).add(event.group)
            slot.content[block_hash] = contents[: begin + offset + 1]
        if not bare:
            self._adopt(worker, event)

    def _adopt(self, worker: int, event: BlockStored) -> None:
        slot = self.slots[worker]
        for block_hash in event.hashes.tolist():
            ready = [entry for entry in slot.waiting if entry[0].parent == block_hash]
            slot.waiting = [entry for entry in slot.waiting if entry[0].parent != block_hash]
            for waited, contents, begin, gone in ready:
                self.store(worker, waited, contents, begin)
                for removed in gone:
                    slot.held.get((removed, waited.tier), set()).discard(waited.group)

    def remove(self, worker: int, event: BlockRemoved) -> None:
        slot = self.slots[worker]
        for block_hash in event.hashes.tolist():
            held = slot.held.get((block_hash, event.tier), set())
            held -= {0, 1} if event.group is None else {event.group}
            for waited, _, _, gone in slot.waiting:
                if waited.tier is event.tier and event.group in (None, waited.group) and block_hash in waited.hashes.tolist():
                    gone.add(block_hash)
        slot.waiting = [entry for entry in slot.waiting if len(entry[3]) < len(entry[0].hashes)]

    def clear(self, worker: int) -> None:
        slot = self.slots[worker]
        slot.held = {key: groups for key, groups in slot.held.items() if key[1] is not Tier.GPU}
        slot.waiting = [entry for entry in slot.waiting if entry[0].tier is not Tier.GPU]

    def overlap(self, worker: int, contents: tuple[int, ...]) -> list[int]:
        counts = [0, 0, 0]
        for depth in range(1, len(contents) + 1):
            tier = self.slots[worker].holds(contents[:depth])
            if tier is None:
                break
            counts[tier] += 1
        return counts


def event_of(step: Store | Remove) -> Event:
    contents = SEQUENCES[step.sequence]
    hashes = np.array([external(step.worker, contents[: depth + 1]) for depth in range(step.begin, step.end)], np.uint64)
    if isinstance(step, Remove):
        return BlockRemoved(hashes=hashes, tier=step.tier, group=step.group)
    parent = external(step.worker, contents[: step.begin]) if step.begin and not step.bare else None
    tokens = np.empty(0, np.uint32) if step.bare else tokens_of(contents[step.begin : step.end])
    return BlockStored(hashes=hashes, parent=parent, tokens=tokens, block_size=0 if step.bare else BLOCK, tier=step.tier, group=step.group)


@settings(max_examples=400, deadline=None)
@given(st.lists(steps, max_size=30))
def test_any_history_gives_the_overlaps_of_a_naive_model(history: list[Store | Remove | Clear | Forget]) -> None:
    """After every step: the tables agree with one another, and every prompt matches as the model says."""
    index, model = KvIndex(), Model()
    slots = [index.add_worker(f"w{worker}", 0) for worker in range(3)]
    for step in history:
        if isinstance(step, Store):
            for _ in range(step.times):
                event = event_of(step)
                index.apply(slots[step.worker], event)
                model.store(step.worker, event, SEQUENCES[step.sequence], step.begin)
        elif isinstance(step, Remove):
            index.apply(slots[step.worker], event_of(step))
            model.remove(step.worker, event_of(step))
        elif isinstance(step, Clear):
            index.apply(slots[step.worker], AllBlocksCleared())
            model.clear(step.worker)
        else:
            index.remove_worker(f"w{step.worker}")
            slots[step.worker] = index.add_worker(f"w{step.worker}", 0)
            model.slots[step.worker] = ModelSlot()
        index.check_integrity()
        for contents in SEQUENCES:
            blocks = index.match(hash_blocks(tokens_of(contents), BLOCK)).blocks
            assert [blocks[:, slot].tolist() for slot in slots] == [model.overlap(worker, contents) for worker in range(3)]
