# SPDX-License-Identifier: Apache-2.0
"""What the consolidator publishes: one store at the first holder, one removal at the last, parents first, tiers kept apart."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from consolidators import CLEARED, Consumer, named, payload, removed, stored
from tandem_kvbm.consolidator import wire
from tandem_kvbm.consolidator.history import Dump, History, make_dump
from tandem_kvbm.consolidator.plan import ALL_RANKS, LaneLimits
from tandem_kvbm.consolidator.state_file import load_lane, read_state, save_lane, write_state
from tandem_kvbm.consolidator.tracker import Tracker
from tandem_protocol.errors import ConfigError
from tandem_protocol.event_link import DUMP_TOPIC
from tandem_protocol.event_sequence_terms import Position
from tandem_protocol.kv_events import Tier


class _Stream:
    """A tracker, and all that comes of what it is given."""

    def __init__(self, ranks: dict[str, int] | None = None, limits: LaneLimits | None = None) -> None:
        self.tracker = Tracker(ranks or {"engine": 0}, limits)
        self.consumers = {rank: Consumer() for rank in self.tracker.lanes}

    def feed(self, *events: dict[str, Any], source: str = "engine", now: float = 0.0) -> list[dict[str, Any]]:
        """Applies a batch; answers the published events as they are on the wire, and lets a strict consumer take them."""
        told: list[dict[str, Any]] = []
        for change in self.tracker.apply(source, payload(*events), now):
            self.consumers[change.dp_rank].apply(change.payload())
            told += msgspec.msgpack.decode(change.payload())[1]
        for lane in self.tracker.lanes.values():
            lane.check_integrity()
        return told

    def counts(self, rank: int = 0) -> Any:
        return self.tracker.lanes[rank].counts


def _brief(events: list[dict[str, Any]]) -> list[tuple[str, str | None, list[int]]]:
    return [(event["type"], event.get("medium"), event.get("block_hashes", [])) for event in events]


def test_a_store_passes_through_with_all_that_it_says() -> None:
    """Adapter, extra keys, group, kind and window reach the consumer; the owner doesn't, since two owners are one tier."""
    stream = _Stream()
    event = stored([1, 2], None, "STORAGE", lora_id=3, lora_name="fr", extra_keys=[["fr", ["image", 0]], None], group_idx=1,
                   kv_cache_spec_kind="sliding_window", kv_cache_spec_sliding_window=512, ownership="fs", locality="REMOTE", session_id="s")
    told = stream.feed(event)[0]
    assert told == {**{name: value for name, value in event.items() if name != "session_id"}, "ownership": None, "locality": None}


def test_events_as_arrays_and_hashes_of_bytes_are_understood() -> None:
    """Older releases send both; ours go out as integers, the low 64 bits, in maps."""
    stream = _Stream()
    events = [["BlockStored", [b"\x07" * 32], None, [1, 2], 2, None, "GPU"], ["BlockRemoved", [b"\x07" * 32], "GPU"], ["AllBlocksCleared"]]
    raw = msgspec.msgpack.encode([1.0, [*events, ["Novelty", 1]], 0])
    changes = stream.tracker.apply("engine", raw, 0.0)
    told = msgspec.msgpack.decode(changes[0].payload())[1]
    assert _brief(told) == [("BlockStored", "GPU", [0x0707070707070707]), ("BlockRemoved", "GPU", [0x0707070707070707])]
    assert stream.tracker.unknown == 1


def test_tiers_of_one_block_are_told_apart() -> None:
    """The router weighs them."""
    stream = _Stream()
    assert _brief(stream.feed(stored([1]), stored([1], medium="CPU"))) == [("BlockStored", "GPU", [1]), ("BlockStored", "CPU", [1])]
    assert _brief(stream.feed(removed([1]))) == [("BlockRemoved", "GPU", [1])]
    assert _brief(stream.feed(removed([1], "CPU"))) == [("BlockRemoved", "CPU", [1])]


