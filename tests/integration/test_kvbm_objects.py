# SPDX-License-Identifier: Apache-2.0
"""The object store against a real S3 endpoint, through a network that misbehaves: no wrong bytes, bounded time, everything counted."""

import hashlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

import store_contract
from s3s import KEYS, S3, Mood, Proxy, s3_server
from servers import wait_for
from store_contract import EvictingContract
from tandem_kvbm.blob import FOOTER_BYTES, CorruptBlockError
from tandem_kvbm.objects.config import MIB, ObjectConfig
from tandem_kvbm.objects.counters import Count
from tandem_kvbm.objects.store import ObjectStore
from tandem_kvbm.store import MissingBlockError, StoreUnavailableError, Written
from tandem_protocol.errors import ConfigError

pytestmark = pytest.mark.slow

BLOCK_BYTES = 256 * 1024
LAYOUT = b"layout of the tests"
SLACK_S = 3.0
"""For a machine that is busy with other things."""

Make = Callable[..., ObjectStore]
_numbers = itertools.count()


def block_key(number: int) -> bytes:
    """A key as vLLM makes them."""
    return hashlib.sha256(str(number).encode()).digest() + bytes(4)


def content(number: int, size: int = BLOCK_BYTES) -> memoryview:
    """A block that is like no other."""
    return memoryview(random.Random(number).randbytes(size))


def blank(size: int = BLOCK_BYTES) -> memoryview:
    """Where a block is read into."""
    return memoryview(bytearray(size))


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """One endpoint for all tests; each takes a bucket of its own."""
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def bucket(s3: S3) -> str:
    """An empty bucket."""
    return s3.make_bucket(f"bucket-{next(_numbers)}")


@pytest.fixture
def proxy(s3: S3) -> Iterator[Proxy]:
    """A network to the endpoint."""
    running = Proxy(s3.port)
    yield running
    running.close()


@pytest.fixture
def make(proxy: Proxy, bucket: str) -> Iterator[Make]:
    """Opens stores on the test's bucket through the proxy; closed at the end. Each sees with its own eyes: beliefs end at once."""
    with ExitStack() as stack:

        def opened(block_bytes: int = BLOCK_BYTES, **changes: object) -> ObjectStore:
            config = ObjectConfig(bucket=bucket, endpoint=proxy.url, present_ttl_s=0.0, absent_ttl_s=0.0, read_deadline_s=2.0,
                                  write_deadline_s=2.0, **KEYS)
            store = ObjectStore(replace(config, **changes), "model_abc", LAYOUT, block_bytes)
            stack.callback(store.close)
            store.open()
            return store

        yield opened


class TestContract(EvictingContract):
    """What holds for every store, over a real endpoint."""

    @pytest.fixture
    def make(self, s3: S3, bucket: str) -> Callable[[], ObjectStore]:
        """A store of CAPACITY blocks in a bucket of its own."""
        config = ObjectConfig(bucket=bucket, endpoint=s3.url, num_blocks=store_contract.CAPACITY, read_deadline_s=store_contract.WAIT_S,
                              probe_deadline_s=store_contract.WAIT_S, write_deadline_s=store_contract.WAIT_S, **KEYS)
        return lambda: ObjectStore(config, "model_abc", LAYOUT, store_contract.BLOCK_BYTES)


def test_blocks_come_back_to_another_worker(make: Make) -> None:
    """What one worker writes, another finds and reads, byte for byte."""
    one, other = make(worker_id="1"), make(worker_id="2")
    for i in range(5):
        assert one.write(block_key(i), content(i)) == Written(stored=True)
    assert other.probe([block_key(i) for i in range(7)]) == [True] * 5 + [False] * 2
    for i in range(5):
        other.read(block_key(i), into := blank())
        assert into == content(i)


def test_beliefs_spare_requests(make: Make) -> None:
    """Within their time, what was seen is known without asking; a block that is there isn't sent again."""
    store = make(present_ttl_s=60.0, absent_ttl_s=60.0)
    assert store.holds(block_key(1)) is None
    assert store.probe([block_key(1)]) == [False]
    assert store.holds(block_key(1)) is False
    store.write(block_key(1), content(1))
    assert store.holds(block_key(1)) is True
    assert not store.write(block_key(1), content(1)).stored
    assert store.counters[Count.WRITES] == 1


