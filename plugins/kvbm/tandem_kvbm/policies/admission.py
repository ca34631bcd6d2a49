# SPDX-License-Identifier: Apache-2.0
"""What is worth writing to a slow tier: Dynamo's frequency filter, at most O(1) amortised per question.

A block counts 1 when it is first seen and twice as much each time it is seen again; every `decay_s` takes 1 off. It is admitted from
`minimum` on: with 2, when it comes back within `decay_s`. Most prompts never do, and disks wear.
"""

import time
from collections import OrderedDict
from collections.abc import Callable


class Admission:
    """Not thread-safe: the scheduler's thread asks."""

    def __init__(self, minimum: int = 2, decay_s: float = 600.0, capacity: int = 1_000_000,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self._minimum, self._decay_s, self._capacity, self._clock = minimum, decay_s, capacity, clock
        self._seen: OrderedDict[bytes, tuple[int, float]] = OrderedDict()
        self._most = 1 << 16
        """No count grows further: it would only take longer to decay."""

    def __len__(self) -> int:
        return len(self._seen)

    def sees(self, key: bytes) -> bool:
        """Notes that the block was seen; True if it is worth writing by now. The longest unseen block is forgotten when it is full."""
        count = self._count(key)
        self._seen.pop(key, None)
        self._seen[key] = (min(2 * count, self._most) if count else 1, self._clock())
        if len(self._seen) > self._capacity:
            self._seen.popitem(last=False)
        return self.admits(key)

    def admits(self, key: bytes) -> bool:
        """Whether the block is worth writing, without having been seen once more."""
        return self._count(key) >= self._minimum

    def _count(self, key: bytes) -> int:
        count, seen_s = self._seen.get(key, (0, 0.0))
        return max(0, count - int((self._clock() - seen_s) / self._decay_s)) if count else 0
