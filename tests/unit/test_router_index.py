# SPDX-License-Identifier: Apache-2.0
"""The KV index by example; its random histories are in test_router_index_properties.py."""

import threading

import numpy as np
import pytest

from tandem_protocol.blocks import hash_blocks, salt_of
from tandem_protocol.errors import ConfigError, TandemError
from tandem_protocol.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Tier
from tandem_router.index import KvIndex, warm_up
from tandem_router.index_counts import ApplyResult
from tandem_router.places import USED

SIZE = 4
TOKENS = np.random.default_rng(3).integers(0, 150_000, 100 * SIZE).astype(np.uint32)
KEYS = hash_blocks(TOKENS, SIZE)


def hashes(begin: int, end: int) -> np.ndarray:
    return np.arange(begin + 1, end + 1, dtype=np.uint64)


def stored(begin: int, end: int, **changes: object) -> BlockStored:
    fields = {"hashes": hashes(begin, end), "parent": begin or None, "tokens": TOKENS[begin * SIZE : end * SIZE], "block_size": SIZE}
    return BlockStored(**(fields | changes))  # type: ignore[arg-type]


def bare(begin: int, end: int, **changes: object) -> BlockStored:
    return stored(begin, end, tokens=np.empty(0, np.uint32), parent=None, block_size=0, **changes)


@pytest.fixture
def index() -> KvIndex:
    index = KvIndex(max_blocks=1 << 18)
    assert [index.add_worker("a", 0, SIZE), index.add_worker("b", 0, SIZE)] == [0, 1]
    return index


def prefix(index: KvIndex, slot: int = 0, keys: np.ndarray = KEYS) -> list[int]:
    index.check_integrity()
    return index.match(keys).blocks[:, slot].tolist()


def test_prefixes_by_worker(index: KvIndex) -> None:
    """Each worker's own leading blocks; a prompt that nobody has, and an empty one, match nothing."""
    assert index.apply(0, stored(0, 10)) == ApplyResult(stored=10)
    index.apply(1, stored(0, 3))
    assert index.match(KEYS).total.tolist() == [10, 3]
    assert index.match(KEYS[:5]).total.tolist() == [5, 3]
    assert index.match(KEYS[1:]).total.tolist() == [10 - 1, 3 - 1]
    assert index.match(hash_blocks(TOKENS[::-1], SIZE)).total.tolist() == [0, 0]
    assert index.match(KEYS[:0]).total.tolist() == [0, 0]


def test_a_block_counts_in_its_best_tier(index: KvIndex) -> None:
    """GPU before CPU before storage; a tier may come back later in the prefix."""
    index.apply(0, stored(0, 8))
    index.apply(0, bare(0, 8, tier=Tier.CPU))
    index.apply(0, bare(2, 4, tier=Tier.STORAGE))
    index.apply(0, BlockRemoved(hashes=hashes(2, 6)))
    index.apply(0, BlockRemoved(hashes=hashes(2, 4), tier=Tier.CPU))
    assert prefix(index) == [4, 2, 2]


def test_clearing_leaves_other_tiers(index: KvIndex) -> None:
    """AllBlocksCleared is about the GPU."""
    index.apply(0, stored(0, 8))
    index.apply(0, bare(0, 3, tier=Tier.CPU))
    assert index.apply(0, AllBlocksCleared()).removed == 5
    assert prefix(index) == [0, 3, 0]
    assert index.clear(0, Tier.CPU) == 3
    assert index.size(0) == index.stats().blocks == 0


def test_repeated_stores_and_removals_change_nothing(index: KvIndex) -> None:
    """Replays deliver events twice."""
    index.apply(0, stored(0, 4))
    assert index.apply(0, stored(0, 4)) == ApplyResult()
    assert index.apply(0, BlockRemoved(hashes=hashes(3, 4))) == ApplyResult(removed=1)
    assert index.apply(0, BlockRemoved(hashes=hashes(3, 4))) == ApplyResult(unknown_removed=1)
    assert prefix(index) == [3, 0, 0]


def test_children_may_come_before_their_parent(index: KvIndex) -> None:
    """They wait, and take part as soon as the chain closes, but for what was removed meanwhile."""
    assert index.apply(0, stored(6, 9)) == ApplyResult(orphans=3)
    assert index.apply(0, stored(3, 6)) == ApplyResult(orphans=3)
    assert index.apply(0, BlockRemoved(hashes=hashes(8, 9))) == ApplyResult()
    assert prefix(index) == [0, 0, 0]
    assert index.apply(0, stored(0, 3)) == ApplyResult(stored=9, removed=1)
    assert prefix(index) == [8, 0, 0]
    assert index.stats().orphans == 0


def test_orphans_are_bounded_and_their_loss_is_counted() -> None:
    """The oldest goes first."""
    index = KvIndex(max_orphans=5)
    index.add_worker("a", 0, SIZE)
    index.apply(0, stored(6, 9))
    assert index.apply(0, stored(3, 6)) == ApplyResult(orphans=3, dropped=3)
    assert index.apply(0, stored(0, 3)).stored == 6
    assert index.stats().applied.dropped == 3


