# SPDX-License-Identifier: Apache-2.0
"""The consolidator's benchmark: its load is sound, and what isn't is found."""

from itertools import islice

import pytest
from benchmarks.consolidator_trace import Frame, State, device_frames, number, number_of, tier_frames
from benchmarks.errors import BenchmarkError

from tandem_kvbm.consolidator.tracker import Tracker
from tandem_protocol.kv_events import Tier


def _read(frames: list[Frame]) -> State:
    state = State()
    for frame in frames:
        state.read(bytes(frame.payload))
    return state


@pytest.mark.parametrize("trace", [device_frames, tier_frames])
def test_a_consolidator_makes_the_same_of_the_load(trace: type) -> None:
    """Of each frame something, by its number, and in the end the same blocks in the same tiers."""
    frames = list(islice(trace(1 << 30), 2000))
    tracker, after = Tracker({"engine0": 0}), State()
    for place, frame in enumerate(frames):
        number(frame.payload, place)
        changes = tracker.apply("engine0", bytes(frame.payload), 0.0)
        assert [number_of(change.payload()) for change in changes] == [place]
        after.read(changes[0].payload())
    before = _read(frames)
    assert before.held == after.held
    assert before.held[Tier.GPU]


def test_the_load_is_seeded_and_fills_all_tiers() -> None:
    """The same again; blocks are counted where they are stored and where they are removed."""
    frames = list(tier_frames(3))
    assert [frame.payload for frame in frames] == [frame.payload for frame in tier_frames(3)]
    held = _read(frames).held
    assert {tier: len(blocks) for tier, blocks in held.items()} == dict.fromkeys(Tier, 3 * 264)
    assert sum(frame.blocks for frame in frames) == 3 * 3 * 264


def test_a_frame_that_is_missing_shows() -> None:
    """By a block whose parent never came, or one that leaves without having come."""
    frames = list(device_frames(70))
    with pytest.raises(BenchmarkError, match="before its parent"):
        _read(frames[1:])
    evictions = [place for place, frame in enumerate(frames) if frame.blocks == 264]
    with pytest.raises(BenchmarkError, match="where it was not"):
        _read([*frames, frames[evictions[0]]])
