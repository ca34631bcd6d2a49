# SPDX-License-Identifier: Apache-2.0
"""Stores that outlive their process, driven at random against a naive model: restarts, kills, damage, another worker, a bucket away."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("boto3")

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule

from s3_memory import MemoryS3
from store_contract import BLOCK_BYTES, block_of, get, key_of
from tandem_kvbm.blob import CorruptBlockError
from tandem_kvbm.disk.files import PAGE
from tandem_kvbm.disk.options import DiskOptions
from tandem_kvbm.disk.store import DiskStore
from tandem_kvbm.layout import Layout
from tandem_kvbm.objects import bucket
from tandem_kvbm.objects.config import ObjectConfig
from tandem_kvbm.objects.store import ObjectStore
from tandem_kvbm.store import BlockStore, MissingBlockError, StoreUnavailableError

CAPACITY = 5
BLOCKS = 12
LAYOUT = Layout(model="m", weights="w", dtype="float32", block_bytes=BLOCK_BYTES, tokens_per_hash=32, blocks_per_chunk=1,
                groups=((32, ("layer",)),), parallel=(1, 1, 1, 1, 1), kv_cache_layout="NHD", canonical=False, replicated=False,
                engine="vllm 0", namespace="")
numbers = st.integers(0, BLOCKS - 1)
priorities = st.sampled_from([-1, 0, 0, 0, 7])
NUMBER_OF = {key_of(number): number for number in range(BLOCKS)}


class Naive:
    """Blocks in the order of their use, with their worth."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}

    def victim(self, priority: int) -> int | None:
        """The longest unused of the least worth, if that is no more than `priority`."""
        lowest = min(self.held.values())
        return next(number for number, worth in self.held.items() if worth == lowest) if lowest <= priority else None

    def write(self, number: int, priority: int, capacity: int) -> tuple[bool, list[int]]:
        """Whether it is stored, and what goes for it."""
        if number in self.held:
            return False, []
        gone: list[int] = []
        if len(self.held) >= capacity:
            victim = self.victim(priority)
            if victim is None:
                return False, []
            gone.append(victim)
            del self.held[victim]
        self.held[number] = priority
        return True, gone

    def touch(self, number: int) -> None:
        """To the end."""
        if number in self.held:
            self.held[number] = self.held.pop(number)

    def adopt(self, keys: Sequence[bytes], worth: dict[int, int]) -> None:
        """What a new process found, in its order."""
        self.held = {NUMBER_OF[key]: worth.get(NUMBER_OF[key], 0) for key in keys}


def write(store: BlockStore, number: int, priority: int) -> tuple[bool, list[int]]:
    """Whether it was stored, and what went for it."""
    written = store.write(key_of(number), memoryview(block_of(number)), priority)
    return written.stored, [NUMBER_OF[key] for key in written.evicted]


