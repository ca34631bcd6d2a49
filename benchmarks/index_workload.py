# SPDX-License-Identifier: Apache-2.0
"""The load of the index benchmark: prompts, which worker stores which, and the same as vLLM events and as RadixTree's JSON."""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from dynamo.llm import compute_block_hash_for_seq
from numpy.typing import NDArray

from tandem_protocol.blocks import Keys, hash_blocks
from tandem_protocol.kv_events import BlockStored, encode

BLOCK_SIZE = 16
EVENT_BLOCKS = 256
"""Blocks per event unless told otherwise: 4,096 tokens, a usual prefill chunk."""
PROMPT_BLOCKS = 8000
SHARED_BLOCKS = 32
"""Every prompt begins with the same system prompt."""
VOCABULARY = 150_000


@dataclass(frozen=True)
class Prompt:
    """One prompt of PROMPT_BLOCKS blocks in every form that is needed, so that no conversion is timed."""

    tokens: NDArray[np.uint32]
    hashes: NDArray[np.uint64]
    """The engine's own."""
    keys: Keys
    local: list[int]
    """RadixTree's hashes of each block alone."""


@dataclass(frozen=True)
class Workload:
    """Store events in order, `(worker, event)`, and the same three times over."""

    workers: int
    prompts: list[Prompt]
    events: list[tuple[int, BlockStored]]
    frames: list[tuple[int, bytes]]
    radix: list[tuple[int, bytes]]

    @functools.cached_property
    def most_blocks(self) -> int:
        """What the fullest worker stores, repetitions included: all have such a device."""
        return int(np.bincount([worker for worker, _ in self.events], [len(event.hashes) for _, event in self.events]).max())

    @property
    def stored_blocks(self) -> int:
        """Blocks in all store events."""
        return sum(len(event.hashes) for _, event in self.events)


def make_prompts(count: int, seed: int) -> list[Prompt]:
    """Seeded prompts."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, VOCABULARY, SHARED_BLOCKS * BLOCK_SIZE, dtype=np.uint32)
    shared_hashes = rng.integers(1, 2**63, SHARED_BLOCKS, dtype=np.uint64)
    return [_prompt(rng, shared, shared_hashes) for _ in range(count)]


def _prompt(rng: np.random.Generator, shared: NDArray[np.uint32], shared_hashes: NDArray[np.uint64]) -> Prompt:
    own = PROMPT_BLOCKS - SHARED_BLOCKS
    tokens = np.concatenate([shared, rng.integers(0, VOCABULARY, own * BLOCK_SIZE, dtype=np.uint32)])
    hashes = np.concatenate([shared_hashes, rng.integers(1, 2**63, own, dtype=np.uint64)])
    return Prompt(tokens, hashes, hash_blocks(tokens, BLOCK_SIZE), compute_block_hash_for_seq(tokens.tolist(), BLOCK_SIZE))


def make_workload(prompts: list[Prompt], workers: int, event_blocks: int = EVENT_BLOCKS) -> Workload:
    """Every prompt is held whole by one worker, to a half by a second, and to an eighth by two more; their events come mixed."""
    events, radix = [], []
    for worker, prompt, piece in _mixed(prompts, workers, event_blocks):
        events.append((worker, _event(prompt, piece)))
        radix.append((worker, _radix_event(prompt, piece, len(radix))))
    return Workload(workers, prompts, events, [(worker, encode([event])) for worker, event in events], radix)


def _mixed(prompts: list[Prompt], workers: int, event_blocks: int) -> Iterator[tuple[int, Prompt, slice]]:
    """All pieces in a random order in which each copy of a prompt keeps its own."""
    copies = []
    for number, prompt in enumerate(prompts):
        for copy, share in enumerate((1, 2, 8, 8)):
            blocks = PROMPT_BLOCKS // share
            pieces = [slice(begin, min(begin + event_blocks, blocks)) for begin in range(0, blocks, event_blocks)]
            copies.append(((number + copy * (workers // 4 + 1)) % workers, prompt, pieces))
    turns = np.repeat(np.arange(len(copies)), [len(pieces) for _, _, pieces in copies])
    streams = [iter(pieces) for _, _, pieces in copies]
    for turn in np.random.default_rng(0).permutation(turns).tolist():
        worker, prompt, _ = copies[turn]
        yield worker, prompt, next(streams[turn])


def _event(prompt: Prompt, piece: slice) -> BlockStored:
    tokens = prompt.tokens[piece.start * BLOCK_SIZE : piece.stop * BLOCK_SIZE]
    return BlockStored(hashes=prompt.hashes[piece], parent=_parent(prompt, piece), tokens=tokens, block_size=BLOCK_SIZE)


def _radix_event(prompt: Prompt, piece: slice, number: int) -> bytes:
    pairs = zip(prompt.hashes[piece].tolist(), prompt.local[piece], strict=True)
    stored = {"parent_hash": _parent(prompt, piece), "blocks": [{"block_hash": block, "tokens_hash": local} for block, local in pairs]}
    return json.dumps({"event_id": number, "data": {"stored": stored}, "dp_rank": 0}, separators=(",", ":")).encode()


def _parent(prompt: Prompt, piece: slice) -> int | None:
    return int(prompt.hashes[piece.start - 1]) if piece.start else None
