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
from tandem_router import wire

DEFAULT_MAX_TOKENS = 16
"""vLLM's own default of `max_tokens`."""
_STRUCTURED = frozenset({"structured_outputs", "guided_decoding", "guided_json", "guided_regex", "guided_choice", "guided_grammar"})


class Delta:
    """One response of a worker on its way to the client. Later ones are only noted by `add`; who sends makes one of them all."""

    def __init__(self, arrays: Arrays, *, finished: bool) -> None:
        self.finished = finished
        self._parts = [arrays]

    def add(self, next_output: "Delta", aggregate: bool) -> None:
        """Takes a later response into this one."""
        self._parts.extend(next_output._parts)  # noqa: SLF001 - of the same class
        self.finished = next_output.finished

    @property
    def arrays(self) -> Arrays:
        """The response that goes to the client: texts and tokens are appended, counts added, states the latest."""
        if len(self._parts) == 1:
            return self._parts[0]
        names = dict.fromkeys(name for part in self._parts for name in part)
        return {name: _MERGE.get(name, _latest)([part[name] for part in self._parts if name in part]) for name in names}


Parts = list[npt.NDArray[Any]]
"""One output of successive responses."""


def _latest(parts: Parts) -> npt.NDArray[Any]:
    return parts[-1]


def _first(parts: Parts) -> npt.NDArray[Any]:
    return parts[0]


def _appended(parts: Parts) -> npt.NDArray[Any]:
    """Texts, one per sequence of the request."""
    return wire.strings(*(b"".join(texts) for texts in zip(*parts, strict=True)))


def _joined(parts: Parts) -> npt.NDArray[Any]:
    return np.concatenate(parts)


def _summed(parts: Parts) -> npt.NDArray[Any]:
    total: npt.NDArray[Any] = np.sum(parts, axis=0, dtype=parts[0].dtype)
    return total


def _lists_joined(parts: Parts) -> npt.NDArray[Any]:
    return wire.strings(*(json.dumps([entry for text in texts for entry in json.loads(text) or []]).encode()
                          for texts in zip(*parts, strict=True)))


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

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self.resumable = self.request.stream and int(sampling.get("n") or 1) == 1 and not _STRUCTURED & sampling.keys()
        """Whether another worker can go on in the middle: one sequence, streamed, and no grammar that has state."""
        self._wanted = self.request.returns | {tensors.TEXT_OUTPUT}

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
        if tensors.CUMULATIVE_LOGPROB in arrays or self.legs > 1:
            self._correct(arrays)
        return {name: array for name, array in arrays.items() if name in self._wanted}

    def _tracked(self, request: GenerationRequest) -> GenerationRequest:
        """What we need to go on elsewhere, or else to count tokens; and to learn how long images are."""
        ours = {tensors.OUTPUT_IDS if self.resumable else tensors.NUM_OUTPUT_TOKENS}
        return replace(request, returns=request.returns | ours | ({tensors.NUM_INPUT_TOKENS} if request.images else set()))

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
