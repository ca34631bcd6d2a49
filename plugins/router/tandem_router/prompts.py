# SPDX-License-Identifier: Apache-2.0
"""From a prompt to token ids and block keys: with the workers' own tokenizer, so that the router's blocks are theirs."""

import asyncio
import logging
from typing import Any, Protocol

import numpy as np

from tandem_protocol.blocks import hash_blocks, salt_of
from tandem_protocol.errors import ConfigError
from tandem_protocol.requests import GenerationRequest

log = logging.getLogger(__name__)

_OFF_LOOP_CHARS = 4096
"""A longer text is tokenized in a thread: the tokenizer releases the GIL, and the other streams go on meanwhile."""


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers."""

    def __call__(self, text: str) -> Any:
        """Encodes a text with the special tokens that the model wants around it."""


class Prompts:
    """Tokenizes prompts of one model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

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
    """Keys of the prompt's full blocks, uint64. Empty with images: their hashes are made in the engine, and a text-only key would
    credit blocks of another image."""
    if request.images:
        return np.empty(0, dtype=np.uint64)
    return hash_blocks(token_ids, block_size, salt_of(lora_of(request)))


def lora_of(request: GenerationRequest) -> str:
    """The adapter that the request asks for, or an empty string."""
    return str(request.sampling.get("lora_name") or "")


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of a model by name or path. Raises ConfigError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)  # type: ignore[no-any-return]
    except (OSError, ValueError) as exc:
        message = f"the router can't load the tokenizer of {model!r} ({exc}): set TANDEM_ROUTER_TOKENIZER to a folder that has it"
        raise ConfigError(message) from exc