def test_events_that_do_not_fit_are_refused(index: KvIndex) -> None:
    """Another block size, tokens that don't fit the hashes, and more groups than masks have bits."""
    assert index.apply(0, stored(0, 2, block_size=2 * SIZE)).refused == 2
    assert index.apply(0, stored(0, 2, tokens=TOKENS[: SIZE + 1])).refused == 2
    assert index.apply(0, stored(0, 2, group=16)).refused == 2
    assert index.apply(0, stored(0, 2, extra=np.ones(1, np.uint64))).refused == 2
    assert prefix(index) == [0, 0, 0]


def test_hashes_alone_need_to_be_known(index: KvIndex) -> None:
    """Offload tiers announce hashes; the tokens came with the GPU's event, or not."""
    index.apply(0, stored(0, 2))
    assert index.apply(0, bare(1, 4, tier=Tier.CPU)) == ApplyResult(stored=1, unresolved=2)


def test_memory_is_bounded() -> None:
    """A full index refuses new blocks and goes on serving those it has; room that comes free is used."""
    index = KvIndex(max_blocks=6)
    index.add_worker("a", 0, SIZE)
    assert index.apply(0, stored(0, 10)) == ApplyResult(stored=6, refused=4)
    assert index.apply(0, stored(0, 6)) == ApplyResult()
    assert prefix(index) == [6, 0, 0]
    index.apply(0, BlockRemoved(hashes=hashes(4, 6)))
    assert index.apply(0, stored(4, 10)) == ApplyResult(stored=2, refused=4)


def test_hybrid_models_need_every_full_attention_group(index: KvIndex) -> None:
    """A block that one of two such groups dropped is no hit; windowed groups beside them don't matter."""
    kinds = {"spec_kind": "full_attention"}
    index.apply(0, stored(0, 5, group=0, **kinds))
    assert prefix(index) == [5, 0, 0]
    index.apply(0, stored(0, 3, group=1, **kinds))
    assert prefix(index) == [3, 0, 0]
    assert index.apply(0, stored(0, 1, group=2, spec_kind="sliding_window")).ignored == 1
    index.apply(0, BlockRemoved(hashes=hashes(2, 3), group=0))
    assert prefix(index) == [2, 0, 0]


def test_a_model_with_windows_only_is_indexed(index: KvIndex) -> None:
    """Where there is no full attention, the windowed groups are all there is."""
    index.apply(0, stored(0, 5, spec_kind="sliding_window"))
    assert prefix(index) == [5, 0, 0]


def test_adapters_and_images_do_not_mix(index: KvIndex) -> None:
    """Equal tokens under another adapter, or with other extra keys, are other blocks."""
    index.apply(0, stored(0, 3, lora_name="ada"))
    index.apply(1, stored(0, 3, extra=np.array([0, 9, 0], np.uint64)))
    assert index.match(KEYS).total.tolist() == [0, 1]
    assert index.match(hash_blocks(TOKENS, SIZE, salt_of("ada"))).total.tolist() == [3, 0]


def test_an_adapters_name_given_to_other_weights(index: KvIndex) -> None:
    """vLLM then has another hash for equal tokens: the last one counts, and its removal ends it."""
    index.apply(0, stored(0, 2))
    index.apply(0, stored(0, 2, hashes=np.array([71, 72], np.uint64)))
    assert (prefix(index), index.size(0)) == ([2, 0, 0], 2)
    index.apply(0, BlockRemoved(hashes=np.array([71, 72], np.uint64)))
    assert prefix(index) == [0, 0, 0]


def test_workers_come_and_go(index: KvIndex) -> None:
    """All dp ranks of a worker leave; a slot is used again and begins empty."""
    assert index.add_worker("a", 1) == 2
    assert index.add_worker("a", 1) == 2
    for slot in (0, 1, 2):
        index.apply(slot, stored(0, 5))
    index.remove_worker("a")
    index.remove_worker("nobody")
    assert [(info.slot, info.name, info.dp_rank, info.blocks) for info in index.slots()] == [(1, "b", 0, 5)]
    with pytest.raises(ConfigError, match="slot 0"):
        index.apply(0, AllBlocksCleared())
    assert index.add_worker("c", 0) == 0
    assert index.match(KEYS).total.tolist() == [0, 5, 0]
    index.check_integrity()


