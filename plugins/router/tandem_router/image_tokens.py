# SPDX-License-Identifier: Apache-2.0
"""Block keys of prompts with images, as the engines' events have them.

A prompt holds one placeholder token per image; the engine puts as many there as the image has, which only its processor knows. So the
router learns it: from the prompt length that a worker reports. An image that was never seen can't be in any cache either, so until
then only the blocks before it have keys. Blocks that an image touches are mixed with its content id and its place, as vLLM does
(`generate_block_hash_extra_keys`): the keys of two images are never the same. That holds for models that repeat one placeholder
token per image (Qwen-VL, PaddleOCR-VL, LLaVA); for others the keys match nothing, and placement goes by load. Pure; on the event loop.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tandem_protocol.blocks import Keys, extra_key, hash_blocks

_MOST_IMAGES = 100_000
"""Images whose length is remembered: about 20 MB."""


@dataclass(frozen=True)
class ImageSpan:
    """Where an image stands in an expanded prompt, in tokens."""

    content_id: str
    offset: int
    length: int


@dataclass(frozen=True)
class Expanded:
    """A prompt as the engine will see it, or its beginning up to the first image of unknown length."""

    token_ids: list[int]
    spans: tuple[ImageSpan, ...]


class ImageTokens:
    """How many tokens images have, as far as it is known."""

    def __init__(self, placeholder: int, most: int = _MOST_IMAGES) -> None:
        """`placeholder` is the model's token id that stands for an image."""
        self._placeholder, self._most = placeholder, most
        self._lengths: OrderedDict[str, int] = OrderedDict()

    def learn(self, prompt_ids: Sequence[int], content_ids: Sequence[str], reported: int) -> None:
        """A worker reported the length of this prompt. It tells what one image has, once all others are known."""
        if self._count(prompt_ids) != len(content_ids):
            return
        unknown = {one for one in content_ids if one not in self._lengths}
        if len(unknown) != 1:
            return
        [image] = unknown
        known = sum(self._lengths[one] for one in content_ids if one != image)
        times = list(content_ids).count(image)
        length, rest = divmod(reported - (len(prompt_ids) - len(content_ids)) - known, times)
        if length > 0 and not rest:
            self._lengths[image] = length
        if len(self._lengths) > self._most:
            self._lengths.popitem(last=False)

    def expand(self, prompt_ids: Sequence[int], content_ids: Sequence[str]) -> Expanded:
        """The prompt with every placeholder as often as its image has tokens."""
        tokens: list[int] = []
        spans: list[ImageSpan] = []
        if self._count(prompt_ids) != len(content_ids):
            return Expanded([], ())  # the client expanded it, or the engine will refuse it
        images = iter(content_ids)
        for token in prompt_ids:
            if token != self._placeholder:
                tokens.append(token)
                continue
            image = next(images)
            length = self._lengths.get(image)
            if length is None:
                break
            self._lengths.move_to_end(image)
            spans.append(ImageSpan(image, len(tokens), length))
            tokens += [self._placeholder] * length
        return Expanded(tokens, tuple(spans))

    def _count(self, prompt_ids: Sequence[int]) -> int:
        return sum(token == self._placeholder for token in prompt_ids)


def keys_of(expanded: Expanded, block_size: int, salt: int) -> Keys:
    """Keys of the full blocks of an expanded prompt, uint64."""
    blocks = len(expanded.token_ids) // block_size
    extra = np.zeros(blocks, np.uint64)
    for block in range(blocks):
        start, end = block * block_size, (block + 1) * block_size
        touched = [(span.content_id, span.offset - start) for span in expanded.spans
                   if span.offset < end and span.offset + span.length > start]
        extra[block] = extra_key(touched)
    return hash_blocks(expanded.token_ids, block_size, salt, extra)
