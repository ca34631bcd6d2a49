# SPDX-License-Identifier: Apache-2.0
"""Traces as loads.

What of a prompt is cached is worked out before the simulation, with one LRU cache of a bounded number of tokens in front of the fleet:
what a router that places by KV can have at best.
"""

from collections import OrderedDict
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import numpy as np

from tandem_planner.simulate.load import Load
from tandem_planner.traces import BLOCK_TOKENS, TraceRequest, read_requests
from tandem_protocol.errors import ConfigError


def read_trace(path: Path, cache_tokens: int, speed: float = 1.0) -> Load:
    """A file as a load. `speed` 2 lets requests arrive twice as fast. Raises ConfigError for what is no trace."""
    return from_lines(path.name, list(read_requests(path)), cache_tokens, speed)


def from_lines(name: str, lines: Sequence[TraceRequest], cache_tokens: int, speed: float = 1.0) -> Load:
    """Requests as a load that begins at 0. Raises ConfigError for an empty trace."""
    if not lines or speed <= 0:
        raise ConfigError(f"trace {name} is empty, or --speed is not above 0")
    ordered = sorted(lines, key=attrgetter("timestamp"))
    begin = ordered[0].timestamp
    at = np.array([(line.timestamp - begin) / 1000 / speed for line in ordered])
    lengths = np.array([line.input_length for line in ordered], dtype=np.int64)
    cached = np.minimum(np.array(cached_tokens(ordered, cache_tokens), dtype=np.int64), np.maximum(lengths - 1, 0))
    outputs = np.array([max(1, line.output_length) for line in ordered], dtype=np.int64)
    return Load(name, at, lengths, outputs, cached, float(at[-1]) + 1.0)


def cached_tokens(lines: Sequence[TraceRequest], cache_tokens: int) -> list[int]:
    """Prompt tokens of each request that are in one LRU cache of so many tokens when it comes."""
    cache: OrderedDict[int, None] = OrderedDict()
    room = cache_tokens // BLOCK_TOKENS
    hits = []
    for line in lines:
        depth = next((depth for depth, block in enumerate(line.hash_ids) if block not in cache), len(line.hash_ids))
        hits.append(depth * BLOCK_TOKENS)
        for block in reversed(line.hash_ids):  # so that the end of a prompt is given up before its beginning
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > room:
            cache.popitem(last=False)
    return hits
