# SPDX-License-Identifier: Apache-2.0
"""Mooncake-style request traces: a reader for real files, and a seeded generator for machines that have none.

The format is `tandem_planner.traces`'; here every prompt has its ids, and its last block may be filled in part.

The generator's shapes are named after Mooncake's published files (FAST25-release/traces) and match, over their full length:

| shape        | requests | mean input (max) | mean output | repeated blocks |
|--------------|----------|------------------|-------------|-----------------|
| conversation | 12,031   | 12,035 (126 k)   | 343         | 36.6 %          |
| synthetic    | 3,993    | 15,325 (126 k)   | 149         | 64.0 %          |

Everything else is our assumption: log-normal lengths, Zipf-shared system prompts, a geometric number of turns per conversation,
each turn's prompt being the last one plus its answer plus new text, exponential pauses between turns. The request rate is the
caller's: more conversations at a time, not faster ones. `Statistics` tells what a trace really has.
"""

import heapq
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from benchmarks.errors import BenchmarkError
from tandem_planner.traces import BLOCK_TOKENS, TraceRequest, read_requests
from tandem_protocol.errors import ConfigError

MAX_INPUT = 126_000
_VOCABULARY_MASK = np.uint64(0x7FFF)


@dataclass(frozen=True)
class Shape:
    """The distributions of one kind of traffic; lengths in tokens."""

    mean_first_input: float
    """Of a conversation's first message, system prompt apart."""
    mean_next_input: float
    mean_output: float
    mean_turns: float
    sigma: float
    """Of all log-normal lengths."""
    system_prompts: int
    mean_system_prompt: float
    mean_pause_s: float = 10.0
    """Between an answer's end and the next turn."""
    token_s: float = 0.02
    """What a turn is assumed to wait for each token of the answer before it."""


SHAPES = {
    "conversation": Shape(mean_first_input=8900, mean_next_input=3600, mean_output=346, mean_turns=1.51, sigma=0.9,
                          system_prompts=50, mean_system_prompt=900),
    "synthetic": Shape(mean_first_input=5200, mean_next_input=4800, mean_output=151, mean_turns=2.5, sigma=0.9,
                       system_prompts=12, mean_system_prompt=1700),
}


@dataclass(frozen=True)
class Statistics:
    """What a trace has."""

    requests: int
    duration_s: float
    mean_input: float
    max_input: int
    mean_output: float
    blocks: int
    repeated_blocks: float
    """Share of block ids seen before: Mooncake's "ideal reuse"."""
    ideal_hit: float
    """Share of prompt tokens that one infinite cache would have had: of the longest known prefix, without the last token's block."""


