# SPDX-License-Identifier: Apache-2.0
"""The parts of the object store that need no bucket: names, beliefs, breaker, ledger, configuration."""

import hashlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_kvbm.blob import CorruptBlockError
from tandem_kvbm.breaker import Breaker
from tandem_kvbm.objects.config import ObjectConfig
from tandem_kvbm.objects.counters import DESCRIPTIONS, Count
from tandem_kvbm.objects.deadline import Deadline, DeadlineError
from tandem_kvbm.objects.ledger import Ledger
from tandem_kvbm.objects.names import Names
from tandem_kvbm.objects.presence import Presence
from tandem_kvbm.objects.probes import list_is_cheaper
from tandem_protocol.errors import ConfigError


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def block_key(number: int, group: int = 0) -> bytes:
    """A key as vLLM makes them."""
    return hashlib.sha256(str(number).encode()).digest() + group.to_bytes(4, "big")


@given(st.binary(min_size=1, max_size=40), st.integers(0, 2**32 - 1))
def test_a_name_leads_back_to_its_key(block_hash: bytes, group: int) -> None:
    """So that a listing tells which blocks there are."""
    names = Names("tandem-kv", "model_abc")
    key = block_hash + group.to_bytes(4, "big")
    assert names.key_of(names.name_of(key)) == key


@pytest.mark.parametrize("name", ["other/model/ab/abcd_g0", "kv/model/ledgers/0", "kv/model/ab/abc_g0", "kv/model/ab/abcd", "kv/model/"])
def test_other_objects_hold_no_block(name: str) -> None:
    """Ledgers, strangers, and what lies under another prefix."""
    assert Names("kv", "model").key_of(name) is None


def test_names_are_spread_and_told_apart() -> None:
    """Two digits of the hash are a folder; groups and namespaces differ."""
    names = Names("kv", "org/model 1")
    assert names.name_of(bytes.fromhex("abcd") + bytes(4)) == "kv/org_model_1/ab/abcd_g0"
    assert names.name_of(block_key(1, 0)) != names.name_of(block_key(1, 1))
    assert Names("", "m").root == "m/"
    assert names.ledger_of("a/b").startswith(names.root)


def test_beliefs_end() -> None:
    """A present block is believed in for longer than a missing one."""
    clock = Clock()
    presence = Presence(10, present_ttl_s=60.0, absent_ttl_s=2.0, clock=clock)
    presence.put([b"a"], there=True)
    presence.put([b"b"], there=False)
    assert (presence.get(b"a"), presence.get(b"b"), presence.get(b"c")) == (True, False, None)
    clock.now += 2.0
    assert (presence.get(b"a"), presence.get(b"b")) == (True, None)
    clock.now += 58.0
    assert presence.get(b"a") is None
    assert len(presence) == 0


def test_beliefs_are_bounded() -> None:
    """The oldest goes first; what is said anew counts as new."""
    presence = Presence(2, 60.0, 60.0, Clock())
    presence.put([b"a", b"b"], there=True)
    presence.put([b"a"], there=False)
    presence.put([b"c"], there=True)
    assert [presence.get(key) for key in (b"a", b"b", b"c")] == [False, None, True]


def test_breaker_opens_after_failures_in_a_row() -> None:
    """A success in between starts the count anew."""
    breaker = Breaker(3, 1.0, 8.0, Clock())
    for outcome in (breaker.failed, breaker.failed, breaker.succeeded, breaker.failed, breaker.failed):
        assert breaker.admit()
        outcome()
    assert not breaker.is_shut_off()
    assert breaker.admit()
    breaker.failed()
    assert breaker.is_shut_off()
    assert not breaker.admit()
    assert breaker.opened == 1


def opened(clock: Callable[[], float]) -> Breaker:
    """A breaker that has just opened, for 1 s at first and 4 s at most."""
    breaker = Breaker(1, 1.0, 4.0, clock)
    assert breaker.admit()
    breaker.failed()
    return breaker


def test_one_trial_closes_the_breaker() -> None:
    """After the back-off one call passes, the others wait for how it ends."""
    clock = Clock()
    breaker = opened(clock)
    clock.now += 1.0
    assert not breaker.is_shut_off()
    assert breaker.admit()
    assert breaker.is_shut_off()
    assert not breaker.admit()
    breaker.succeeded()
    assert breaker.admit()
    assert breaker.admit()


def test_failed_trials_double_the_back_off() -> None:
    """Up to its bound; a success resets it."""
    clock = Clock()
    breaker = opened(clock)
    for backoff_s in (1.0, 2.0, 4.0, 4.0):
        clock.now += backoff_s - 0.1
        assert breaker.is_shut_off()
        clock.now += 0.2
        assert breaker.admit()
        breaker.failed()
    assert breaker.opened == 1


def test_a_straggler_does_not_prolong_the_back_off() -> None:
    """An operation that began before the breaker opened, and failed after it, is no trial."""
    clock = Clock()
    breaker = Breaker(1, 1.0, 4.0, clock)
    assert breaker.admit()
    assert breaker.admit()
    breaker.failed()
    clock.now += 0.9
    breaker.failed()
    clock.now += 0.2
    assert breaker.admit()