def test_missing_blocks_are_missing(make: Make) -> None:
    """One that was believed in and has gone is counted."""
    one, other = make(present_ttl_s=60.0, worker_id="1"), make(worker_id="2", exclusive=True)
    one.write(block_key(1), content(1))
    assert list(other.clear()) == [block_key(1)]
    assert one.holds(block_key(1)) is True
    with pytest.raises(MissingBlockError):
        one.read(block_key(1), blank())
    assert not one.holds(block_key(1))
    assert one.counters[Count.VANISHED] == 1
    assert one.ready()


def test_a_race_has_one_winner(make: Make, s3: S3, bucket: str) -> None:
    """Two workers write the same block: one object, one owner; the other's quota is not charged."""
    one, other = make(num_blocks=4, worker_id="1"), make(num_blocks=4, worker_id="2")
    assert one.write(block_key(1), content(1)).stored
    assert not other.write(block_key(1), content(1)).stored
    assert other.counters[Count.LOST_RACES] == 1
    assert (one.stats().blocks, other.stats().blocks) == (1, 0)
    assert len(s3.names(bucket)) == 1


def test_quota_is_kept_by_giving_up_the_own_oldest(make: Make, s3: S3, bucket: str) -> None:
    """The bucket never holds more of a worker's blocks than its quota; others' stay."""
    neighbour, store = make(num_blocks=8, worker_id="1"), make(num_blocks=4, worker_id="2")
    neighbour.write(block_key(100), content(100))
    evicted: list[bytes] = []
    for i in range(4):
        evicted += store.write(block_key(i), content(i)).evicted
    store.touch([block_key(0)])
    for i in range(4, 7):
        evicted += store.write(block_key(i), content(i)).evicted
        assert len(s3.names(bucket)) == 5
    assert evicted == [block_key(1), block_key(2), block_key(3)]
    assert store.counters[Count.EVICTED] == 3
    assert store.probe([block_key(i) for i in (0, 1, 4, 5, 6, 100)]) == [True, False, True, True, True, True]
    stats = store.stats()
    assert (stats.blocks, stats.capacity_bytes) == (4, 4 * (BLOCK_BYTES + FOOTER_BYTES))


def test_quota_survives_a_restart(make: Make, s3: S3, bucket: str) -> None:
    """The next run of the same worker knows what the last one wrote, less what has gone meanwhile, and evicts it first."""
    first = make(num_blocks=4, worker_id="w")
    for i in range(4):
        first.write(block_key(i), content(i))
    first.close()
    [gone] = [name for name in s3.names(bucket) if block_key(2)[:-4].hex() in name]
    s3.client().delete_object(Bucket=bucket, Key=gone)
    second = make(num_blocks=4, worker_id="w", present_ttl_s=60.0)
    assert second.stats().blocks == 3
    assert second.holds(block_key(0)) is True
    assert second.holds(block_key(2)) is None
    assert second.write(block_key(10), content(10)).evicted == ()
    assert second.write(block_key(11), content(11)).evicted == (block_key(0),)


def test_clear_removes_what_is_ours(make: Make, s3: S3, bucket: str) -> None:
    """A worker that shares the bucket removes what it wrote; one that owns it removes all of this model and layout, no more."""
    s3.client().put_object(Bucket=bucket, Key="stranger", Body=b"x")
    one, other = make(num_blocks=8, worker_id="1"), make(num_blocks=8, worker_id="2", exclusive=True)
    for i in range(3):
        one.write(block_key(i), content(i))
        other.write(block_key(i + 3), content(i + 3))
    assert list(one.clear()) == [block_key(i) for i in range(3)]
    assert one.stats().blocks == 0
    assert len(s3.names(bucket)) == 4
    one.write(block_key(9), content(9))
    assert set(other.clear()) == {block_key(i) for i in (3, 4, 5, 9)}
    assert s3.names(bucket) == ["stranger"]