class DiskMachine(RuleBasedStateMachine):
    """One engine's folder."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kvbm-machine-"))
        self.naive, self.damaged = Naive(), set[int]()

    @initialize(policy=st.just("lru"), direct_io=st.booleans())
    def start(self, policy: str, direct_io: bool) -> None:
        self.options = DiskOptions(str(self.folder), CAPACITY * (BLOCK_BYTES + PAGE), policy=policy, direct_io=direct_io)
        self.store = DiskStore(self.options, LAYOUT)
        assert list(self.store.open()) == []

    @rule(number=numbers, priority=priorities)
    def write(self, number: int, priority: int) -> None:
        assert write(self.store, number, priority) == self.naive.write(number, priority, CAPACITY)
        self.damaged &= self.naive.held.keys()

    @rule(number=numbers)
    def touch(self, number: int) -> None:
        self.store.touch([key_of(number)])
        self.naive.touch(number)

    @rule(number=numbers)
    def read(self, number: int) -> None:
        """A damaged block is refused once, and gone."""
        if number in self.damaged:
            with pytest.raises((CorruptBlockError, MissingBlockError)):
                get(self.store, number)
            self.damaged.discard(number)
            del self.naive.held[number]
        elif number in self.naive.held:
            assert get(self.store, number) == block_of(number)
        else:
            with pytest.raises(MissingBlockError):
                get(self.store, number)

    @rule(number=numbers, way=st.sampled_from(["flip", "cut", "remove", "swap"]))
    def damage(self, number: int, way: str) -> None:
        path = self.store._files.path(key_of(number))
        if not path.exists():
            return
        if way == "remove":
            path.unlink()
        elif way == "cut":
            path.write_bytes(path.read_bytes()[:5000])
        elif way == "swap":
            path.write_bytes(bytes(path.stat().st_size))
        else:
            content = bytearray(path.read_bytes())
            content[100] ^= 1
            path.write_bytes(content)
        self.damaged.add(number)

    @rule(killed=st.booleans(), capacity=st.sampled_from([CAPACITY, CAPACITY, 2]))
    def restart(self, killed: bool, capacity: int) -> None:
        """A process that was killed left its folder as it was, and something half written. A smaller quota keeps the newest."""
        (self.store._seat.leave if killed else self.store.close)()
        (self.store._seat.folder / "tmp" / "half").write_bytes(b"half")
        for number in self.damaged:  # those of the wrong size are seen at the start, the others when they are read
            path = self.store._files.path(key_of(number))
            if not path.exists() or path.stat().st_size != BLOCK_BYTES + PAGE:
                self.naive.held.pop(number, None)
        self.damaged &= self.naive.held.keys()
        file_bytes = BLOCK_BYTES + PAGE
        small = DiskStore(DiskOptions(str(self.folder), capacity * file_bytes, direct_io=self.options.direct_io), LAYOUT)
        found = small.open()
        assert {NUMBER_OF[key] for key in found} <= self.naive.held.keys()
        assert len(found) == min(capacity, len(self.naive.held))
        assert not list((self.store._seat.folder / "tmp").iterdir())
        small.close()
        self.store = DiskStore(self.options, LAYOUT)
        assert set(self.store.open()) == set(found)
        self.naive.adopt(found, {})
        self.damaged &= self.naive.held.keys()

    @rule()
    def clear(self) -> None:
        assert {NUMBER_OF[key] for key in self.store.clear()} == self.naive.held.keys()
        self.naive.held.clear()
        self.damaged.clear()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check_integrity()
        assert [number for number in range(BLOCKS) if self.store.holds(key_of(number))] == sorted(self.naive.held)
        assert self.store.stats().blocks == len(self.naive.held)
        assert len(list(self.folder.rglob("*.kv"))) <= CAPACITY

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        shutil.rmtree(self.folder)


class ObjectMachine(RuleBasedStateMachine):
    """A worker with a quota, and another one without, in one bucket that is away now and then."""

    others = Bundle("others")

    def __init__(self) -> None:
        super().__init__()
        self.s3, self.naive, self.foreign, self.saved = MemoryS3(), Naive(), set[int](), dict[int, int]()
        self.arrived = set[int]()
        """Those that the worker wrote without hearing that they arrived; its next write removes them."""
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(bucket, "_client", lambda config, timeout_s: self.s3)
        self.own, self.other = self.open(CAPACITY, "own"), self.open(0, "other")

    def open(self, blocks: int, worker: str) -> ObjectStore:
        """Without beliefs, so that every question is asked, and with one attempt, so that none is waited for."""
        config = ObjectConfig(bucket="bucket", num_blocks=blocks, worker_id=worker, attempts=1, present_ttl_s=0, absent_ttl_s=0,
                              breaker_failures=1 << 30, access_key="a", secret_key="b")
        store = ObjectStore(config, "model", b"layout", BLOCK_BYTES)
        self.found = store.open()
        return store

    @property
    def there(self) -> set[int]:
        """All blocks in the bucket."""
        return self.foreign | self.arrived | self.naive.held.keys()

    @rule(number=numbers, priority=priorities)
    def write(self, number: int, priority: int) -> None:
        """What the other one wrote is not written again, and counts for nobody's quota but its writer's."""
        if self.s3.away:
            with pytest.raises(StoreUnavailableError):
                self.own.write(key_of(number), memoryview(block_of(number)), 7)
            return
        if self.s3.deaf and number not in self.there and (len(self.naive.held) < CAPACITY or self.naive.victim(priority) is not None):
            with pytest.raises(StoreUnavailableError):
                self.own.write(key_of(number), memoryview(block_of(number)), priority)
            self.arrived.add(number)
            return
        if number in self.there:
            assert write(self.own, number, priority) == (False, [])
            return
        stored, gone = self.naive.write(number, priority, CAPACITY)
        assert write(self.own, number, priority) == (stored, gone)
        if stored:
            self.arrived.clear()

    @precondition(lambda self: not (self.s3.away or self.s3.deaf))
    @rule(number=numbers, target=others)
    def write_of_the_other(self, number: int) -> object:
        stored, gone = write(self.other, number, 0)
        assert (stored, gone) == (number not in self.there, [])
        if not stored:
            return multiple()
        self.foreign.add(number)
        return number

    @precondition(lambda self: not self.s3.away)
    @rule(number=others)
    def the_others_block_vanishes(self, number: int) -> None:
        """Its writer has given it up."""
        if number in self.foreign:
            self.foreign.discard(number)
            del self.s3.objects[self.own._names.name_of(key_of(number))]

    @rule(number=numbers)
    def touch(self, number: int) -> None:
        self.own.touch([key_of(number)])
        self.naive.touch(number)

    @rule(number=numbers)
    def read(self, number: int) -> None:
        expected = StoreUnavailableError if self.s3.away else MissingBlockError
        if self.s3.away or number not in self.there:
            with pytest.raises(expected):
                get(self.own, number)
        else:
            assert get(self.own, number) == block_of(number)

    @rule(number=numbers)
    def damage(self, number: int) -> None:
        """Who reads a damaged block removes it, whoever wrote it, with the next write."""
        name = self.own._names.name_of(key_of(number))
        if self.s3.away or number not in self.there:
            return
        self.s3.objects[name] = bytes(len(self.s3.objects[name]))
        with pytest.raises(CorruptBlockError):
            get(self.own, number)
        self.own._quota.settle()
        self.arrived.clear()
        self.foreign.discard(number)
        self.naive.held.pop(number, None)

    @rule(away=st.booleans(), deaf=st.booleans())
    def network(self, away: bool, deaf: bool) -> None:
        self.s3.away, self.s3.deaf = away, deaf

    @precondition(lambda self: not (self.s3.away or self.s3.deaf))
    @rule(killed=st.booleans())
    def restart(self, killed: bool) -> None:
        """In order: the account of what it wrote comes back. Killed: that of the last time, as far as it is still true."""
        if not killed:
            self.own.close()
            self.saved = dict(self.naive.held)
        before = self.there
        worth = {number: self.saved[number] for number in self.saved if number in before}
        self.own = self.open(CAPACITY, "own")
        assert {NUMBER_OF[key] for key in self.found} == worth.keys()
        self.naive.adopt(self.found, worth)
        self.foreign = before - self.naive.held.keys()
        self.arrived.clear()  # nobody knows of them any more

    @invariant()
    def agrees(self) -> None:
        in_bucket = {key for name in self.s3.objects if (key := self.own._names.key_of(name)) is not None}
        assert in_bucket == {key_of(number) for number in self.there}
        assert self.own.stats().blocks == len(self.naive.held) <= CAPACITY
        if not self.s3.away:
            keys = [key_of(number) for number in range(BLOCKS)]
            assert self.own.probe(keys) == [number in self.there for number in range(BLOCKS)]

    def teardown(self) -> None:
        self.own.close()
        self.other.close()
        self.patch.undo()


TestDiskMachine = DiskMachine.TestCase
TestDiskMachine.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
TestObjectMachine = ObjectMachine.TestCase
TestObjectMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
