# SPDX-License-Identifier: Apache-2.0
"""From a prompt to token ids and block keys: with the workers' own tokenizer, so that the router's blocks are theirs."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tandem_protocol.blocks import Keys, hash_blocks, salt_of
from tandem_protocol.errors import ConfigError
from tandem_protocol.image_files import content_id, inline_bytes
from tandem_protocol.requests import GenerationRequest
from tandem_router.image_tokens import ImageTokens, keys_of

log = logging.getLogger(__name__)

_OFF_LOOP_CHARS = 4096
"""A longer text is tokenized in a thread: the tokenizer releases the GIL, and the other streams go on meanwhile."""


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers."""

    def __call__(self, text: str) -> Any:
        """Encodes a text with the special tokens that the model wants around it."""


@dataclass(frozen=True)
class Known:
    """What placement needs to know of a prompt."""

    tokens: int
    """Its length; with images that were never seen too small, by as much as they have."""
    keys: Keys
    """Of its full blocks, as far as they are known."""
    content_ids: tuple[str, ...] = ()
    """Of its images, if it carries them all itself."""


class Prompts:
    """Tokenizes prompts of one model."""

    def __init__(self, tokenizer: Tokenizer, placeholder: int | None = None) -> None:
        """`placeholder`: the token id that stands for an image; None for a model without, or with none of its own."""
        self._tokenizer = tokenizer
        self._images = None if placeholder is None else ImageTokens(placeholder)

    async def known(self, request: GenerationRequest, token_ids: list[int], block_size: int) -> Known:
        """Length and keys of a tokenized prompt. Raises RequestError for images that are none."""
        if not request.images or self._images is None:
            return Known(len(token_ids), block_keys(token_ids, block_size, request))
        ids = await asyncio.get_running_loop().run_in_executor(None, _content_ids, request.images)
        if ids is None:
            return Known(len(token_ids), block_keys(token_ids, block_size, request))
        expanded = self._images.expand(token_ids, ids)
        keys = keys_of(expanded, block_size, salt_of(lora_of(request)))
        return Known(max(len(token_ids), len(expanded.token_ids)), keys, ids)

    def learn(self, token_ids: Sequence[int], content_ids: Sequence[str], reported: int) -> None:
        """A worker reported how long a prompt with these images is."""
        if self._images is not None and content_ids:
            self._images.learn(token_ids, content_ids, reported)

    async def token_ids(self, request: GenerationRequest) -> list[int]:
        """The prompt as the engine will see it."""
        if not isinstance(request.prompt, str):
            return list(request.prompt)
        if len(request.prompt) < _OFF_LOOP_CHARS:
            return self._encode(request.prompt)
        return await asyncio.get_running_loop().run_in_executor(None, self._encode, request.prompt)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])


def block_keys(token_ids: list[int], block_size: int, request: GenerationRequest) -> Any:
    """Keys of a text's full blocks, uint64. Empty with images: a key of the tokens alone would credit blocks of another image."""
    if request.images:
        return np.empty(0, dtype=np.uint64)
    return hash_blocks(token_ids, block_size, salt_of(lora_of(request)))


def _content_ids(images: tuple[bytes, ...]) -> tuple[str, ...] | None:
    """None if one lies elsewhere: a router fetches nothing."""
    files = [inline_bytes(item) for item in images]
    return None if None in files else tuple(content_id(data) for data in files if data is not None)


def lora_of(request: GenerationRequest) -> str:
    """The adapter that the request asks for, or an empty string."""
    return str(request.sampling.get("lora_name") or "")


def load_placeholder(model: str) -> int | None:
    """The token id that stands for an image in prompts of a model by name or path; None if its configuration names none."""
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(model)
    except (OSError, ValueError):
        return None
    token = config.get("image_token_id", config.get("image_token_index"))
    return token if isinstance(token, int) else None


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of a model by name or path. Raises ConfigError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)  # type: ignore[no-any-return]
    except (OSError, ValueError) as exc:
        message = f"the router can't load the tokenizer of {model!r} ({exc}): set TANDEM_ROUTER_TOKENIZER to a folder that has it"
        raise ConfigError(message) from exc
