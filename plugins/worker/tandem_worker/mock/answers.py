# SPDX-License-Identifier: Apache-2.0
"""A mock worker's answer to one request: tokens collect here until the sender is free, then travel together.

Also the mock's text: a token reads `t<id> `, so the text of a sequence is that of its parts. A prompt given as text becomes the
bytes of its UTF-8; the mock has no tokenizer.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tandem_protocol.errors import RequestError, TandemError
from tandem_protocol.requests import GenerationRequest
from tandem_worker.mock.sequences import EngineOutput
from tandem_worker.mock.tokens import Tokens

_DEFAULT_MAX_TOKENS = 16


@dataclass
class MockSequence:
    """As vLLM's CompletionOutput, as far as `tandem_worker.responses` reads it."""

    text: str
    token_ids: Any
    finish_reason: str | None
    index: int = 0
    cumulative_logprob: float | None = None
    logprobs: Any = None


@dataclass
class MockOutput:
    """As vLLM's RequestOutput: the tokens since the last one."""

    prompt: str | None
    prompt_token_ids: list[int] | None
    outputs: list[Any]
    finished: bool
    num_cached_tokens: int | None
    kv_transfer_params: dict[str, Any] | None = None


@dataclass
class Answer:
    """Tokens of one request on their way to its sender. At most `max_tokens` are ever pending. One event loop."""

    prompt_text: str | None
    prompt_length: int
    cached_tokens: int = 0
    _pending: list[int] = field(default_factory=list)
    _finished: bool = False
    _error: TandemError | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def push(self, output: EngineOutput) -> None:
        """Adds a token."""
        self.cached_tokens = output.cached_tokens
        self._pending.append(output.token_id)
        self._finished = output.finished
        self._changed.set()

    def fail(self, error: TandemError) -> None:
        """Ends the answer; tokens that are pending are lost, as with a worker that dies."""
        self._error = error
        self._changed.set()

    async def take(self) -> MockOutput:
        """All tokens since the last call; waits for one. Raises what `fail` was given. The caller bounds the wait."""
        await self._changed.wait()
        self._changed.clear()
        if self._error is not None:
            raise self._error
        tokens, self._pending = tuple(self._pending), []
        text = "".join(map(text_of, tokens))
        sequence = MockSequence(text, tokens, "length" if self._finished else None)
        return MockOutput(self.prompt_text, [0] * self.prompt_length, [sequence], self._finished, self.cached_tokens)


def joined(outputs: list[MockOutput]) -> MockOutput:
    """Consecutive parts of an answer as one."""
    last, parts = outputs[-1], [output.outputs[0] for output in outputs]
    tokens = tuple(token for part in parts for token in part.token_ids)
    sequence = MockSequence("".join(part.text for part in parts), tokens, parts[-1].finish_reason)
    return MockOutput(last.prompt, last.prompt_token_ids, [sequence], last.finished, last.num_cached_tokens)


def text_of(token: int) -> str:
    """The mock's text of a token."""
    return f"t{token} "


def prompt_tokens(request: GenerationRequest) -> Tokens:
    """The prompt as INT32 token ids."""
    raw: Any = np.frombuffer(request.prompt.encode(), dtype=np.uint8) if isinstance(request.prompt, str) else request.prompt
    return np.asarray(raw, dtype=np.int32)


def max_tokens_of(request: GenerationRequest) -> int:
    """How many tokens it asks for. Every other sampling parameter is accepted and changes nothing, but for `n`."""
    try:
        wanted, sequences = int(request.sampling.get("max_tokens") or _DEFAULT_MAX_TOKENS), int(request.sampling.get("n") or 1)
    except (TypeError, ValueError) as exc:
        raise RequestError(f"max_tokens and n must be whole numbers ({exc})") from exc
    if sequences != 1:
        raise RequestError(f"n={sequences}: the mock generates one sequence per request, leave n out")
    return wanted
