# SPDX-License-Identifier: Apache-2.0
"""What an object store counts of its bucket, as totals since its start. What became of the blocks is the tier's to count."""

import threading
from collections import Counter
from enum import StrEnum
from typing import Final

PREFIX: Final = "kvbm_bucket_"


class Count(StrEnum):
    """Each a counter of its own."""

    PROBES = "probes"
    UNANSWERED = "unanswered_probes"
    LISTINGS = "listings"
    READS = "reads"
    WRITES = "writes"
    PARTS = "parts"
    EVICTED = "evicted"
    RETRIES = "retries"
    REFUSED = "refused"
    PROBE_FAILURES = "probe_failures"
    READ_FAILURES = "read_failures"
    WRITE_FAILURES = "write_failures"
    DELETE_FAILURES = "delete_failures"
    ABORT_FAILURES = "abort_failures"
    LEDGER_FAILURES = "ledger_failures"
    CORRUPT = "corrupt"
    VANISHED = "vanished"
    LOST_RACES = "lost_races"
    BREAKER_OPENED = "breaker_opened"


DESCRIPTIONS: Final = {
    Count.PROBES: "Blocks whose presence was asked of the bucket.",
    Count.UNANSWERED: "Blocks of a probe that got no answer in time: taken for missing.",
    Count.LISTINGS: "Pages of listings.",
    Count.READS: "Blocks asked for.",
    Count.WRITES: "Blocks sent.",
    Count.PARTS: "Parts of multipart uploads.",
    Count.EVICTED: "Blocks given up to stay within this worker's quota.",
    Count.RETRIES: "Attempts after the first one.",
    Count.REFUSED: "Operations refused at once, while the bucket was left alone.",
    Count.PROBE_FAILURES: "Probes that failed as a whole.",
    Count.READ_FAILURES: "Reads that failed after all attempts.",
    Count.WRITE_FAILURES: "Writes that failed after all attempts.",
    Count.DELETE_FAILURES: "Removals that failed; they are tried again with the next one.",
    Count.ABORT_FAILURES: "Multipart uploads that could not be aborted either: the bucket's lifecycle rule has to.",
    Count.LEDGER_FAILURES: "Times that the note of what this worker wrote could not be read or saved.",
    Count.CORRUPT: "Objects that were not the block they should be; removed.",
    Count.VANISHED: "Blocks that were believed to be there and weren't.",
    Count.LOST_RACES: "Uploads that found the block written by another worker meanwhile.",
    Count.BREAKER_OPENED: "Times that the bucket was left alone after failures in a row.",
}


class Counters:
    """Thread-safe."""

    def __init__(self) -> None:
        self._counts: Counter[Count] = Counter()
        self._lock = threading.Lock()

    def add(self, count: Count, amount: int = 1) -> None:
        """Counts."""
        with self._lock:
            self._counts[count] += amount

    def __getitem__(self, count: Count) -> int:
        with self._lock:
            return self._counts[count]

    def snapshot(self) -> dict[Count, int]:
        """All of them, zeros too."""
        with self._lock:
            return {count: self._counts[count] for count in Count}