def test_large_blocks_travel_in_parts(make: Make, s3: S3, bucket: str) -> None:
    """And come back whole; a lost race leaves no parts behind."""
    size = 17 * MIB
    one, other = (make(size, part_bytes=6 * MIB, worker_id=name, write_deadline_s=30.0, read_deadline_s=30.0) for name in "12")
    assert one.write(block_key(1), content(1, size)).stored
    assert one.counters[Count.PARTS] == 2
    one.read(block_key(1), into := blank(size))
    assert into == content(1, size)
    assert not other.write(block_key(1), content(1, size)).stored
    assert "Uploads" not in s3.client().list_multipart_uploads(Bucket=bucket)


def test_a_failed_upload_leaves_no_parts(make: Make, s3: S3, bucket: str, proxy: Proxy) -> None:
    """The network fails in mid-upload: the upload is aborted, or counted as one that could not be; the block isn't there."""
    size = 24 * MIB
    store = make(size, part_bytes=6 * MIB, write_deadline_s=20.0, attempts=2)
    block = content(1, size)
    outcome: list[object] = []
    writer = threading.Thread(target=lambda: outcome.append(attempt(lambda: store.write(block_key(1), block))), daemon=True)
    writer.start()
    wait_for(lambda: store.counters[Count.PARTS] >= 2, 30, "the upload is under way")
    proxy.mood = Mood.BUSY
    writer.join(30)
    assert isinstance(outcome[0], StoreUnavailableError)
    proxy.mood = Mood.GOOD
    left = len(s3.client().list_multipart_uploads(Bucket=bucket).get("Uploads", ()))
    assert left == store.counters[Count.ABORT_FAILURES] == 1
    assert s3.names(bucket) == []


def attempt(action: Callable[[], object]) -> object:
    """What it returns or raises."""
    try:
        return action()
    except Exception as exc:
        return exc


@pytest.mark.parametrize("mood", [Mood.DOWN, Mood.SILENT, Mood.BUSY, Mood.TRICKLE, Mood.CUT])
def test_a_bad_network_costs_bounded_time(make: Make, proxy: Proxy, mood: Mood) -> None:
    """Reads and probes end within their deadline and one wait for the socket, with the error that says so."""
    store = make()
    store.write(block_key(1), content(1))
    proxy.mood = mood
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError):
        store.read(block_key(1), blank())
    assert time.monotonic() - started < 2.0 + 1.0 + SLACK_S
    assert store.counters[Count.READ_FAILURES] == 1
    if mood not in (Mood.CUT, Mood.TRICKLE):  # the answer to a HEAD is too small for these
        started = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            store.probe([block_key(i) for i in range(8)])
        assert time.monotonic() - started < 1.0 + SLACK_S
        assert store.counters[Count.UNANSWERED] == 8
    proxy.mood = Mood.GOOD
    wait_for(store.ready, 30, "the back-off is over")
    store.read(block_key(1), into := blank())
    assert into == content(1)


@pytest.mark.parametrize("mood", [Mood.DOWN, Mood.SILENT, Mood.BUSY])
def test_writes_end_too(make: Make, proxy: Proxy, s3: S3, bucket: str, mood: Mood) -> None:
    """Within their deadline; what may have arrived all the same is removed by the next write that succeeds."""
    store = make(num_blocks=4)
    proxy.mood = mood
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError):
        store.write(block_key(1), content(1))
    assert time.monotonic() - started < 2.0 + 1.0 + SLACK_S
    assert store.counters[Count.WRITE_FAILURES] == 1
    proxy.mood = Mood.GOOD
    assert store.write(block_key(2), content(2)).stored
    assert [block_key(2)[:-4].hex() in name for name in s3.names(bucket)] == [True]


