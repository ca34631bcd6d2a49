# SPDX-License-Identifier: Apache-2.0
"""The contract of `tandem_kvbm.store.BlockStore`, as a suite that every store's tests inherit; they give the fixture `make`."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from tandem_kvbm.store import BlockStore, MissingBlockError

BLOCK_BYTES = 8192
CAPACITY = 8
WAIT_S = 30.0
"""Bound of every wait; only a failing test reaches it."""

Make = Callable[[], BlockStore]


def key_of(number: int) -> bytes:
    """A key as vLLM makes them: 32 bytes of hash, 4 of group."""
    return hashlib.sha256(str(number).encode()).digest() + (0).to_bytes(4, "big")


def block_of(number: int) -> bytes:
    """The one right content of a block."""
    return (hashlib.sha256(b"block %d" % number).digest() * (BLOCK_BYTES // 32))[:BLOCK_BYTES]


def put(store: BlockStore, number: int, priority: int = 0) -> tuple[bytes, ...]:
    """Writes a block that must be taken; what was given up for it."""
    written = store.write(key_of(number), memoryview(block_of(number)), priority)
    assert written.stored
    return written.evicted


def get(store: BlockStore, number: int) -> bytes:
    """Reads a block."""
    into = memoryview(bytearray(BLOCK_BYTES))
    store.read(key_of(number), into)
    return bytes(into)


class StoreContract:
    """What holds for every store of CAPACITY blocks of BLOCK_BYTES that nobody else uses."""

    @pytest.fixture
    def store(self, make: Make) -> Iterator[BlockStore]:
        """Open, and closed at the end."""
        store = make()
        store.open()
        yield store
        store.close()

    def test_a_block_comes_back_as_it_went(self, store: BlockStore) -> None:
        put(store, 1)
        assert get(store, 1) == block_of(1)

    def test_an_unknown_block_is_missing(self, store: BlockStore) -> None:
        assert not store.holds(key_of(1))
        assert store.probe([key_of(1)]) == [False]
        with pytest.raises(MissingBlockError):
            get(store, 1)

    def test_holds_and_probe_agree_after_a_write(self, store: BlockStore) -> None:
        put(store, 1)
        assert store.holds(key_of(1)) in (True, None)
        assert store.probe([key_of(1), key_of(2)]) == [True, False]

    def test_groups_of_one_hash_are_different_blocks(self, store: BlockStore) -> None:
        other = key_of(1)[:-4] + (1).to_bytes(4, "big")
        put(store, 1)
        store.write(other, memoryview(block_of(2)))
        assert get(store, 1) == block_of(1)

    def test_a_second_write_stores_nothing_and_loses_nothing(self, store: BlockStore) -> None:
        put(store, 1)
        assert not store.write(key_of(1), memoryview(block_of(1))).stored
        assert get(store, 1) == block_of(1)

    def test_a_full_store_gives_up_the_longest_unused(self, store: BlockStore) -> None:
        for number in range(CAPACITY):
            assert put(store, number) == ()
        store.touch([key_of(0)])
        assert put(store, 100) == (key_of(1),)
        assert get(store, 0) == block_of(0)
        with pytest.raises(MissingBlockError):
            get(store, 1)

    def test_touching_the_unknown_does_nothing(self, store: BlockStore) -> None:
        store.touch([key_of(5)])
        assert not store.holds(key_of(5))

    def test_stats_follow_what_is_there(self, store: BlockStore) -> None:
        put(store, 1)
        put(store, 2)
        stats = store.stats()
        assert stats.blocks == 2
        assert stats.size_bytes >= 2 * BLOCK_BYTES
        assert stats.capacity_bytes is None or stats.size_bytes <= stats.capacity_bytes

    def test_clear_gives_up_everything(self, store: BlockStore) -> None:
        put(store, 1)
        put(store, 2)
        assert set(store.clear()) == {key_of(1), key_of(2)}
        assert store.stats().blocks == 0
        assert put(store, 1) == ()

    def test_a_store_is_ready_until_it_fails(self, store: BlockStore) -> None:
        assert store.ready()

    def test_closing_twice_is_closing_once(self, make: Make) -> None:
        store = make()
        store.open()
        store.close()
        store.close()

    def test_many_threads_never_read_a_wrong_block(self, store: BlockStore) -> None:
        failures: list[str] = []

        def work(seed: int) -> None:
            for step in range(60):
                number = (seed * 7 + step * 5) % (2 * CAPACITY)
                store.write(key_of(number), memoryview(block_of(number)))
                try:
                    if get(store, number) != block_of(number):
                        failures.append(f"wrong block {number}")
                except MissingBlockError:
                    continue

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert not any(thread.is_alive() for thread in threads)
        assert failures == []


class EvictingContract(StoreContract):
    """A store that gives blocks up by priority, too, and keeps count of them exactly."""

    def test_blocks_of_less_worth_go_first(self, store: BlockStore) -> None:
        put(store, 0, priority=5)
        for number in range(1, CAPACITY):
            put(store, number)
        assert put(store, 100) == (key_of(1),)
        assert get(store, 0) == block_of(0)

    def test_nothing_of_more_worth_is_given_up(self, store: BlockStore) -> None:
        for number in range(CAPACITY):
            put(store, number, priority=5)
        assert not store.write(key_of(100), memoryview(block_of(100)), 1).stored
        assert store.stats().blocks == CAPACITY

    def test_a_store_behaves_like_a_naive_model(self, store: BlockStore) -> None:
        """Random steps, against an ordered list; seeded, so that a failure comes back."""
        source, model = os.environ.get("STORE_SEED", "1"), list[int]()
        for step in range(400):
            draw = int.from_bytes(hashlib.sha256(f"{source} {step}".encode()).digest()[:8], "big")
            number, action = draw % 14, (draw >> 8) % 10
            if action < 5:
                written = store.write(key_of(number), memoryview(block_of(number)))
                assert written.stored == (number not in model)
                if number not in model:
                    expected = [model.pop(0)] if len(model) == CAPACITY else []
                    assert written.evicted == tuple(key_of(victim) for victim in expected)
                    model.append(number)
            elif action < 7:
                store.touch([key_of(number)])
                if number in model:
                    model.append(model.pop(model.index(number)))
            else:
                assert store.probe([key_of(number)]) == [number in model]
                if number in model:
                    assert get(store, number) == block_of(number)
            assert store.stats().blocks == len(model)
