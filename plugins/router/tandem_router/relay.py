# SPDX-License-Identifier: Apache-2.0
"""What the router keeps of an answer while it passes it on: enough to merge deltas under back-pressure and to go on elsewhere.

Pure. An answer may be made of several legs: when a worker is lost, the prompt and the tokens so far become the prompt of
the next leg on another worker, and the client sees one stream.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tandem_protocol import tensors
from tandem_protocol.errors import UnavailableError
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.streams import Arrays

DEFAULT_MAX_TOKENS = 16
"""vLLM's own default of `max_tokens`."""
_STRUCTURED = frozenset({"structured_outputs", "guided_decoding", "guided_json", "guided_regex", "guided_choice", "guided_grammar"})


class Delta:
    """One response of a worker on its way to the client; `add` merges the next one into it."""

    def __init__(self, arrays: Arrays, *, finished: bool) -> None:
        self.arrays = arrays
        self.finished = finished

    def add(self, next_output: "Delta", aggregate: bool) -> None:
        """Merges a later response into this one: texts and tokens are appended, states are replaced."""
        for name, array in next_output.arrays.items():
            mine = self.arrays.get(name)
            self.arrays[name] = array if mine is None else _MERGE.get(name, _latest)(mine, array)
        self.finished = next_output.finished


def _latest(_: npt.NDArray[Any], later: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return later


def _first(mine: npt.NDArray[Any], _: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return mine


def _appended(mine: npt.NDArray[Any], later: npt.NDArray[Any]) -> npt.NDArray[Any]:
    merged = np.empty(len(mine), dtype=np.object_)
    merged[:] = [a + b for a, b in zip(mine, later, strict=True)]
    return merged


def _joined(mine: npt.NDArray[Any], later: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate([mine, later])


def _summed(mine: npt.NDArray[Any], later: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.add(mine, later)


def _lists_joined(mine: npt.NDArray[Any], later: npt.NDArray[Any]) -> npt.NDArray[Any]:
    merged = np.empty(len(mine), dtype=np.object_)
    merged[:] = [json.dumps([*(json.loads(a) or []), *(json.loads(b) or [])]).encode() for a, b in zip(mine, later, strict=True)]
    return merged


_MERGE = {
    tensors.TEXT_OUTPUT: _appended,
    tensors.OUTPUT_IDS: _joined,
    tensors.NUM_OUTPUT_TOKENS: _summed,
    tensors.LOGPROBS: _lists_joined,
    tensors.NUM_INPUT_TOKENS: _first,
    tensors.NUM_CACHED_TOKENS: _first,
}


@dataclass
class Answer:
    """The answer to one request so far, over all its legs."""

    request: GenerationRequest
    prompt_ids: list[int]
    tokens: list[int] = field(default_factory=list)
    legs: int = 0
    started: bool = False
    """Whether the client has got anything."""
    _cumulative: float = 0.0
    _last_cumulative: float = 0.0

    @property
    def resumable(self) -> bool:
        """Whether another worker can go on in the middle: one sequence, streamed, and no grammar that has state."""
        sampling = self.request.sampling
        return self.request.stream and int(sampling.get("n") or 1) == 1 and not _STRUCTURED & sampling.keys()

    def next_leg(self) -> GenerationRequest:
        """The request for the next leg. Raises UnavailableError where the stream can't be continued."""
        self.legs += 1
        if not self.started:
            return self._tracked(self.request)
        if not self.resumable:
            raise UnavailableError("the worker was lost in mid-stream, and n > 1 or guided decoding can't be continued elsewhere: retry")
        self._cumulative = self._last_cumulative
        sampling = dict(self.request.sampling)
        sampling["max_tokens"] = self._max_tokens(sampling) - len(self.tokens)
        if sampling.get("min_tokens"):
            sampling["min_tokens"] = max(0, int(sampling["min_tokens"]) - len(self.tokens))
        return self._tracked(replace(self.request, prompt=[*self.prompt_ids, *self.tokens], sampling=sampling))

    @property
    def complete(self) -> bool:
        """Whether the tokens so far are all that may come, so that only the end of the stream was lost."""
        return bool(self.tokens) and len(self.tokens) >= self._max_tokens(self.request.sampling)

    def receive(self, arrays: Arrays) -> Arrays:
        """Takes note of a response and returns it as the client asked for it."""
        ids = arrays.get(tensors.OUTPUT_IDS)
        self.started = self.started or bool(arrays)
        if ids is not None and self.resumable:
            self.tokens.extend(ids.tolist())
        self._correct(arrays)
        return {name: array for name, array in arrays.items() if name == tensors.TEXT_OUTPUT or name in self.request.returns}

    def _tracked(self, request: GenerationRequest) -> GenerationRequest:
        return replace(request, returns=request.returns | {tensors.OUTPUT_IDS}) if self.resumable else request

    def _correct(self, arrays: Arrays) -> None:
        """Counts of a later leg include the tokens of those before it."""
        if tensors.CUMULATIVE_LOGPROB in arrays:
            arrays[tensors.CUMULATIVE_LOGPROB] = arrays[tensors.CUMULATIVE_LOGPROB] + np.float32(self._cumulative)
            self._last_cumulative = float(arrays[tensors.CUMULATIVE_LOGPROB][0])
        if self.tokens and self.legs > 1 and tensors.NUM_INPUT_TOKENS in arrays:
            arrays[tensors.NUM_INPUT_TOKENS] = np.array([len(self.prompt_ids)], dtype=np.uint32)

    @staticmethod
    def _max_tokens(sampling: Mapping[str, Any]) -> int:
        given = sampling.get("max_tokens")
        return DEFAULT_MAX_TOKENS if given is None else int(given)
