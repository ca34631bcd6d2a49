# SPDX-License-Identifier: Apache-2.0
"""From vllm-omni's outputs to the tensors of one response: text as it grows, images as PNG, sound as WAV of what is new.

Pure: reads attributes of OmniRequestOutput (vllm-omni 0.30). The event loop makes an `OmniAnswer` of each output; those that wait for the
sender are merged, and the sender's thread encodes them, since compressing an image takes its time.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tandem_protocol import tensors
from tandem_protocol.errors import EngineError, RequestError, TandemError
from tandem_protocol.streams import Arrays
from tandem_worker.omni.media import DEFAULT_RATE_HZ, Samples, SoundReader, png, rate_hz, wav
from tandem_worker.omni.requests import OmniRequest

TEXT, IMAGE, AUDIO = MODALITIES = "text", "image", "audio"
_CLIENT_ERRORS = range(400, 500)


class StageOutput(Protocol):
    """What is read of OmniRequestOutput."""

    outputs: list[Any]
    images: list[Any]
    prompt_token_ids: list[int] | None
    stage_id: int | None
    final_output_type: str
    finished: bool
    error: str | None
    error_status_code: int | None

    @property
    def multimodal_output(self) -> Any:
        """Sound and its rate, by name."""


@dataclass
class Text:
    """What is new of a text, under the names of vLLM's CompletionOutput, by which requests are measured."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class OmniAnswer:
    """What is new of an answer, whichever stages made it. `finished`: nothing comes after it."""

    outputs: list[Text] = field(default_factory=list)
    """None or one."""
    images: list[Any] = field(default_factory=list)
    sound: list[Samples] = field(default_factory=list)
    rate: int = DEFAULT_RATE_HZ
    num_input_tokens: int = 0
    finish_reason: str | None = None
    finished: bool = False
    metrics: None = None
    """vLLM's time stamps, which a pipeline hasn't."""

    def add(self, next_output: "OmniAnswer", aggregate: bool = True) -> None:
        """Appends what came later."""
        del aggregate
        for later in next_output.outputs:
            if not self.outputs:
                self.outputs.append(Text())
            self.outputs[0].text += later.text
            self.outputs[0].token_ids.extend(later.token_ids)
        self.images.extend(next_output.images)
        self.sound.extend(next_output.sound)
        if next_output.sound:
            self.rate = next_output.rate
        self.num_input_tokens = self.num_input_tokens or next_output.num_input_tokens
        self.finish_reason = self.finish_reason or next_output.finish_reason  # the text's: a voice that comes after it just stops
        self.finished |= next_output.finished

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it has anything of."""
        has = ((TEXT, any(one.text or one.token_ids for one in self.outputs)), (IMAGE, self.images), (AUDIO, self.sound))
        return tuple(name for name, there in has if there)


class AnswerReader:
    """Reads the outputs of one request, in order. Those of a kind that isn't wanted come, too, when a later stage needs them."""

    def __init__(self, wanted: Collection[str]) -> None:
        self._unwanted = {kind for kind in MODALITIES if kind not in wanted}
        self._sound = SoundReader()
        self._num_input_tokens = 0

    def read(self, output: StageOutput) -> OmniAnswer:
        """What one output of a stage brings; a stage's end is not the request's. Raises what the stage reported."""
        if output.error:
            raise stage_error(output.error, output.error_status_code)
        if not output.stage_id:  # later stages read what others made
            self._num_input_tokens = self._num_input_tokens or len(output.prompt_token_ids or ())
        answer = OmniAnswer(num_input_tokens=self._num_input_tokens)
        if output.final_output_type not in self._unwanted:
            self._read_media(output, answer)
        return answer

    def _read_media(self, output: StageOutput, answer: OmniAnswer) -> None:
        """Only of a stage whose output is text its text counts: a talker's tokens are no words."""
        first = output.outputs[0] if output.outputs else None
        answer.finish_reason = getattr(first, "finish_reason", None)
        if output.final_output_type == TEXT and first is not None:
            answer.outputs = [Text(str(first.text or ""), list(first.token_ids or ()), answer.finish_reason)]
        if output.final_output_type == AUDIO:
            answer.sound = self._sound.read(output.multimodal_output)
            answer.rate = rate_hz(output.multimodal_output)
        answer.images = list(output.images)


def stage_error(sentence: str, status: int | None) -> TandemError:
    """By the status that vllm-omni gives it: whose fault it is."""
    return RequestError(sentence) if status in _CLIENT_ERRORS else EngineError(f"a stage failed on this request: {sentence}")


class OmniEncoder:
    """Encodes the answers of one request, in order; not thread-safe, one thread at a time.

    Shapes: `text_output` (1,), `image_output` (images,), `audio_output` (0 or 1,), `modality` (0 to 3,).
    """

    def __init__(self, request: OmniRequest) -> None:
        self._request = request
        self._before = request.prompt if request.prepend_input and isinstance(request.prompt, str) else ""
        self._sent = False
        self._finish_reason: str | None = None
        self._num_input_tokens = 0

    def encode(self, answer: OmniAnswer) -> Arrays:
        """The tensors of the next response; none for an end that brings nothing new after others."""
        self._finish_reason = self._finish_reason or answer.finish_reason
        self._num_input_tokens = self._num_input_tokens or answer.num_input_tokens
        if self._sent and answer.finished and not answer.modalities:
            return {}
        self._sent = True
        arrays = {
            tensors.TEXT_OUTPUT: _bytes([self._text(answer).encode()]),
            tensors.IMAGE_OUTPUT: _bytes([png(image) for image in answer.images]),
            tensors.AUDIO_OUTPUT: _bytes([wav(answer.sound, answer.rate)] if answer.sound else []),
            tensors.MODALITY: _bytes([name.encode() for name in answer.modalities]),
        }
        return {**arrays, **{name: self._optional(name, answer) for name in self._request.returns}}

    def _text(self, answer: OmniAnswer) -> str:
        """The prompt goes before a text, and only before one: an image has no words to continue."""
        text = "".join(one.text for one in answer.outputs)
        if TEXT not in answer.modalities:
            return text
        before, self._before = self._before, ""
        return before + text

    def _optional(self, name: str, answer: OmniAnswer) -> npt.NDArray[Any]:
        match name:
            case tensors.FINISH_REASON:
                return _bytes([str(self._finish_reason).encode()])
            case tensors.NUM_INPUT_TOKENS:
                return np.asarray([self._num_input_tokens], dtype=np.uint32)
            case tensors.NUM_OUTPUT_TOKENS:
                return np.asarray([sum(len(one.token_ids) for one in answer.outputs)], dtype=np.uint32)
        raise AssertionError(f"output {name} is declared in tandem_protocol.tensors but not encoded here")


def _bytes(items: list[bytes]) -> npt.NDArray[Any]:
    array = np.empty(len(items), np.object_)
    array[:] = items
    return array
