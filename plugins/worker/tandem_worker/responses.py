# SPDX-License-Identifier: Apache-2.0
"""From vLLM's outputs to the output tensors of one response.

Pure: reads attributes of vLLM's RequestOutput and makes arrays; the edge turns those into Triton tensors. Shapes: every
per-sequence tensor has one element per requested sequence (`n`), in order; a sequence that produced nothing since the
last response has an empty delta.
"""

import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tandem_protocol import handoff, tensors
from tandem_protocol.errors import EngineError
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.streams import Arrays


class SequenceOutput(Protocol):
    """What is read of vLLM's CompletionOutput."""

    index: int
    text: str
    token_ids: Any
    cumulative_logprob: float | None
    logprobs: Any
    finish_reason: str | None


class EngineOutput(Protocol):
    """What is read of vLLM's RequestOutput."""

    prompt: str | None
    prompt_token_ids: list[int] | None
    outputs: list[Any]
    finished: bool
    num_cached_tokens: int | None
    kv_transfer_params: dict[str, Any] | None


class GenerationEncoder:
    """Encodes the outputs of one request, in order; not thread-safe, one thread at a time."""

    def __init__(self, request: GenerationRequest, n: int) -> None:
        self._request = request
        self._n = n
        self._first = True
        self._reasons: list[str | None] = [None] * n

    def encode(self, output: EngineOutput) -> Arrays:
        """The tensors of the next response."""
        by_index: list[SequenceOutput | None] = [None] * self._n
        for sequence in output.outputs:
            by_index[sequence.index] = sequence
            self._reasons[sequence.index] = sequence.finish_reason or self._reasons[sequence.index]
        arrays = {tensors.TEXT_OUTPUT: _strings([sequence.text if sequence else "" for sequence in by_index])}
        if self._first and self._request.prepend_input:
            prompt = output.prompt or ""
            arrays[tensors.TEXT_OUTPUT] = _strings([prompt + (sequence.text if sequence else "") for sequence in by_index])
        self._first = False
        for name in self._request.returns:
            arrays[name] = self._optional(name, output, by_index)
        return arrays

    def _optional(self, name: str, output: EngineOutput, by_index: list[SequenceOutput | None]) -> npt.NDArray[Any]:
        match name:
            case tensors.FINISH_REASON:
                return _strings([str(reason) for reason in self._reasons])
            case tensors.CUMULATIVE_LOGPROB:
                return np.asarray([_cumulative(sequence) for sequence in by_index], dtype=np.float32)
            case tensors.LOGPROBS:
                return _strings([_logprobs_json(sequence) for sequence in by_index])
            case tensors.NUM_INPUT_TOKENS:
                return np.asarray([len(output.prompt_token_ids or ())], dtype=np.uint32)
            case tensors.NUM_OUTPUT_TOKENS:
                return np.asarray([len(sequence.token_ids) if sequence else 0 for sequence in by_index], dtype=np.uint32)
            case tensors.OUTPUT_IDS:
                return np.asarray([token for sequence in by_index if sequence for token in sequence.token_ids], dtype=np.int32)
            case tensors.NUM_CACHED_TOKENS:
                return np.asarray([output.num_cached_tokens or 0], dtype=np.uint32)
        raise AssertionError(f"output {name} is declared in tandem_protocol.tensors but not encoded here")


def encode_handoff(output: EngineOutput, speculation: str = "", image_ids: tuple[str, ...] = ()) -> Arrays:
    """The one response of a prefill worker, which says how it speculates and which images it saw."""
    if not output.kv_transfer_params:
        raise EngineError("prefill finished without a handoff: the KV connector kept no blocks, look for its error in the log")
    ours: dict[str, Any] = {handoff.SPECULATION: speculation} if speculation else {}
    if image_ids:
        ours[handoff.IMAGE_IDS] = list(image_ids)
    return {tensors.KV_TRANSFER_PARAMS: _strings([handoff.encode({**output.kv_transfer_params, **ours})])}


def _strings(items: list[str] | list[bytes]) -> npt.NDArray[Any]:
    encoded = [item.encode() if isinstance(item, str) else item for item in items]
    return np.asarray(encoded, dtype=np.object_)


def _cumulative(sequence: SequenceOutput | None) -> float:
    if sequence is None or sequence.cumulative_logprob is None:
        return float("nan")
    return sequence.cumulative_logprob


def _logprobs_json(sequence: SequenceOutput | None) -> str:
    """`null` without logprobs, else a list with one object per token: token id -> logprob, rank, decoded_token."""
    if sequence is None or sequence.logprobs is None:
        return "null"
    return json.dumps([_token_logprobs(position) for position in sequence.logprobs])


def _token_logprobs(position: Mapping[int, Any]) -> dict[int, dict[str, Any]]:
    return {
        token_id: {"logprob": entry.logprob, "rank": entry.rank, "decoded_token": entry.decoded_token}
        for token_id, entry in position.items()
    }
