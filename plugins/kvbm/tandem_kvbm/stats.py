# SPDX-License-Identifier: Apache-2.0
"""What the tiers of one engine did: blocks moved, tokens matched, hits over the last requests. Pure; the scheduler's thread only."""

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum


class Level(StrEnum):
    """Tiers by their distance from the device, as Dynamo numbers them."""

    DEVICE = "G1"
    HOST = "G2"
    DISK = "G3"
    OBJECT = "G4"


OFFLOADED_TO = {Level.HOST: "offload_blocks_d2h", Level.DISK: "offload_blocks_h2d", Level.OBJECT: "offload_blocks_d2o"}
ONBOARDED_FROM = {Level.HOST: "onboard_blocks_h2d", Level.DISK: "onboard_blocks_d2d", Level.OBJECT: "onboard_blocks_o2d"}
HIT_RATE = {Level.HOST: "host_cache_hit_rate", Level.DISK: "disk_cache_hit_rate", Level.OBJECT: "object_cache_hit_rate"}


class HitWindow:
    """Hit rate over the last requests: blocks found among blocks asked for. A request that asked nothing doesn't count."""

    def __init__(self, max_requests: int) -> None:
        self._requests: deque[tuple[int, int]] = deque(maxlen=max_requests)
        self._asked = self._found = 0

    def record(self, asked: int, found: int) -> None:
        """Adds one request; the oldest goes when there are too many."""
        if asked == 0:
            return
        if len(self._requests) == self._requests.maxlen:
            old_asked, old_found = self._requests[0]
            self._asked, self._found = self._asked - old_asked, self._found - old_found
        self._requests.append((asked, found))
        self._asked, self._found = self._asked + asked, self._found + found

    @property
    def rate(self) -> float:
        """0 to 1; 0 before the first request."""
        return self._found / self._asked if self._asked else 0.0


@dataclass
class _Asked:
    """Blocks that one request asked a tier for, each once, however often it is looked up; and how many were found."""

    asked: set[bytes] = field(default_factory=set)
    found: int = 0


@dataclass
class TierCounters:
    """One tier since the engine's start."""

    offloaded_blocks: int = 0
    onboarded_blocks: int = 0
    read_failures: int = 0
    """Blocks that could not be read."""
    write_failures: int = 0
    """Write jobs that failed; each is a batch of blocks."""


class KvbmStats:
    """Everything counted about one engine's tiers. Requests in flight are bounded by the scheduler's own bound on them."""

    def __init__(self, levels: tuple[Level, ...], tokens_per_block: int, max_requests: int) -> None:
        self.tiers = {level: TierCounters() for level in levels}
        self.windows = {level: HitWindow(max_requests) for level in levels}
        self.matched_tokens = 0
        self.requests = 0
        self._tokens_per_block = tokens_per_block
        self._requests: dict[str, dict[Level, _Asked] | None] = {}
        """None: scheduled."""

    def on_lookup(self, request_id: str, level: Level, key: bytes, found: bool) -> bool:
        """A tier said whether it has a block. Its first answer counts: later the block may have come from the tier below.

        Returns whether it was the first."""
        levels = self._requests.setdefault(request_id, {})
        if levels is None:
            return False
        if (asked := levels.get(level)) is None:
            asked = levels[level] = _Asked()
        if key in asked.asked:
            return False
        asked.asked.add(key)
        asked.found += found
        return True

    def on_scheduled(self, request_id: str) -> None:
        """The request has found what it will use; what it asks from here on doesn't count."""
        asked = self._requests.get(request_id)
        if asked is None:
            return
        self._requests[request_id] = None
        for level, of_level in asked.items():
            self.windows[level].record(len(of_level.asked), of_level.found)
        self.requests += 1

    def on_request_end(self, request_id: str) -> None:
        """The request asks no more."""
        self._requests.pop(request_id, None)

    def on_offloaded(self, level: Level, blocks: int) -> None:
        """A tier took blocks."""
        self.tiers[level].offloaded_blocks += blocks

    def on_onboarded(self, level: Level, blocks: int) -> None:
        """A tier gave blocks to the tier above it."""
        self.tiers[level].onboarded_blocks += blocks
        if level is Level.HOST:
            self.matched_tokens += blocks * self._tokens_per_block

    def on_read_failures(self, level: Level, blocks: int) -> None:
        """Blocks that a tier was thought to have could not be read."""
        self.tiers[level].read_failures += blocks

    def on_write_failure(self, level: Level) -> None:
        """A batch of blocks, or a part of it, could not be written."""
        self.tiers[level].write_failures += 1

    def values(self) -> dict[str, float]:
        """Metric name without prefix -> value, for the tiers that there are."""
        values: dict[str, float] = {"matched_tokens": self.matched_tokens}
        for level, tier in self.tiers.items():
            values[OFFLOADED_TO[level]] = tier.offloaded_blocks
            values[ONBOARDED_FROM[level]] = tier.onboarded_blocks
            values[HIT_RATE[level]] = self.windows[level].rate
        if Level.OBJECT in self.tiers:
            values["object_read_failures"] = self.tiers[Level.OBJECT].read_failures
            values["object_write_failures"] = self.tiers[Level.OBJECT].write_failures
        return values