def test_two_owners_in_storage_are_one_tier() -> None:
    """The second store and the first removal say nothing new."""
    stream = _Stream()
    assert len(stream.feed(stored([1], medium="STORAGE", ownership="fs"), stored([1], medium="STORAGE", ownership="s3"))) == 1
    assert stream.feed(removed([1], "STORAGE", ownership="fs")) == []
    assert _brief(stream.feed(removed([1], "STORAGE", ownership="s3"))) == [("BlockRemoved", "STORAGE", [1])]


def test_a_tier_counts_repeated_stores_and_the_gpu_does_not() -> None:
    """Chunks announce the blocks that they share once each; engines report the reuse of GPU blocks as stores."""
    stream = _Stream()
    stream.feed(stored([1]), stored([1]), stored([1], medium="CPU"), stored([1], medium="CPU"))
    assert _brief(stream.feed(removed([1]), removed([1], "CPU"))) == [("BlockRemoved", "GPU", [1])]
    assert _brief(stream.feed(removed([1], "CPU"))) == [("BlockRemoved", "CPU", [1])]
    assert stream.counts().repeated == 2


def test_a_partly_known_run_is_published_in_part() -> None:
    """Only what is new goes out, chained to what is known."""
    stream = _Stream()
    stream.feed(stored([1, 2]))
    told = stream.feed(stored([1, 2, 3, 4]))
    assert [(event["block_hashes"], event["parent_block_hash"], event["token_ids"]) for event in told] == [([3, 4], 2, [3, 4, 4, 5])]


def test_a_child_waits_for_its_parent() -> None:
    """Offload tiers announce children first."""
    stream = _Stream()
    assert stream.feed(stored([3], 2, "CPU"), stored([2], 1, "CPU")) == []
    assert stream.tracker.lanes[0].waiting == 2
    assert [event["block_hashes"] for event in stream.feed(stored([1]))] == [[1], [2], [3]]
    assert stream.counts().adopted == 2


def test_a_child_that_left_while_it_waited_is_never_published() -> None:
    """Its removal finds it, whether its parent has come or not."""
    stream = _Stream()
    stream.feed(stored([3], 2, "CPU"))
    assert stream.feed(removed([3], "CPU")) == []
    assert _brief(stream.feed(stored([2]))) == [("BlockStored", "GPU", [2])]


def test_orphans_are_given_up_in_time_and_beyond_the_bound() -> None:
    """They are counted; and a later store that says more is taken as ever."""
    stream = _Stream(limits=LaneLimits(max_orphans=2, orphan_s=10.0))
    stream.feed(stored([11], 1, "CPU"), stored([12], 1, "CPU"), stored([13], 1, "CPU"))
    assert (stream.counts().expired, stream.tracker.lanes[0].waiting) == (1, 2)
    stream.tracker.expire(11.0)
    assert (stream.counts().expired, stream.tracker.lanes[0].waiting) == (3, 0)
    assert _brief(stream.feed(stored([1]))) == [("BlockStored", "GPU", [1])]
    assert _brief(stream.feed(stored([11], 1))) == [("BlockStored", "GPU", [11]), ("BlockStored", "CPU", [11])]


def test_a_store_without_tokens_is_published_with_those_that_are_known() -> None:
    """Whether they were told before or are told later; a removal needs none."""
    stream = _Stream()
    stream.feed(stored([1, 2]))
    told = stream.feed(named([2]))
    assert [(event["parent_block_hash"], event["token_ids"]) for event in told] == [(1, [2, 3])]
    assert stream.feed(named([3])) == []
    assert _brief(stream.feed(stored([3], 2))) == [("BlockStored", "GPU", [3]), ("BlockStored", "CPU", [3])]
    assert _brief(stream.feed(removed([2, 3], "CPU"))) == [("BlockRemoved", "CPU", [2, 3])]
    assert stream.counts().bare == 1


