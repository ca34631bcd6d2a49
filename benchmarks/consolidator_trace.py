# SPDX-License-Identifier: Apache-2.0
"""The load of the consolidator's benchmark: batches as vLLM publishes them when prompts move through device, host memory and disk.

Pure and seeded. Hashes are integers, as vLLM sends them by default. In every batch the time stands at the same place; here it is the
batch's number, which the consolidator passes on: so each frame that comes out tells which one led to it.
"""

import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import numpy as np

from benchmarks.errors import BenchmarkError
from tandem_protocol.kv_events import BlockRemoved, BlockStored, Tier, decode

BLOCK_SIZE = 16
PROMPT_BLOCKS = 256
"""4,096 tokens: a usual chunk of prefill, which vLLM announces as one event."""
DECODE_BLOCKS = 8
"""Blocks that a prompt's answer fills, each in a batch of its own."""
VOCABULARY = 150_000
_TIME = slice(2, 10)
"""A batch is an array (one byte) of a float (one byte, then this), events and rank."""


class StoredEvent(msgspec.Struct, tag="BlockStored"):
    """The fields of vLLM 0.32's `BlockStored`, in its order."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = "GPU"
    lora_name: str | None = None
    extra_keys: list[None] | None = None
    group_idx: int | None = 0
    kv_cache_spec_kind: str | None = "full_attention"
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None


class RemovedEvent(msgspec.Struct, tag="BlockRemoved"):
    """The fields of vLLM 0.32's `BlockRemoved`, in its order."""

    block_hashes: list[int]
    medium: str | None = "GPU"
    group_idx: int | None = 0
    locality: str | None = None
    ownership: str | None = None


Event = StoredEvent | RemovedEvent


@dataclass(frozen=True)
class Frame:
    """One batch: its payload, and how many blocks its events name."""

    payload: bytearray
    blocks: int


@dataclass(frozen=True)
class Sequence:
    """A prompt with its answer: hashes of its blocks, and their tokens."""

    hashes: list[int]
    tokens: list[int]

    def stored(self, begin: int, end: int, medium: str, owner: str | None = None) -> StoredEvent:
        """A run of its blocks."""
        parent = self.hashes[begin - 1] if begin else None
        tokens = self.tokens[begin * BLOCK_SIZE : end * BLOCK_SIZE]
        return StoredEvent(self.hashes[begin:end], parent, tokens, BLOCK_SIZE, medium=medium, ownership=owner)


@dataclass
class _Tiers:
    """Which sequences are where, oldest first, and how many have room."""

    room: dict[str, int]
    held: dict[str, deque[Sequence]] = field(default_factory=dict)

    def put(self, medium: str, sequence: Sequence) -> Sequence | None:
        """The sequence that has to leave."""
        queue = self.held.setdefault(medium, deque())
        queue.append(sequence)
        return queue.popleft() if len(queue) > self.room[medium] else None


def device_frames(sequences: int, seed: int = 1) -> Iterator[Frame]:
    """An engine without tiers: prompts are stored in runs, and evicted block by block."""
    tiers = _Tiers({"GPU": 64})
    for sequence in _sequences(sequences, seed):
        yield from _computed(sequence)
        yield from _evicted(tiers.put("GPU", sequence))


def tier_frames(sequences: int, seed: int = 1) -> Iterator[Frame]:
    """An engine with host memory and a disk: each block goes to both, one event per block, and leaves one tier after the other."""
    tiers = _Tiers({"GPU": 64, "CPU": 128, "STORAGE": 256})
    for sequence in _sequences(sequences, seed):
        yield from _computed(sequence)
        blocks = range(len(sequence.hashes))
        yield _frame([sequence.stored(block, block + 1, "CPU") for block in blocks])
        yield _frame([sequence.stored(block, block + 1, "STORAGE", "disk") for block in blocks])
        yield from _evicted(tiers.put("GPU", sequence))
        for medium, owner in (("CPU", None), ("STORAGE", "disk")):
            gone = tiers.put(medium, sequence)
            if gone is not None:
                yield _frame([RemovedEvent(gone.hashes, medium=medium, ownership=owner)])


def number(payload: bytearray, value: int) -> None:
    """Gives a batch its number."""
    payload[_TIME] = struct.pack(">d", value)


def number_of(payload: bytes) -> int:
    """A batch's number, also of one that it led to."""
    return int(struct.unpack(">d", payload[_TIME])[0])


class State:
    """What a reader of a stream holds: in each tier, each block's parent and tokens. Raises BenchmarkError for an unsound stream."""

    def __init__(self) -> None:
        self.held: dict[Tier, dict[int, tuple[int | None, bytes]]] = {tier: {} for tier in Tier}

    def read(self, payload: bytes) -> None:
        """The next batch."""
        for event in decode(payload).events:
            if isinstance(event, BlockStored):
                self._store(event)
            elif isinstance(event, BlockRemoved):
                for block in event.hashes.tolist():
                    if self.held[event.tier].pop(block, None) is None:
                        raise BenchmarkError(f"block {block} was taken out of {event.tier.name} where it was not")

    def _store(self, event: BlockStored) -> None:
        parent, tokens = event.parent, event.tokens.reshape(len(event.hashes), -1)
        for block, content in zip(event.hashes.tolist(), tokens, strict=True):
            if parent is not None and not any(parent in tier for tier in self.held.values()):
                raise BenchmarkError(f"block {block} came before its parent {parent}")
            self.held[event.tier][block] = parent, content.tobytes()
            parent = block


def _sequences(count: int, seed: int) -> Iterator[Sequence]:
    rng, size = np.random.default_rng(seed), PROMPT_BLOCKS + DECODE_BLOCKS
    for _ in range(count):
        hashes = rng.integers(1 << 32, 1 << 64, size, dtype=np.uint64).tolist()
        yield Sequence(hashes, rng.integers(0, VOCABULARY, size * BLOCK_SIZE).tolist())


def _computed(sequence: Sequence) -> Iterator[Frame]:
    yield _frame([sequence.stored(0, PROMPT_BLOCKS, "GPU")])
    for block in range(PROMPT_BLOCKS, len(sequence.hashes)):
        yield _frame([sequence.stored(block, block + 1, "GPU")])


def _evicted(sequence: Sequence | None) -> Iterator[Frame]:
    """vLLM's block pool sends an event per block."""
    if sequence is not None:
        yield _frame([RemovedEvent([block]) for block in reversed(sequence.hashes)])


def _frame(events: list[Event]) -> Frame:
    return Frame(bytearray(msgspec.msgpack.encode([0.0, events, 0])), sum(len(event.block_hashes) for event in events))
