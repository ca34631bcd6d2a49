# SPDX-License-Identifier: Apache-2.0
"""All lanes of one worker: batches of its publishers in, batches of the one stream out. Pure: no sockets, no clock."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tandem_kvbm.consolidator import wire
from tandem_kvbm.consolidator.lane import Lane
from tandem_kvbm.consolidator.operations import Operation, Remove, Store, operations
from tandem_kvbm.consolidator.plan import ALL_RANKS, LaneLimits


@dataclass(frozen=True)
class Change:
    """What consumers have to be told about one rank."""

    dp_rank: int
    timestamp_s: float
    """When the engine published what led to it: consumers measure their lag from there."""
    events: tuple[wire.Event, ...]

    def payload(self) -> bytes:
        """As vLLM would send it."""
        return wire.encode(self.timestamp_s, self.events, self.dp_rank)


class Tracker:
    """Lanes by rank. `source`: the name of a publisher."""

    def __init__(self, ranks: Mapping[str, int], limits: LaneLimits | None = None, lanes: Mapping[int, Lane] | None = None) -> None:
        """`ranks`: each publisher's rank, or ALL_RANKS. `lanes`: those of an earlier process."""
        self.ranks = dict(ranks)
        wanted = sorted({rank for rank in ranks.values() if rank != ALL_RANKS} or {0})
        known = lanes or {}
        self.lanes = {rank: known.get(rank) or Lane(limits) for rank in wanted}
        self.unknown = 0
        """Events of types that nobody knows."""

    def apply(self, source: str, payload: bytes, now: float) -> list[Change]:
        """Takes one batch. Raises msgspec.DecodeError for what isn't one; then nothing has changed."""
        batch = wire.decode(payload)
        steps = operations(batch.events)
        self.unknown += batch.unknown
        return self._each(source, batch.timestamp_s, lambda lane: self._run(lane, source, steps, now))

    def forget(self, source: str, timestamp_s: float) -> list[Change]:
        """A publisher's blocks are worth nothing any more; it starts over."""
        return self._each(source, timestamp_s, lambda lane: lane.clear(source, None))

    def expire(self, now: float) -> None:
        """Gives up what has waited too long."""
        for lane in self.lanes.values():
            lane.expire(now)

    def _each(self, source: str, timestamp_s: float, step: Callable[[Lane], list[wire.Event]]) -> list[Change]:
        rank = self.ranks[source]
        lanes = self.lanes.items() if rank == ALL_RANKS else [(rank, self.lanes[rank])]
        changes = [Change(number, timestamp_s, tuple(step(lane))) for number, lane in lanes]
        return [change for change in changes if change.events]

    @staticmethod
    def _run(lane: Lane, source: str, steps: Sequence[Operation], now: float) -> list[wire.Event]:
        events: list[wire.Event] = []
        for step in steps:
            if isinstance(step, Store):
                events += lane.store(source, step, now)
            elif isinstance(step, Remove):
                events += lane.remove(source, step)
            else:
                events += lane.clear(source)
        return events
