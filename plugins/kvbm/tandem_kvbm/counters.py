# SPDX-License-Identifier: Apache-2.0
"""What tiers count: every block that was found, kept, lost or left out. Any thread counts; the scheduler's thread collects."""

import threading
from collections import Counter
from typing import Final

COUNTERS: Final = {
    "hits": "Blocks that a lookup found in the tier and that were asked for.",
    "misses": "Blocks that a request looked up in vain, once per request.",
    "loaded": "Blocks brought back into host memory.",
    "stored": "Blocks written.",
    "evicted": "Blocks given up for others, or found gone.",
    "dropped": "Blocks not written because the store queue was full, the store was away or could make no room.",
    "filtered": "Blocks not written because the admission filter had not seen them often enough.",
    "corrupt": "Blocks whose bytes were not those written; removed, and computed anew.",
    "missing": "Blocks that were gone when they were read.",
    "read_failures": "Blocks that could not be read because the store failed.",
    "write_failures": "Blocks that could not be written because the store failed.",
    "lookup_failures": "Blocks whose presence could not be told in time.",
    "expired_loads": "Load jobs ended by their deadline.",
    "expired_stores": "Store jobs ended by their deadline.",
    "read_bytes": "Bytes of blocks brought back.",
    "written_bytes": "Bytes of blocks written.",
}
GAUGES: Final = {
    "blocks": "Blocks in the tier.",
    "used_bytes": "Bytes in the tier.",
    "capacity_bytes": "The tier's bound in bytes, where it has one.",
}
PREFIX: Final = "kvbm_tier_"


class TierCounters:
    """Counts since the last `take`, by the names in COUNTERS."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, amount: int = 1) -> None:
        """Raises KeyError for a name that isn't declared: a typo is a bug."""
        COUNTERS[name]
        if amount:
            with self._lock:
                self._counts[name] += amount

    def take(self) -> Counter[str]:
        """The counts, which start anew."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return counts