def read(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """A trace file's first `limit` requests, in order of time. Raises BenchmarkError for what is not a trace."""
    try:
        trace = list(itertools.islice(read_requests(path), limit))
    except ConfigError as exc:
        raise BenchmarkError(str(exc)) from exc
    if not trace or any(len(item.hash_ids) != -(-item.input_length // BLOCK_TOKENS) or item.output_length < 1 for item in trace):
        raise BenchmarkError(f"{path} is empty, or a request's hash_ids are not one per {BLOCK_TOKENS} input tokens")
    return sorted(trace, key=lambda item: item.timestamp)


def write(path: Path, trace: Sequence[TraceRequest]) -> None:
    """Writes a trace file."""
    path.write_bytes(b"".join(msgspec.json.encode(item) + b"\n" for item in trace))


def generate(shape: Shape, requests: int, rate: float, seed: int) -> list[TraceRequest]:
    """`requests` requests at about `rate` per second from a cold start: the same for the same arguments."""
    rng = random.Random(seed)
    ids = itertools.count()
    systems = [_SystemPrompt(_length(rng, shape.mean_system_prompt, shape.sigma), ids) for _ in range(shape.system_prompts)]
    weights = [1 / (rank + 1) for rank in range(len(systems))]
    starts = itertools.accumulate(rng.expovariate(rate / shape.mean_turns) for _ in range(requests))
    conversations = (_Conversation(shape, rng.choices(systems, weights)[0], at, ids, random.Random(rng.random())) for at in starts)
    return list(itertools.islice(_merged(conversations), requests))


def _merged(conversations: Iterator["_Conversation"]) -> Iterator[TraceRequest]:
    """All turns in order of time; conversations come in order of their starts."""
    pending: list[tuple[float, int, _Conversation]] = []
    for number, conversation in enumerate(conversations):
        while pending and pending[0][0] <= conversation.at:
            yield from _turn(pending)
        heapq.heappush(pending, (conversation.at, number, conversation))
    while pending:
        yield from _turn(pending)


def _turn(pending: list[tuple[float, int, "_Conversation"]]) -> Iterator[TraceRequest]:
    _, number, conversation = heapq.heappop(pending)
    yield conversation.turn()
    if conversation.goes_on:
        heapq.heappush(pending, (conversation.at, number, conversation))


class _SystemPrompt:
    def __init__(self, length: int, ids: Iterator[int]) -> None:
        self.length = length
        self.blocks = [next(ids) for _ in range(length // BLOCK_TOKENS)]


class _Conversation:
    """Turns whose prompts grow; its own random numbers, so that it doesn't depend on the others."""

    def __init__(self, shape: Shape, system: _SystemPrompt, at: float, ids: Iterator[int], rng: random.Random) -> None:
        self.at = at
        self.goes_on = True
        self._shape, self._ids, self._rng = shape, ids, rng
        self._blocks = list(system.blocks)
        self._length = min(MAX_INPUT, system.length + _length(rng, shape.mean_first_input, shape.sigma))

    def turn(self) -> TraceRequest:
        """The next request; afterwards `at` is the time of the one after it."""
        full, rest = divmod(self._length, BLOCK_TOKENS)
        self._blocks += [next(self._ids) for _ in range(full - len(self._blocks))]
        output = min(4000, _length(self._rng, self._shape.mean_output, self._shape.sigma))
        partial = [next(self._ids)] if rest else []  # the next turn fills it up with other tokens: another block
        request = TraceRequest(round(self.at * 1000, 3), self._length, output, self._blocks + partial)
        self._length += output + _length(self._rng, self._shape.mean_next_input, self._shape.sigma)
        self.goes_on = self._length <= MAX_INPUT and self._rng.random() < 1 - 1 / self._shape.mean_turns
        self.at += output * self._shape.token_s + self._rng.expovariate(1 / self._shape.mean_pause_s)
        return request


def _length(rng: random.Random, mean: float, sigma: float) -> int:
    """Log-normal with this mean, at least 1."""
    return max(1, round(mean * math.exp(rng.gauss(-0.5 * sigma * sigma, sigma))))


def ideal_hits(trace: Sequence[TraceRequest]) -> list[int]:
    """Prompt tokens of each request that one infinite cache would have, all earlier requests being in it."""
    known: set[int] = set()
    hits = []
    for item in trace:
        depth = next((depth for depth, content in enumerate(item.hash_ids) if content not in known), len(item.hash_ids))
        hits.append(min(depth * BLOCK_TOKENS, item.input_length - 1))
        known.update(item.hash_ids)
    return hits


_BRANCHES = 3
"""A conversation's own prefix ends in as many ways at most: a turn's last, partial block and what the next turn has in its place."""


def sticky_hits(trace: Sequence[TraceRequest], workers: int) -> list[int]:
    """As `ideal_hits`, over so many boundless caches, where each conversation stays on the worker that it began on (the one with the
    least to compute until then): what a fleet can have that shares its load. What conversations share is computed on each worker."""
    shared = _shared_blocks(trace)
    known: list[set[int]] = [set() for _ in range(workers)]
    computed, homes, hits = [0] * workers, dict[int, int](), []
    for item in trace:
        begin = max((index + 1 for index, content in enumerate(item.hash_ids) if content in shared), default=0)
        conversation = item.hash_ids[min(begin, len(item.hash_ids) - 1)]
        home = homes.setdefault(conversation, min(range(workers), key=computed.__getitem__))
        depth = next((depth for depth, content in enumerate(item.hash_ids) if content not in known[home]), len(item.hash_ids))
        hits.append(min(depth * BLOCK_TOKENS, item.input_length - 1))
        computed[home] += item.input_length - hits[-1]
        known[home].update(item.hash_ids)
    return hits


def _shared_blocks(trace: Sequence[TraceRequest]) -> set[int]:
    """The last blocks of prefixes that several conversations share: those from which many ways lead on."""
    following: dict[int, set[int]] = {}
    for item in trace:
        for content, after in itertools.pairwise(item.hash_ids):
            following.setdefault(content, set()).add(after)
    return {content for content, after in following.items() if len(after) > _BRANCHES}


def statistics(trace: Sequence[TraceRequest]) -> Statistics:
    """Measures a trace."""
    inputs = [item.input_length for item in trace]
    blocks = sum(len(item.hash_ids) for item in trace)
    unique = len({content for item in trace for content in item.hash_ids})
    return Statistics(
        requests=len(trace), duration_s=(trace[-1].timestamp - trace[0].timestamp) / 1000, mean_input=sum(inputs) / len(trace),
        max_input=max(inputs), mean_output=sum(item.output_length for item in trace) / len(trace), blocks=blocks,
        repeated_blocks=1 - unique / blocks, ideal_hit=sum(ideal_hits(trace)) / sum(inputs),
    )


def tokens_of(request: TraceRequest) -> npt.NDArray[np.int32]:
    """The prompt's token ids, INT32 [input_length]: 512 tokens of each id, always the same."""
    ids = np.asarray(request.hash_ids, dtype=np.uint64)[:, None] * np.uint64(BLOCK_TOKENS) + np.arange(BLOCK_TOKENS, dtype=np.uint64)
    mixed = ids * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed ^ (mixed >> np.uint64(29))) >> np.uint64(17) & _VOCABULARY_MASK).astype(np.int32).reshape(-1)[: request.input_length]