def test_a_block_whose_parent_left_is_named_by_its_hash() -> None:
    """A consumer that has forgotten the parent would make an orphan of it."""
    stream = _Stream()
    stream.feed(stored([1, 2]), stored([2], 1, "CPU"), removed([1, 2]))
    told = stream.feed(stored([2, 3], 1))
    said = [(event["block_hashes"], event["token_ids"], event["parent_block_hash"]) for event in told]
    assert said == [([2], [], None), ([3], [3, 4], 2)]


def test_a_clear_empties_the_gpu_tier_of_its_publisher_alone() -> None:
    """CPU copies stay; with another publisher's blocks on the GPU the clear is spelled out."""
    stream = _Stream({"engine": 0, "twin": 0})
    stream.feed(stored([1, 2]), stored([1], medium="CPU"))
    assert _brief(stream.feed(CLEARED)) == [("AllBlocksCleared", None, [])]
    stream.feed(stored([1, 2]))
    stream.feed(stored([2], 1), source="twin")
    assert _brief(stream.feed(CLEARED)) == [("BlockRemoved", "GPU", [1])]


def test_groups_are_told_apart_and_a_removal_without_one_means_all() -> None:
    """A hybrid model's blocks carry one hash per prefix, whatever the group."""
    stream = _Stream()
    stream.feed(stored([1], group_idx=0), stored([1], group_idx=1))
    assert [event["group_idx"] for event in stream.feed(removed([1], group_idx=1))] == [1]
    stream.feed(stored([1], group_idx=1))
    assert sorted(event["group_idx"] for event in stream.feed(removed([1]))) == [0, 1]


def test_blocks_of_another_size_are_counted_and_left_out() -> None:
    """Nor do their removals do harm."""
    stream = _Stream()
    stream.feed(stored([1]))
    assert stream.feed(stored([2], 1, token_ids=[1, 2, 3], block_size=3), stored([3], 1, token_ids=[1, 2, 3]), removed([2])) == []
    assert (stream.counts().mismatched, stream.counts().unknown_removed) == (2, 1)


def test_another_engine_may_have_another_block_size() -> None:
    """Once nothing of the first is left."""
    stream = _Stream()
    stream.feed(stored([1]))
    stream.tracker.forget("engine", 0.0)
    assert len(stream.feed(stored([2], token_ids=[1, 2, 3], block_size=3))) == 1


def test_blocks_beyond_the_bound_are_refused_and_counted() -> None:
    """A child of one that was refused waits in vain."""
    stream = _Stream(limits=LaneLimits(max_blocks=1024))
    stream.feed(stored(list(range(1, 1025))))
    assert stream.feed(stored([5000], 1024)) == []
    assert stream.counts().refused == 1
    stream.feed(removed([1024]))
    assert len(stream.feed(stored([5000], 1023))) == 1


def test_tables_grow() -> None:
    """Slots keep their blocks."""
    stream = _Stream()
    for first in range(1, 20_000, 500):
        stream.feed(stored(list(range(first, first + 500)), None if first == 1 else first - 1))
    assert stream.tracker.lanes[0].held == 20_000
    assert len(stream.feed(removed(list(range(20_000, 0, -1))))) == 3
    assert stream.tracker.lanes[0].held == 0


def test_ranks_are_kept_apart_and_shared_tiers_belong_to_all() -> None:
    """One stream, each batch marked with its rank."""
    stream = _Stream({"engine0": 0, "engine1": 1, "shared": ALL_RANKS})
    stream.feed(stored([1]), source="engine0")
    assert stream.consumers[1].held == {}
    stream.feed(stored([1]), source="engine1")
    stream.feed(stored([1], medium="STORAGE"), source="shared")
    assert stream.consumers[0].held == stream.consumers[1].held
    assert len(stream.consumers[0].held) == 2


@pytest.mark.parametrize("broken", [b"", b"\xc1", payload(stored([1], medium="TAPE")), payload(stored([1]), removed(["x"])),  # type: ignore[list-item]
                                    payload(stored([1], group_idx=64)), payload(stored([1], extra_keys=[["a"], ["b"]]))])