def test_ledger_gives_up_the_oldest_of_the_lowest_priority() -> None:
    """Use makes a block young; priority comes before age; the new block itself stays."""
    ledger = Ledger(3)
    assert [ledger.add(key, priority) for key, priority in ((b"a", 0), (b"b", 0), (b"c", 1))] == [[], [], []]
    ledger.touch([b"a", b"unknown"])
    assert ledger.add(b"d", 0) == [b"b"]
    assert ledger.add(b"e", 0) == [b"a"]
    assert ledger.add(b"f", 2) == [b"d"]
    assert ledger.add(b"g", 0) == [b"e"]
    assert ledger.add(b"h", 0) == [b"g"]
    assert ledger.keys() == [b"h", b"c", b"f"]


def test_ledger_gives_up_many_at_once() -> None:
    """So that a full bucket doesn't cost one more request per write."""
    ledger = Ledger(64)
    for i in range(64):
        assert ledger.add(block_key(i)) == []
    assert ledger.add(block_key(64)) == [block_key(0), block_key(1)]
    assert ledger.add(block_key(65)) == []
    assert len(ledger) == 64


def test_ledger_keeps_blocks_of_more_worth() -> None:
    """What goes along with the surplus, to save requests, is of no more worth than the new block."""
    ledger = Ledger(64)
    for i in range(63):
        ledger.add(block_key(i), priority=2)
    ledger.add(block_key(63), priority=0)
    assert ledger.takes(0)
    assert ledger.add(block_key(64), priority=1) == [block_key(63)]
    assert not ledger.takes(0)
    assert ledger.takes(1)


def test_ledger_comes_back() -> None:
    """Order and priorities too; a broken one is told apart."""
    ledger = Ledger(10)
    for i in range(5):
        ledger.add(block_key(i), priority=i % 2)
    again = Ledger(3)
    again.load(ledger.dump())
    assert again.keys() == ledger.keys()
    assert again.add(block_key(9)) == [block_key(0), block_key(2), block_key(4)]
    for broken in (b"", b"nonsense", ledger.dump()[:-1], b"\x92\x02\x90"):
        with pytest.raises(CorruptBlockError):
            Ledger(3).load(broken)


@given(st.lists(st.tuples(st.sampled_from(["add", "touch", "discard"]), st.integers(0, 12), st.integers(0, 2)), max_size=60))
def test_ledger_equals_a_sorted_list(steps: list[tuple[str, int, int]]) -> None:
    """Against the naive model: a list of (priority, time of use)."""
    ledger, model, now = Ledger(5), dict[bytes, tuple[int, int]](), 0
    for what, number, priority in steps:
        key, now = bytes([number]), now + 1
        if what == "add":
            model.pop(key, None)
            ledger.discard([key])
            expected = sorted(model, key=lambda held: model[held])[: max(0, len(model) - 4)]
            assert ledger.takes(priority) == (len(model) < 5 or min(model.values())[0] <= priority)
            assert ledger.add(key, priority) == expected
            model = {held: use for held, use in model.items() if held not in expected} | {key: (priority, now)}
        elif what == "touch":
            ledger.touch([key])
            model |= {key: (model[key][0], now)} if key in model else {}
        else:
            ledger.discard([key])
            model.pop(key, None)
        ledger.check_integrity()
        assert ledger.keys() == sorted(model, key=lambda held: model[held])


@pytest.mark.parametrize(("keys", "objects", "cheaper"), [(1, 0, False), (8, 0, False), (9, 0, True), (9, 112, True), (9, 113, False),
                                                          (100, 1000, True), (1000, 1001, False)])  # fmt: skip
def test_a_listing_pays_in_small_buckets_only(keys: int, objects: int, cheaper: bool) -> None:
    """And never for one round of HEADs."""
    assert list_is_cheaper(keys, 8, objects) is cheaper


def test_deadline_ends() -> None:
    """To the second."""
    clock = Clock()
    deadline = Deadline(2.0, clock)
    clock.now += 1.5
    deadline.check()
    assert deadline.left_s() == pytest.approx(0.5)
    clock.now += 1.0
    assert deadline.left_s() == 0.0
    with pytest.raises(DeadlineError):
        deadline.check()


@pytest.mark.parametrize(("settings", "says"), [
    ({"bucket": "A"}, "bucket name"),
    ({"bucket": "kv-{worker_id}", "worker_id": "Not_A_Bucket"}, "bucket name"),
    ({"bucket": "kv1", "access_key": "a"}, "both"),
    ({"bucket": "kv1", "endpoint": "minio:9000"}, "http"),
    ({"bucket": "kv1", "prefix": "/kv"}, "prefix"),
    ({"bucket": "kv1", "connections": 0}, "connections"),
    ({"bucket": "kv1", "num_blocks": -1}, "num_blocks"),
    ({"bucket": "kv1", "part_bytes": 1024}, "part_bytes"),
])
def test_wrong_settings_are_refused(settings: dict[str, object], says: str) -> None:
    """With a sentence that names the setting."""
    with pytest.raises(ConfigError, match=says):
        ObjectConfig(**settings)  # type: ignore[arg-type]


def test_a_bucket_per_worker_is_the_workers_own() -> None:
    """Unless somebody says otherwise; secrets stay out of logs."""
    config = ObjectConfig(bucket="kv-{worker_id}", worker_id="w1", access_key="visible", secret_key="hidden")
    assert (config.bucket_name, config.is_exclusive) == ("kv-w1", True)
    assert not ObjectConfig(bucket="kv1").is_exclusive
    assert ObjectConfig(bucket="kv1", exclusive=True).is_exclusive
    assert "hidden" not in repr(config)
    assert "visible" not in repr(config)


def test_every_count_is_described() -> None:
    """Each becomes a metric."""
    assert set(DESCRIPTIONS) == set(Count)
