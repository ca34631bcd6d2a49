# SPDX-License-Identifier: Apache-2.0
"""The consolidator's figures at one moment, for `/health` and Prometheus."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Protocol

import msgspec

from tandem_kvbm.consolidator.intake import Intake
from tandem_kvbm.consolidator.outlet import Outlet
from tandem_kvbm.consolidator.tracker import Tracker


class Running(Protocol):
    """What a pump tells of itself."""

    dumps: int
    save_failures: int
    unasked: int

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""

    @property
    def lag_s(self) -> float:
        """From the engine's publication to ours."""

    @property
    def published(self) -> int:
        """Frames so far."""


class SourceReport(msgspec.Struct, frozen=True, kw_only=True):
    """One publisher."""

    name: str
    endpoint: str
    connected: bool
    synced: bool
    last_seq: int
    failures: int
    counts: dict[str, int]
    """`event_sequence_terms.Counts`."""


class LaneReport(msgspec.Struct, frozen=True, kw_only=True):
    """One rank."""

    dp_rank: int
    blocks: int
    waiting: int
    counts: dict[str, int]
    """`lane.Counts`."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    alive: bool
    ready: bool
    """The thread runs, and all that the publishers are known to have published is in the stream."""
    published: int
    lag_s: float
    dumps: int
    save_failures: int
    refused_answers: int
    broken_answers: int
    unknown_events: int
    sources: tuple[SourceReport, ...]
    lanes: tuple[LaneReport, ...]


def report_on(intakes: Sequence[Intake], tracker: Tracker, outlet: Outlet, pump: Running) -> Report:
    """Gathers the figures."""
    sources = tuple(_source(intake) for intake in intakes)
    return Report(
        alive=pump.alive, ready=pump.alive and all(source.synced for source in sources), published=pump.published, lag_s=pump.lag_s,
        dumps=pump.dumps, save_failures=pump.save_failures, refused_answers=outlet.refused + pump.unasked,
        broken_answers=outlet.broken_off, unknown_events=tracker.unknown, sources=sources,
        lanes=tuple(LaneReport(dp_rank=rank, blocks=lane.held, waiting=lane.waiting, counts=asdict(lane.counts))
                    for rank, lane in tracker.lanes.items()),
    )


def _source(intake: Intake) -> SourceReport:
    return SourceReport(
        name=intake.publisher.name, endpoint=intake.publisher.endpoint, connected=intake.connected, synced=intake.sequence.synced,
        last_seq=intake.sequence.last_seq, failures=intake.failures, counts=asdict(intake.sequence.counts),
    )