def test_a_batch_that_cannot_be_read_changes_nothing(broken: bytes) -> None:
    """Not even by its first half."""
    stream = _Stream()
    with pytest.raises(msgspec.DecodeError):
        stream.tracker.apply("engine", broken, 0.0)
    assert stream.tracker.lanes[0].held == 0


def _events_of(stream: _Stream, *events: dict[str, Any]) -> list[dict[str, Any]]:
    """What goes out for one batch."""
    changes = stream.tracker.apply("engine", payload(*events), 0.0)
    return [event for change in changes for event in msgspec.msgpack.decode(change.payload())[1]]


def test_an_event_per_block_becomes_an_event_per_run() -> None:
    """As tiers send them; with all tokens, in the first one's place."""
    events = _events_of(_Stream(), *(stored([block], block - 1 if block > 1 else None, "CPU") for block in range(1, 5)))
    assert [(event["block_hashes"], event["parent_block_hash"], event["token_ids"]) for event in events] == [
        ([1, 2, 3, 4], None, [1, 2, 2, 3, 3, 4, 4, 5])]


def test_siblings_and_strangers_do_not_become_a_run() -> None:
    """Each keeps its parent; so do those whose parent comes later in the same batch."""
    stream = _Stream()
    stream.feed(stored([1]), stored([7], 1), stored([8], 1), stored([20]), stored([31], 30), stored([30]))
    assert stream.consumers[0].held.keys() == {(Tier.GPU, 0, block) for block in (1, 7, 8, 20, 30, 31)}


def test_one_bad_event_among_many_costs_only_itself() -> None:
    """Its tokens don't fill its block."""
    stream = _Stream()
    stream.feed(stored([1]), stored([2], 1, token_ids=[2]), stored([3]))
    assert stream.consumers[0].held.keys() == {(Tier.GPU, 0, 1), (Tier.GPU, 0, 3)}
    assert stream.counts().mismatched == 1


def test_extra_keys_stay_with_their_blocks() -> None:
    """Also where the events around have none."""
    events = _events_of(_Stream(), stored([1]), stored([2], 1, extra_keys=[["image"]]), stored([3], 2, extra_keys=[None]))
    assert [(event["block_hashes"], event["extra_keys"]) for event in events] == [([1], None), ([2], [["image"]]), ([3], [None])]


def test_arrays_of_any_length_are_joined() -> None:
    """Headers of one, three and five bytes."""
    values = [list(range(size)) for size in (2, 2, 15, 16, 70_000)]
    raw, sizes = wire.joined([msgspec.Raw(msgspec.msgpack.encode(value)) for value in values])
    assert sizes == [2, 2, 15, 16, 70_000]
    assert msgspec.msgpack.decode(raw) == [number for value in values for number in value]
    with pytest.raises(msgspec.ValidationError):
        wire.joined([msgspec.Raw(b"\x90"), msgspec.Raw(b"\xc0")])


def test_many_removals_are_read_as_one_array() -> None:
    """vLLM sends one event per evicted block."""
    raws = [msgspec.Raw(msgspec.msgpack.encode([value])) for value in (1, 1 << 63, 300, -1)]
    assert wire.hashes_of_many(raws).tolist() == [1, 1 << 63, 300, (1 << 64) - 1]
    assert wire.hashes_of_many([*raws, msgspec.Raw(msgspec.msgpack.encode([1, 2]))]).tolist()[-2:] == [1, 2]


def test_the_history_answers_as_vllm_while_it_holds_the_start() -> None:
    """From a number on, with what is left."""
    history = History(3)
    for number in range(2):
        history.add(bytes([number]))
    assert [frame.seq for frame in history.answer(0, None)] == [0, 1]
    assert not history.needs_dump(0, None)
    for number in range(2, 6):
        history.add(bytes([number]))
    assert [(frame.seq, frame.payload) for frame in history.answer(1, None)] == [(3, b"\x03"), (4, b"\x04"), (5, b"\x05")]


