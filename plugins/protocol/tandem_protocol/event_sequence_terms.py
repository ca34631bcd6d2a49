# SPDX-License-Identifier: Apache-2.0
"""The words in which `event_sequence` speaks: whom it acts upon, its bounds, its counters, a place in a stream."""

from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from typing import Protocol

import msgspec

_END_BYTES = 128

class Sink(Protocol):
    """What a sequence acts upon. The methods may not call back into the sequence."""

    def apply(self, seq: int, payload: bytes) -> bool:
        """Applies one batch; False if it can't be read."""

    def clear(self) -> None:
        """Forgets all that was applied so far, in all tiers."""

    def ask(self, start: int) -> None:
        """Asks the publisher for all it holds from number `start` on; answers to earlier questions must not come any more."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one sequence."""

    reply_s: float = 2.0
    """Silence after which a replay counts as unanswered. vLLM serves replays between batches, at least every 0.1 s."""
    attempts: int = 4
    """Replays without progress before something else is tried."""
    backoff_s: float = 0.1
    """Before the second attempt; doubles."""
    backoff_limit_s: float = 5.0
    held_frames: int = 8192
    check_s: float = 5.0
    """Silence after which the publisher is asked whether there is more: it finds a lost tail and a silent restart."""
    remembered: int = 64
    """Fingerprints kept, and so the number of frames that every replay repeats."""


@dataclass
class Counts:
    """Everything that went other than planned, and how much went well; only ever grow."""

    batches: int = 0
    duplicates: int = 0
    gaps: int = 0
    replays: int = 0
    """Replays asked for, idle checks included."""
    unanswered: int = 0
    resyncs: int = 0
    restarts: int = 0
    """Times the publisher turned out to be another one than before."""
    malformed: int = 0
    overflows: int = 0
    """Live frames let go while a replay ran, to be replayed later."""
    lost: int = 0
    """Batches that were not to be had when the slot was last filled: counted anew at each resync. Never without a cleared slot."""


class Position(msgspec.Struct, frozen=True):
    """A place in one publisher's stream, good for finding it again after a restart of the router."""

    next_seq: int
    fingerprint: int
    """Of the batch before `next_seq`."""


class Phase(StrEnum):
    """See the drawing in `event_sequence`."""

    AWAY = "away"
    ASKING = "asking"
    RESTING = "resting"
    LIVE = "live"


def fingerprint(payload: bytes) -> int:
    """64 bits that tell batches apart. Length and ends are enough: a batch begins with its time of publication, to the microsecond."""
    ends = payload if len(payload) <= 2 * _END_BYTES else payload[:_END_BYTES] + payload[-_END_BYTES:]
    return int.from_bytes(blake2b(ends, digest_size=8, salt=len(payload).to_bytes(8, "big")).digest(), "big")