def test_a_dead_bucket_is_left_alone(make: Make, proxy: Proxy) -> None:
    """After failures in a row nothing is even tried until the back-off ends; then one success puts all right."""
    store = make(breaker_failures=2, attempts=1, backoff_s=1.5)
    store.write(block_key(1), content(1))
    proxy.mood = Mood.DOWN
    for _ in range(2):
        assert store.ready()
        assert isinstance(attempt(lambda: store.read(block_key(1), blank())), StoreUnavailableError)
    assert not store.ready()
    seen, started = proxy.requests, time.monotonic()
    for i in range(50):
        assert isinstance(attempt(lambda i=i: store.read(block_key(i), blank())), StoreUnavailableError)
        assert isinstance(attempt(lambda i=i: store.write(block_key(i), content(1))), StoreUnavailableError)
    assert time.monotonic() - started < 1.0
    assert proxy.requests == seen
    assert store.counters[Count.REFUSED] == 100
    proxy.mood = Mood.GOOD
    wait_for(store.ready, 30, "the back-off is over")
    assert store.probe([block_key(1)]) == [True]
    assert store.counts()[Count.BREAKER_OPENED] == 1


def test_flipped_bytes_are_found(make: Make, proxy: Proxy, s3: S3, bucket: str) -> None:
    """Whatever changed them, the block is refused and removed."""
    store = make()
    store.write(block_key(1), content(1))
    proxy.mood = Mood.FLIP
    with pytest.raises(CorruptBlockError):
        store.read(block_key(1), blank())
    proxy.mood = Mood.GOOD
    assert store.counters[Count.CORRUPT] == 1
    store.write(block_key(2), content(2))
    assert store.probe([block_key(1), block_key(2)]) == [False, True]
    assert len(s3.names(bucket)) == 1


@pytest.mark.parametrize("damage", ["truncated", "too long", "empty", "another block's", "another layout's"])
def test_wrong_objects_are_found(make: Make, s3: S3, bucket: str, damage: str) -> None:
    """An object under the block's name that isn't the block never gets through."""
    store = make()
    store.write(block_key(1), content(1))
    [name] = s3.names(bucket)
    whole = s3.client().get_object(Bucket=bucket, Key=name)["Body"].read()
    wrong = {"truncated": whole[:-1], "too long": whole + b"x", "empty": b""}
    if damage in wrong:
        s3.client().put_object(Bucket=bucket, Key=name, Body=wrong[damage])
    else:
        number, layout = (2, LAYOUT) if damage == "another block's" else (1, b"another layout")
        stranger = ObjectStore(ObjectConfig(bucket=bucket, endpoint=s3.url, prefix="other", **KEYS), "model_abc", layout, BLOCK_BYTES)
        stranger.write(block_key(number), content(number))
        stranger.close()
        [other] = s3.names(bucket, "other/")
        s3.client().copy_object(Bucket=bucket, Key=name, CopySource={"Bucket": bucket, "Key": other})
    with pytest.raises(CorruptBlockError):
        store.read(block_key(1), blank())
    assert store.counters[Count.CORRUPT] == 1
    store.write(block_key(3), content(3))  # removes the wrong one on the way
    with pytest.raises(MissingBlockError):
        store.read(block_key(1), blank())


def test_a_start_without_the_bucket(make: Make, proxy: Proxy, s3: S3, bucket: str) -> None:
    """An endpoint that is away doesn't keep a worker from starting; a bucket that isn't there does, with the fix."""
    with pytest.raises(ConfigError, match="create it"):
        make(bucket="nowhere-at-all")
    proxy.mood = Mood.DOWN
    store = make(attempts=1)
    proxy.mood = Mood.GOOD
    wait_for(store.ready, 30, "the back-off is over")
    assert store.write(block_key(1), content(1)).stored


def test_many_threads_agree(make: Make, s3: S3, bucket: str) -> None:
    """Concurrent writers and readers of few keys under a small quota: right bytes or a miss, and the quota holds afterwards."""
    store = make(num_blocks=6, connections=4)
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(30):
            number = rng.randrange(10)
            if rng.random() < 0.5:
                store.write(block_key(number), content(number))
            elif not isinstance(attempt(lambda number=number: read(number)), MissingBlockError | type(None)):
                wrong.append(f"block {number}")

    def read(number: int) -> None:
        store.read(block_key(number), into := blank())
        assert into == content(number)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert len(s3.names(bucket)) == store.stats().blocks == 6