def test_from_the_beginning_comes_a_dump_that_leads_to_the_buffer() -> None:
    """Numbers without a gap; a dump serves until the buffer has moved past it."""
    history = History(3)
    for number in range(6):
        history.add(bytes([number]))
    assert history.needs_dump(0, None)
    dump = Dump(4, (b"a", b"b"))
    assert not history.needs_dump(0, dump)
    frames = list(history.answer(0, dump))
    assert [(frame.seq, frame.payload) for frame in frames] == [(2, b"a"), (3, b"b"), (4, b"\x04"), (5, b"\x05")]
    assert [frame.topic for frame in frames] == [DUMP_TOPIC, DUMP_TOPIC, b"", b""]
    history.add(b"\x06")
    history.add(b"\x07")
    assert history.needs_dump(0, dump)


def test_a_dump_carries_adapters_extra_keys_kinds_and_what_only_descendants_need() -> None:
    """Blocks that nobody holds are stored for the sake of their children, and removed at the end."""
    stream = _Stream()
    stream.feed(stored([1, 2], lora_name="fr", lora_id=1, extra_keys=[["fr"], ["fr", ["image", 0]]], group_idx=0,
                       kv_cache_spec_kind="full_attention"), stored([2], 1, "CPU", lora_name="fr", lora_id=1), removed([1, 2]))
    dump = make_dump(9, [(0, stream.tracker.lanes[0].content)], 5.0)
    late = Consumer()
    late.apply(dump.payloads[0])
    assert late.held == stream.consumers[0].held
    events = msgspec.msgpack.decode(dump.payloads[0])[1]
    assert _brief(events) == [("BlockStored", "GPU", [1]), ("BlockStored", "CPU", [2]), ("BlockRemoved", "GPU", [1])]
    assert [(event["lora_name"], event["lora_id"], event["extra_keys"], event["kv_cache_spec_kind"]) for event in events[:2]] == [
        ("fr", 1, [["fr"]], "full_attention"), ("fr", 1, [["fr", ["image", 0]]], "full_attention")]


def test_a_dump_has_no_more_frames_than_numbers() -> None:
    """However much there is to tell."""
    stream = _Stream()
    for first in range(1, 20_001, 1000):
        stream.feed(stored(list(range(first, first + 1000)), None if first == 1 else first - 1))
    for end in (1, 2, 20):
        dump = make_dump(end, [(0, stream.tracker.lanes[0].content)], 5.0)
        late = Consumer()
        for raw in dump.payloads:
            late.apply(raw)
        assert len(dump.payloads) <= end
        assert late.held.keys() == stream.consumers[0].held.keys()


def test_the_state_survives_on_disk(tmp_path: Path) -> None:
    """With claims, orphans and extra keys: what comes next is understood as before."""
    stream = _Stream()
    stream.feed(stored([1], extra_keys=[["salt"]]), stored([1], medium="CPU"), stored([1], medium="CPU"), stored([9], 8, "CPU"))
    lane = stream.tracker.lanes[0]
    write_state(tmp_path / "deep" / "state", {0: save_lane(lane.content, lane.places)}, {"engine x": Position(7, 5)})
    saved = read_state(tmp_path / "deep" / "state")
    assert saved is not None
    assert saved.positions == {"engine x": Position(7, 5)}
    stream.tracker.lanes[0] = type(lane)(LaneLimits(), load_lane(saved.lanes[0]), saved.lanes[0].places, 0.0)
    assert stream.feed(removed([1], "CPU")) == []
    assert _brief(stream.feed(stored([8], 1))) == [("BlockStored", "GPU", [8]), ("BlockStored", "CPU", [9])]


def test_a_file_that_is_no_state_says_so(tmp_path: Path) -> None:
    """And what to do about it."""
    assert read_state(tmp_path / "none") is None
    (tmp_path / "state").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="remove it"):
        read_state(tmp_path / "state")
