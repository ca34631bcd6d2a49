# SPDX-License-Identifier: Apache-2.0
"""KV events as vLLM sends them: maps and arrays, integer and byte hashes, fields to come, and what is malformed."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_protocol.blocks import extra_key
from tandem_protocol.errors import RequestError
from tandem_protocol.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Tier, decode, encode
from tandem_protocol.msgpack_integers import read_hashes

STORED = {"type": "BlockStored", "block_hashes": [11, 2**64 - 1], "parent_block_hash": 7, "token_ids": list(range(100_000, 100_008)),
          "block_size": 4, "lora_id": None, "medium": "GPU", "lora_name": None}


def decode_one(event: Any) -> Any:
    batch = decode(msgspec.msgpack.encode([1.5, [event], 3]))
    assert (batch.timestamp_s, batch.dp_rank, batch.unknown) == (1.5, 3, 0)
    return batch.events[0]


def check_stored(event: BlockStored) -> None:
    assert (event.hashes.tolist(), event.parent, event.tokens.tolist()) == ([11, 2**64 - 1], 7, list(range(100_000, 100_008)))
    assert (event.hashes.dtype, event.tokens.dtype) == (np.uint64, np.uint32)
    assert (event.block_size, event.lora_name, event.extra, event.group, event.spec_kind, event.tier) == (4, "", None, 0, None, Tier.GPU)


def test_maps_of_today() -> None:
    """vLLM 0.32: a map per event; fields that we don't know are skipped."""
    check_stored(decode_one(STORED))
    check_stored(decode_one({**STORED, "session_id": "s", "a_field_to_come": {"deep": [1]}}))


def test_arrays_of_older_releases() -> None:
    """The tag first, then the fields in order; short ones and longer ones."""
    check_stored(decode_one(["BlockStored", *list(STORED.values())[1:6]]))
    check_stored(decode_one([*STORED.values(), None, 0, None, None, "LOCAL", None, "session", "to come"]))
    removed = decode_one(["BlockRemoved", [5], "CPU"])
    assert (removed.hashes.tolist(), removed.tier, removed.group) == ([5], Tier.CPU, None)
    assert decode_one(["AllBlocksCleared"]) == AllBlocksCleared()


def test_hashes_of_bytes_and_signed_integers() -> None:
    """vLLM's own rule: the low 64 bits of the big-endian number."""
    raw = bytes(range(32))
    event = decode_one({**STORED, "block_hashes": [raw, -2], "parent_block_hash": raw})
    low = int.from_bytes(raw, "big") & (2**64 - 1)
    assert (event.hashes.tolist(), event.parent) == ([low, 2**64 - 2], low)
    assert decode_one({**STORED, "parent_block_hash": -2}).parent == 2**64 - 2


@pytest.mark.parametrize(("medium", "tier"), [
    (None, Tier.GPU), ("GPU", Tier.GPU), ("CPU", Tier.CPU), ("cpu", Tier.CPU), ("STORAGE", Tier.STORAGE),
])
def test_mediums(medium: str | None, tier: Tier) -> None:
    """None is the GPU; vLLM's Mooncake connector writes lower case."""
    assert decode_one({**STORED, "medium": medium}).tier is tier


def test_extra_keys_become_numbers_without_the_adapter() -> None:
    """The adapter's name stands in every block's entry; an image's hash only in its own."""
    extra = [["ada"], ["ada", ["image", 3]]]
    event = decode_one({**STORED, "lora_name": "ada", "extra_keys": extra})
    assert event.lora_name == "ada"
    assert event.extra is not None
    assert event.extra.tolist() == [0, extra_key([["image", 3]])]
    assert decode_one({**STORED, "lora_name": "ada", "extra_keys": [["ada"], ["ada"]]}).extra is None
    assert decode_one({**STORED, "extra_keys": [None, None]}).extra is None


def test_an_adapter_known_by_number_only_is_not_the_base_model() -> None:
    """Old releases send `lora_id` alone."""
    assert decode_one({**STORED, "lora_id": 4}).lora_name == "#4"


def test_events_of_types_to_come_are_counted() -> None:
    """The others of the batch are kept."""
    batch = decode(msgspec.msgpack.encode([0.0, [{"type": "Moved", "x": 1}, STORED, ["Moved", 2]], None]))
    assert batch.unknown == 2
    check_stored(batch.events[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("payload", [
    b"", b"\xc1", b"\x93", msgspec.msgpack.encode({}), msgspec.msgpack.encode([1.0]),
    *(msgspec.msgpack.encode([0.0, [event], None]) for event in (
        7, [], [1], {}, {"type": 3}, {"type": "BlockStored"}, {**STORED, "block_hashes": 5}, {**STORED, "token_ids": [1.5]},
        {**STORED, "token_ids": ["x"]}, {**STORED, "medium": "TAPE"}, {**STORED, "extra_keys": [["a"]]}, {**STORED, "block_size": "4"},
    )),
])
def test_malformed_payloads_raise(payload: bytes) -> None:
    """DecodeError, which ValidationError is one of; never anything else."""
    with pytest.raises(msgspec.DecodeError):
        decode(payload)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_crash(payload: bytes) -> None:
    """Either a batch or a DecodeError, also for what begins like an event."""
    head = msgspec.msgpack.encode([0.0, [STORED], None])
    for raw in (payload, head[: len(payload)] + payload):
        try:
            decode(raw)
        except msgspec.DecodeError:
            continue


@given(st.lists(st.integers(-(2**63), 2**64 - 1), max_size=40))
def test_all_widths_of_integers(values: list[int]) -> None:
    """Every encoding that msgpack has, at the end of the buffer as well."""
    assert read_hashes(msgspec.Raw(msgspec.msgpack.encode(values))).tolist() == [value % 2**64 for value in values]


def test_what_is_encoded_is_decoded_again() -> None:
    """Mock engines publish with `encode`."""
    stored = BlockStored(hashes=np.array([1, 2**63], np.uint64), parent=9, tokens=np.arange(8, dtype=np.uint32), block_size=4,
                         lora_name="ada", group=2, spec_kind="full_attention", tier=Tier.STORAGE)
    removed = BlockRemoved(hashes=stored.hashes, group=1, tier=Tier.CPU)
    batch = decode(encode([stored, removed, AllBlocksCleared()], 2.0, 5))
    again, removed_again, cleared = batch.events
    assert isinstance(again, BlockStored)
    assert isinstance(removed_again, BlockRemoved)
    for name in ("parent", "block_size", "lora_name", "group", "spec_kind", "tier"):
        assert getattr(again, name) == getattr(stored, name)
    assert np.array_equal(again.hashes, stored.hashes)
    assert np.array_equal(again.tokens, stored.tokens)
    assert (removed_again.hashes.tolist(), removed_again.group, removed_again.tier) == ([1, 2**63], 1, Tier.CPU)
    assert (cleared, batch.timestamp_s, batch.dp_rank) == (AllBlocksCleared(), 2.0, 5)


def test_extra_keys_cannot_be_encoded() -> None:
    """They are hashes by then."""
    with pytest.raises(RequestError, match="without them"):
        encode([BlockStored(hashes=np.ones(1, np.uint64), tokens=np.zeros(0, np.uint32), block_size=4, extra=np.ones(1, np.uint64))])
