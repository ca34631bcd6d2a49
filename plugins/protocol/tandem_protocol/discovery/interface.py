# SPDX-License-Identifier: Apache-2.0
"""The contract of every store: `Discovery`, `Registration`, and what they hand out."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Generic

import msgspec
from typing_extensions import TypeVar

from tandem_protocol.errors import ConfigError
from tandem_protocol.records import Record
from tandem_protocol.workers import WorkerRecord, WorkerState

LEASE_TTL_S = 10.0
"""A worker that gives no sign for this long is not listed any more. Dynamo's lease; well above any pause of a healthy process."""
BEATS_PER_LEASE = 3
"""Signs of life per lease: two may get lost."""
R = TypeVar("R", bound=Record, default=WorkerRecord)
"""The kind of record that a store was opened for."""
DEBOUNCE_S = 0.05
"""Changes within this time of one another become one snapshot: a fleet that starts or stops together is one event."""


class Snapshot(msgspec.Struct, Generic[R], frozen=True, kw_only=True):
    """All records at one time, ordered by id."""

    records: tuple[R, ...]
    current: bool = True
    """False while the store can't be reached: then `records` is the last view, in which workers may have come or gone."""


@dataclass
class Counts:
    """What happened to one discovery object since it was opened; for metrics. Written by its own threads only."""

    registrations: int = 0
    re_registrations: int = 0
    """A lease or file was lost and made anew."""
    losses: int = 0
    """Times that the store could not be reached any more."""
    bad_records: int = 0
    """Entries that are no record; they are left out."""
    graced: int = 0
    """Workers that were missing when the store came back, and were kept for one lease."""
    swept: int = 0
    """Entries of dead workers that were removed on their behalf."""


class Registration(ABC, Generic[R]):
    """One worker's entry. It lives until `close`, or one lease after its process died.

    Error handling: once made, it heals by itself. If the store forgets it or goes away, it is written again as soon as
    that is possible, in its latest state, and counted as a re-registration.
    """

    @property
    @abstractmethod
    def record(self) -> R:
        """The record as it was last asked for."""

    @property
    @abstractmethod
    def held(self) -> bool:
        """Whether the store, as far as known, holds this very record now."""

    @abstractmethod
    async def update(self, record: R) -> None:
        """Replaces the record; returns when it is stored, or when the store turned out to be away and it will be written later.

        Raises ConfigError for a record with another id: that would be another worker.
        """

    async def set_state(self: "Registration[WorkerRecord]", state: WorkerState) -> None:
        """As `update`, of the state alone."""
        await self.update(msgspec.structs.replace(self.record, state=state))

    @abstractmethod
    async def close(self) -> None:
        """Removes the entry, if the store can be reached; else it ends with its lease. Repeating it does nothing."""


class Discovery(ABC, Generic[R]):
    """A store of records of one kind. Used on one event loop; every call is bounded by a few seconds.

    Resource handling: `close` ends its watches and closes its registrations.
    """

    def __init__(self) -> None:
        self.counts = Counts()

    @abstractmethod
    async def register(self, record: R) -> Registration[R]:
        """Stores a record under a lease and keeps it alive. An entry of the same id is replaced.

        Raises UnavailableError if the store can't be reached: nothing is registered then, and the caller retries.
        """

    @abstractmethod
    def watch(self) -> AsyncGenerator[Snapshot[R], None]:
        """The whole view first, and again after each change, until `close`.

        Snapshots are whole, so a slow reader misses versions but never a difference; none is queued. Where the store is
        away the view stays as it was (`current` is false). After it is back, a worker that is missing in it is kept for one more lease:
        it may not have found the time to register again.
        """

    @abstractmethod
    async def list(self) -> tuple[R, ...]:
        """The records that the store holds now, ordered by id. Raises UnavailableError if it can't be reached."""

    @abstractmethod
    async def close(self) -> None:
        """Ends watches and registrations. Repeating it does nothing."""


def check_same_worker(old: Record, new: Record) -> None:
    """Raises ConfigError if `new` is of another worker than `old`."""
    if old.id != new.id:
        raise ConfigError(f"the registration of {old.id!r} can't become one of {new.id!r}: close it and register the other")
