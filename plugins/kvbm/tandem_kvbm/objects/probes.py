# SPDX-License-Identifier: Apache-2.0
"""Which of many blocks are in the bucket, asked in the cheaper way and in bounded time.

Many HEADs at once, or one page of a listing, which answers for up to 1,000 objects. What counts is the interpreter's time, since it is
the scheduler's too: measured with boto3 1.44, a HEAD took 3.2 ms of CPU and a page 0.23 ms per object on it. So a listing pays in a
small bucket only, whatever its round trips.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from tandem_kvbm.objects.bucket import Bucket
from tandem_kvbm.objects.config import ObjectConfig
from tandem_kvbm.objects.counters import Count, Counters
from tandem_kvbm.objects.deadline import Deadline, DeadlineError
from tandem_kvbm.objects.names import Names
from tandem_kvbm.store import StoreUnavailableError

_LISTED_PER_HEAD = 14
"""Objects on a page that cost as much as one HEAD."""
_PAGE_OBJECTS = 1000


def list_is_cheaper(keys: int, connections: int, objects: int) -> bool:
    """Whether a page of `objects` costs less than `keys` HEADs, of which `connections` go at a time. One round of HEADs is the fastest."""
    return keys > connections and objects <= _PAGE_OBJECTS and objects <= _LISTED_PER_HEAD * (keys - 1)


class Prober:
    """Has connections of its own, so that a probe never waits for transfers. `close` once."""

    def __init__(self, config: ObjectConfig, names: Names, counters: Counters, clock: Callable[[], float]) -> None:
        self._config, self._names, self._counters = config, names, counters
        self._bucket = Bucket(config, config.probe_deadline_s, counters, clock)
        self._threads = ThreadPoolExecutor(config.connections, thread_name_prefix="kvbm_object_probe")
        self._objects = 0
        """In the bucket, as of the last listing; beyond a page it is never listed again."""

    def find(self, keys: Sequence[bytes]) -> dict[bytes, bool]:
        """What could be found out in time. Raises StoreUnavailableError if that is nothing."""
        deadline = self._bucket.deadline(self._config.probe_deadline_s)
        self._counters.add(Count.PROBES, len(keys))
        if list_is_cheaper(len(keys), self._config.connections, self._objects):
            found = self._list(keys, deadline)
            if found is not None:
                return found
        return self._ask(keys, deadline)

    def close(self) -> None:
        """Doesn't wait: what is under way ends with its deadline."""
        self._bucket.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _list(self, keys: Sequence[bytes], deadline: Deadline) -> dict[bytes, bool] | None:
        """None if the bucket turned out to be too large for this."""
        pages = list(self._bucket.names(self._names.root, 2, deadline))
        there: set[str] = set().union(*pages)
        self._objects = len(there)
        return {key: self._names.name_of(key) in there for key in keys} if len(pages) == 1 else None

    def _ask(self, keys: Sequence[bytes], deadline: Deadline) -> dict[bytes, bool]:
        asked = {self._threads.submit(self._bucket.head, self._names.name_of(key), deadline): key for key in keys}
        found, failure = _gather(asked, deadline)
        if len(found) < len(keys):
            self._counters.add(Count.UNANSWERED, len(keys) - len(found))
            if not found:
                raise StoreUnavailableError("no probe was answered in time") from failure
        return found


def _gather(asked: dict[Future[bool], bytes], deadline: Deadline) -> tuple[dict[bytes, bool], BaseException | None]:
    """The answers that came in time, and one of the failures. One failure ends the wait: the others would fail, too."""
    found: dict[bytes, bool] = {}
    failure: BaseException | None = None
    pending = set(asked)
    while pending and failure is None and (left_s := deadline.left_s()) > 0:
        done, pending = wait(pending, left_s, FIRST_COMPLETED)
        for future in done:
            failure = future.exception() or failure
            if not future.exception():
                found[asked[future]] = future.result()
    for future in pending:
        future.cancel()
    if failure is not None and not isinstance(failure, StoreUnavailableError | DeadlineError):
        raise failure
    return found, failure