def test_room_is_made_when_a_worker_says_how_much_it_holds(index: KvIndex) -> None:
    """No table grows until then, whatever was there stays, and the bound of the index counts, not what a worker claims."""
    index.apply(0, stored(0, 5))
    assert [index.add_worker("a", 0, SIZE, 5000), index.add_worker("b", 0, SIZE, 1 << 50)] == [0, 1]
    assert prefix(index) == [5, 0, 0]
    places = [index._table.places, index._members[0].table.places]
    numbers = np.arange(1, 5001)
    index.apply(0, stored(0, 5000, hashes=numbers.astype(np.uint64), tokens=np.repeat(numbers, SIZE).astype(np.uint32)))
    assert all(now is before for now, before in zip([index._table.places, index._members[0].table.places], places, strict=True))
    index.clear(0)
    index.check_integrity()
    assert index.size(0) == 0


def test_three_hundred_slots() -> None:
    """Masks grow with the workers and keep what they have."""
    index = KvIndex()
    for number in range(300):
        index.apply(index.add_worker(f"w{number}", 0), stored(0, number % 90, parent=None) if number % 90 else AllBlocksCleared())
    assert index.match(KEYS).total.tolist() == [number % 90 for number in range(300)]
    index.apply(299, bare(0, 10, tier=Tier.STORAGE))
    index.check_integrity()


def test_a_snapshot_restores_everything(index: KvIndex) -> None:
    """Overlaps, parents, tiers, groups and free slots; orphans are left out."""
    index.add_worker("c", 3)
    index.apply(0, stored(0, 7))
    index.apply(0, bare(0, 3, tier=Tier.CPU))
    index.apply(2, stored(0, 4, group=1))
    index.remove_worker("b")
    again = KvIndex()
    again.load(index.dump())
    assert again.slots() == index.slots()
    assert np.array_equal(again.match(KEYS).blocks, index.match(KEYS).blocks)
    assert again.apply(0, stored(7, 9)) == ApplyResult(stored=2)
    assert again.add_worker("d", 0) == 1
    again.check_integrity()


def test_snapshots_that_cannot_be_loaded(index: KvIndex) -> None:
    """Not a snapshot, too big, or into an index in use: a sentence each."""
    index.apply(0, stored(0, 7))
    raw = index.dump()
    with pytest.raises(ConfigError, match="before the first add_worker"):
        index.load(raw)
    for wrong in (b"", b"nonsense", raw[: len(raw) // 2]):
        with pytest.raises(ConfigError, match="not a snapshot"):
            KvIndex().load(wrong)
    with pytest.raises(ConfigError, match="max_blocks 3"):
        KvIndex(max_blocks=3).load(raw)


def test_integrity_notices_damage(index: KvIndex) -> None:
    """A bit too many, a bit too few, a wrong count."""
    index.apply(0, stored(0, 5))
    rows = index._table.rows
    for column, value in ((1, 3), (1, 0), (1, 2), (0, 12345)):
        kept = rows[2, column]
        rows[2, column] = value
        with pytest.raises(TandemError):
            index.check_integrity()
        rows[2, column] = kept
    index.check_integrity()
    for table in (index._table, index._members[0].table):
        table.state[USED] += 1
        with pytest.raises(TandemError):
            index.check_integrity()
        table.state[USED] -= 1
    index.check_integrity()


def test_matching_while_events_come_in() -> None:
    """A match sees whole blocks of a growing table: never more than was stored, never less than before."""
    warm_up()
    index = KvIndex()
    slot = index.add_worker("a", 0, 1)
    tokens = np.arange(200_000, dtype=np.uint32)
    keys, seen, done = hash_blocks(tokens, 1)[:500], [0], threading.Event()

    def match() -> None:
        while not done.is_set():
            seen.append(int(index.match(keys).total[slot]))

    reader = threading.Thread(target=match)
    reader.start()
    for begin in range(0, len(tokens), 100):
        piece = np.arange(begin + 1, begin + 101, dtype=np.uint64)
        index.apply(slot, BlockStored(hashes=piece, parent=begin or None, tokens=tokens[begin : begin + 100], block_size=1))
    done.set()
    reader.join(timeout=10)
    assert not reader.is_alive()
    assert seen == sorted(seen)
    assert prefix(index, slot, keys) == [500, 0, 0]


def test_an_event_of_many_pieces_is_one_event() -> None:
    """Beyond the bound its blocks are refused, those that are there stay, and without its parent it waits as a whole."""
    numbers = np.arange(1, 3001)
    tokens = np.repeat(numbers, SIZE).astype(np.uint32)
    whole = stored(0, 3000, hashes=numbers.astype(np.uint64), tokens=tokens)
    index = KvIndex(max_blocks=2500)
    index.add_worker("a", 0, SIZE)
    assert index.apply(0, stored(0, 3000, parent=9_999, hashes=whole.hashes, tokens=tokens)) == ApplyResult(orphans=3000)
    assert index.apply(0, whole) == ApplyResult(stored=2500, refused=500)
    assert index.apply(0, whole) == ApplyResult(refused=500)
    assert prefix(index, keys=hash_blocks(tokens, SIZE)) == [2500, 0, 0]
    assert index.apply(0, BlockRemoved(hashes=whole.hashes)).removed == 2500
    assert index.stats().size_bytes > 0 == index.stats().blocks
