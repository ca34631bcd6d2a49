# SPDX-License-Identifier: Apache-2.0
"""Blocks as objects in a bucket, for a worker that shares it with others.

Nothing here trusts the network: every operation has a deadline, a bucket that fails in a row is left alone for a while (`breaker`), what
is read is proven by its footer, and what is lost on the way is counted. Nothing here trusts the other workers either: a block that was
there may be gone, and somebody else may write the one that is being written.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from tandem_kvbm.blob import FOOTER_BYTES, CorruptBlockError, check_footer, make_footer
from tandem_kvbm.breaker import Breaker
from tandem_kvbm.objects.bucket import Bucket
from tandem_kvbm.objects.config import ObjectConfig
from tandem_kvbm.objects.counters import Count, Counters
from tandem_kvbm.objects.names import Names
from tandem_kvbm.objects.presence import Presence
from tandem_kvbm.objects.probes import Prober
from tandem_kvbm.objects.quota import Quota
from tandem_kvbm.store import BlockStore, MissingBlockError, StoreStats, StoreUnavailableError, Written

T = TypeVar("T")
Clock = Callable[[], float]
logger = logging.getLogger(__name__)

_CLEAR_PAGES = 10_000
_CLEAR_DEADLINE_S = 60.0
_OPEN_DEADLINE_S = 10.0


class ObjectStore(BlockStore):
    """See the module and the contract.

    Threads: all methods from any thread; `holds`, `touch` and `stats` take a lock for microseconds and do no I/O.
    """

    def __init__(self, config: ObjectConfig, namespace: str, layout: bytes, block_bytes: int, clock: Clock = time.monotonic) -> None:
        """`namespace` names model and layout in object names; `layout` is what the footers prove."""
        self._config, self._layout, self._block_bytes = config, layout, block_bytes
        self.counters = Counters()
        self.breaker = Breaker(config.breaker_failures, config.backoff_s, config.backoff_max_s, clock)
        self._names = Names(config.prefix, namespace)
        self._presence = Presence(config.presence_entries, config.present_ttl_s, config.absent_ttl_s, clock)
        # A probe is small and somebody waits for it; a transfer gets half its deadline, so that a second attempt fits in.
        self._bucket = Bucket(config, config.read_deadline_s / 2, self.counters, clock)
        self._prober = Prober(config, self._names, self.counters, clock)
        self._quota = Quota(config, self._names, self._bucket, self.counters)
        self._writing: set[bytes] = set()
        self._stored = 0
        self._lock = threading.Lock()
        self._closed = False

    def open(self) -> Sequence[bytes]:
        """An unreachable bucket is no reason not to start (it may come back); a wrong one is."""
        try:
            self._guard(Count.PROBE_FAILURES, lambda: self._bucket.check(self._bucket.deadline(_OPEN_DEADLINE_S)))
            held = self._guard(Count.LEDGER_FAILURES, self._quota.load)
        except StoreUnavailableError as exc:
            logger.warning("object store: bucket %s doesn't answer; starting without it: %s", self._config.bucket_name, exc)
            return ()
        self._presence.put(held, there=True)
        return held

    def holds(self, key: bytes) -> bool | None:
        """As believed; whether the bucket is left alone is for `ready` to say."""
        return self._presence.get(key)

    def ready(self) -> bool:
        """False while the bucket is left alone."""
        return not self.breaker.is_shut_off()

    def probe(self, keys: Sequence[bytes]) -> list[bool]:
        """Keys that got no answer in time count as missing, and are asked again the next time."""
        found = self._guard(Count.PROBE_FAILURES, lambda: self._prober.find(keys))
        for there in (True, False):
            self._presence.put((key for key, answer in found.items() if answer is there), there)
        return [found.get(key, False) for key in keys]

    def read(self, key: bytes, into: memoryview) -> None:
        """One GET of the whole object."""
        self.counters.add(Count.READS)
        name, deadline = self._names.name_of(key), self._bucket.deadline(self._config.read_deadline_s)
        try:
            footer = self._guard(Count.READ_FAILURES, lambda: self._bucket.get(name, into, deadline))
            check_footer(footer, key, self._layout, into)
        except MissingBlockError:
            self.counters.add(Count.VANISHED)
            self._forget(key)
            raise
        except CorruptBlockError:
            self.counters.add(Count.CORRUPT)
            self._forget(key)
            self._quota.give_up([key])
            raise
        self._presence.put((key,), there=True)

    def write(self, key: bytes, block: memoryview, priority: int = 0) -> Written:
        """What another worker has stored is left as it is, and is not this worker's to evict."""
        if self._presence.get(key) or not self._begin(key):
            return Written(stored=False)
        try:
            return self._write(key, block, priority)
        finally:
            with self._lock:
                self._writing.discard(key)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Only what this worker wrote can be kept longer."""
        self._quota.touch(keys)

    def clear(self) -> Sequence[bytes]:
        """All of this model and layout if the bucket or prefix is this worker's alone; else what this worker wrote."""
        keys = self._listed() if self._config.is_exclusive else self._quota.keys()
        self._quota.forget(keys)
        self._guard(Count.DELETE_FAILURES, lambda: self._quota.delete(keys, self._bucket.deadline(_CLEAR_DEADLINE_S)))
        self._presence.clear()
        with self._lock:
            self._stored = 0
        return keys

    def stats(self) -> StoreStats:
        """What this worker wrote, where there is a quota; else what it wrote since its start."""
        blocks = len(self._quota) if self._quota.bounded else self._stored
        size = self._block_bytes + FOOTER_BYTES
        capacity = self._config.num_blocks * size if self._quota.bounded else None
        return StoreStats(blocks=blocks, size_bytes=blocks * size, capacity_bytes=capacity)

    def close(self) -> None:
        """Saves the ledger first, within its deadline."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with suppress(StoreUnavailableError):  # counted by the guard
            self._guard(Count.LEDGER_FAILURES, self._quota.save)
        self._prober.close()
        self._bucket.close()

    def counts(self) -> dict[Count, int]:
        """Everything counted so far, by name."""
        return {**self.counters.snapshot(), Count.BREAKER_OPENED: self.breaker.opened}

    def _begin(self, key: bytes) -> bool:
        with self._lock:
            if key in self._writing:
                return False
            self._writing.add(key)
            return True

    def _write(self, key: bytes, block: memoryview, priority: int) -> Written:
        if not self._quota.takes(priority):
            return Written(stored=False)
        self.counters.add(Count.WRITES)
        body = b"".join((block, make_footer(key, self._layout, block)))
        name, deadline = self._names.name_of(key), self._bucket.deadline(self._config.write_deadline_s)
        try:
            stored = self._guard(Count.WRITE_FAILURES, lambda: self._bucket.put(name, body, deadline, only_new=True))
        except StoreUnavailableError:
            self._quota.doubt(key)
            raise
        self._presence.put((key,), there=True)
        if not stored:
            self.counters.add(Count.LOST_RACES)
            return Written(stored=False)
        with self._lock:
            self._stored += 1
        return Written(stored=True, evicted=self._make_room(key, priority))

    def _make_room(self, key: bytes, priority: int) -> tuple[bytes, ...]:
        """Gives up what the quota demands. The ledger is saved now and then on the way."""
        victims = self._quota.note(key, priority)
        self._presence.put(victims, there=False)
        with suppress(StoreUnavailableError):  # counted by the guard; the quota tries again at the next write
            self._guard(Count.DELETE_FAILURES, self._quota.settle)
        return tuple(victims)

    def _listed(self) -> list[bytes]:
        deadline = self._bucket.deadline(_CLEAR_DEADLINE_S)
        pages = self._guard(Count.DELETE_FAILURES, lambda: list(self._bucket.names(self._names.root, _CLEAR_PAGES, deadline)))
        return [key for page in pages for name in page if (key := self._names.key_of(name)) is not None]

    def _forget(self, key: bytes) -> None:
        self._presence.put((key,), there=False)
        self._quota.forget((key,))

    def _guard(self, failure: Count, operation: Callable[[], T]) -> T:
        """Runs an operation if the breaker lets it, and tells the breaker how it went."""
        if not self.breaker.admit():
            self.counters.add(Count.REFUSED)
            raise StoreUnavailableError("the bucket failed and is left alone for a while")
        answered = True
        try:
            return operation()
        except StoreUnavailableError:
            answered = False
            self.counters.add(failure)
            raise
        finally:
            self.breaker.succeeded() if answered else self.breaker.failed()
