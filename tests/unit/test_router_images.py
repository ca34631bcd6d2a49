# SPDX-License-Identifier: Apache-2.0
"""Block keys of prompts with images: those of the engine's events, and never another image's."""

from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from tandem_protocol.blocks import hash_blocks
from tandem_protocol.errors import RequestError
from tandem_protocol.image_files import content_id, inline_bytes
from tandem_protocol.kv_events import BlockStored, decode
from tandem_router.image_tokens import Expanded, ImageSpan, ImageTokens, keys_of

IMAGE = 99
BLOCK = 4
TEXT = [1, 2, 3, 4, 5]


@pytest.fixture
def images() -> ImageTokens:
    """That knows a (6 tokens) and b (3)."""
    tokens = ImageTokens(IMAGE)
    tokens.learn([*TEXT, IMAGE], ["a"], len(TEXT) + 6)
    tokens.learn([IMAGE, 7, IMAGE], ["a", "b"], 1 + 6 + 3)
    return tokens


def test_lengths_are_learnt_from_reported_prompt_lengths(images: ImageTokens) -> None:
    """Also of one image among known ones."""
    assert images.expand([1, IMAGE, 2, IMAGE, 3], ["b", "a"]) == Expanded(
        [1, *[IMAGE] * 3, 2, *[IMAGE] * 6, 3], (ImageSpan("b", 1, 3), ImageSpan("a", 5, 6)))


def test_a_prompt_is_known_up_to_its_first_new_image(images: ImageTokens) -> None:
    """What comes after it depends on how long it is."""
    assert images.expand([1, 2, IMAGE, 3, IMAGE, 4], ["a", "new"]) == Expanded([1, 2, *[IMAGE] * 6, 3], (ImageSpan("a", 2, 6),))


@pytest.mark.parametrize(("prompt", "ids", "reported"), [
    ([IMAGE, IMAGE], ["x", "y"], 20), ([1], ["x"], 20), ([IMAGE], ["x"], 0), ([IMAGE, IMAGE], ["x", "x"], 5), ([IMAGE] * 3, ["x"], 9),
])  # fmt: skip
def test_what_does_not_tell_a_length_is_not_learnt(images: ImageTokens, prompt: list[int], ids: list[str], reported: int) -> None:
    """Two unknown ones, no placeholder, nonsense, or a prompt that the client expanded."""
    images.learn(prompt, ids, reported)
    assert images.expand([1, IMAGE, 2], ["x"]) == Expanded([1], ())


def test_memory_is_bounded() -> None:
    """The least recently used image is forgotten."""
    tokens = ImageTokens(IMAGE, most=2)
    for name in ("a", "b", "c"):
        tokens.learn([IMAGE], [name], 5)
        tokens.expand([IMAGE], ["a"])
    assert [bool(tokens.expand([IMAGE], [name]).spans) for name in ("a", "b", "c")] == [True, False, True]


def vllm_events(token_ids: list[int], features: list[tuple[str, int, int]]) -> BlockStored:
    """The event in which vLLM itself would tell of the blocks of a prompt with these images (id, offset, length)."""
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, to_event_extra_keys

    request: Any = SimpleNamespace(
        mm_features=[SimpleNamespace(identifier=name, mm_position=SimpleNamespace(offset=offset, length=length))
                     for name, offset, length in features], lora_request=None, cache_salt=None, prompt_embeds=None)
    extras, index = [], 0
    for start in range(0, len(token_ids) // BLOCK * BLOCK, BLOCK):
        extra, index = generate_block_hash_extra_keys(request, start, start + BLOCK, index)
        extras.append(extra)
    event = {"type": "BlockStored", "block_hashes": list(range(len(extras))), "parent_block_hash": None,
             "token_ids": token_ids[: len(extras) * BLOCK], "block_size": BLOCK, "lora_id": None, "medium": "GPU",
             "extra_keys": to_event_extra_keys(extras)}
    [stored] = decode(msgspec.msgpack.encode([0.0, [event], None])).events
    assert isinstance(stored, BlockStored)
    return stored


def test_keys_are_those_of_the_engines_events(images: ImageTokens) -> None:
    """By vLLM's own functions: blocks before, inside, between and after images."""
    expanded = images.expand([*TEXT, IMAGE, 6, 7, IMAGE, *range(10, 20)], ["a", "b"])
    stored = vllm_events(expanded.token_ids, [(span.content_id, span.offset, span.length) for span in expanded.spans])
    assert stored.extra is not None
    expected = hash_blocks(stored.tokens, BLOCK, 0, stored.extra)
    assert np.array_equal(keys_of(expanded, BLOCK, 0), expected)
    assert len(expected) == 6


def test_another_image_shares_only_what_comes_before_it(images: ImageTokens) -> None:
    """And a text of the very same tokens is no image."""
    images.learn([IMAGE], ["c"], 6)
    prompt = [1, 2, 3, 4, 5, IMAGE, 6]
    one, other = (keys_of(images.expand(prompt, [name]), BLOCK, 0) for name in ("a", "c"))
    plain = hash_blocks(images.expand(prompt, ["a"]).token_ids, BLOCK)
    assert one[0] == other[0] == plain[0]
    assert not set(one[1:].tolist()) & set(other[1:].tolist())
    assert not set(one[1:].tolist()) & set(plain[1:].tolist())


def test_a_router_knows_images_that_a_request_carries() -> None:
    """By the id that the worker gives them; what lies elsewhere it doesn't fetch."""
    assert inline_bytes(b"AAEC") == b"\0\1\2"
    assert inline_bytes(b"data:image/png;base64,AAEC") == b"\0\1\2"
    assert [inline_bytes(url) for url in (b"http://a/b", b"HTTPS://a/b", b"file:///a", b"ftp://a/b")] == [None] * 4
    assert content_id(b"\0\1\2") != content_id(b"\0\1")
    for bad in (b"AAE", b"data:image/png;base64", b"?"):
        with pytest.raises(RequestError):
            inline_bytes(bad)
