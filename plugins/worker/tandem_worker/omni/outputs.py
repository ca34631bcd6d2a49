# SPDX-License-Identifier: Apache-2.0
"""From vllm-omni's outputs to tensors: text as it grows, images as PNG, sound as WAV.

Pure: reads attributes of OmniRequestOutput (vllm-omni 0.30) and makes arrays. Every response has all tensors, empty where it carries
nothing: `text_output` shape (1,), `image` (images,) with a PNG file each, `audio` (0 or 1,) with a WAV file of the samples that are new
since the last response, 16 bits, one channel, at its own rate; `modality` (1,) says which of them a stage made.
"""

import io
import wave
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tandem_protocol.errors import EngineError, RequestError, TandemError
from tandem_protocol.streams import Arrays

TEXT, IMAGE, AUDIO, MODALITY = "text_output", "image", "audio", "modality"
DEFAULT_RATE_HZ = 24_000
"""Of models that don't tell theirs (Qwen-Omni): vllm-omni's own default."""
_FULL_SCALE = 32767
_CLIENT_ERRORS = range(400, 500)
_RATES = ("sr", "audio_sample_rate", "sample_rate", "sampling_rate")


class StageOutput(Protocol):
    """What is read of OmniRequestOutput."""

    outputs: list[Any]
    images: list[Any]
    final_output_type: str
    finished: bool
    error: str | None
    error_status_code: int | None
    multimodal_output: Any


class OmniEncoder:
    """Encodes the outputs of one request, in order; `streamed`: each output brings what is new, else the last brings all."""

    def __init__(self, *, streamed: bool) -> None:
        self._streamed = streamed

    def encode(self, output: StageOutput) -> Arrays:
        """The tensors of the next response. Raises what the stage reported."""
        if output.error:
            raise _error(output.error, output.error_status_code)
        payload = output.multimodal_output or {}
        sound = payload.get("audio") if isinstance(payload, Mapping) else getattr(payload, "audio", None)
        files = [] if output.final_output_type != AUDIO else self._sound(sound, payload)
        return {
            TEXT: _bytes([_text(output).encode()]),
            IMAGE: _bytes([png(image) for image in output.images]),
            AUDIO: _bytes(files),
            MODALITY: _bytes([output.final_output_type.encode()]),
        }

    def _sound(self, sound: Any, payload: Any) -> list[bytes]:
        """vllm-omni gathers a stream's chunks in a list, of which the last is new."""
        chunks = list(sound) if isinstance(sound, list | tuple) else [] if sound is None else [sound]
        taken = chunks[-1:] if self._streamed else chunks
        samples = [_samples(chunk) for chunk in taken]
        whole = np.concatenate(samples) if samples else np.zeros(0, np.float32)
        return [wav(whole, rate_hz(payload))] if len(whole) else []


def png(image: Any) -> bytes:
    """A PIL image as a file. Raises EngineError for what can't be one."""
    file = io.BytesIO()
    try:
        image.save(file, format="PNG")
    except (AttributeError, OSError, ValueError) as exc:
        raise EngineError(f"the pipeline made an image that can't be written as PNG: {exc}") from exc
    return file.getvalue()


def wav(samples: npt.NDArray[np.float32], rate: int) -> bytes:
    """Samples from -1 to 1 as a file; louder ones are clipped. Raises EngineError for samples that are no numbers."""
    if not np.isfinite(samples).all():
        raise EngineError("the pipeline made sound with samples that are not finite: look at the last stage's log")
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(rate)
        written.writeframes((np.clip(samples, -1.0, 1.0) * _FULL_SCALE).round().astype("<i2").tobytes())
    return file.getvalue()


def rate_hz(payload: Any) -> int:
    """Samples per second, as the stage tells it: a number, a tensor of one, or a list of those."""
    for name in _RATES:
        told = payload.get(name) if isinstance(payload, Mapping) else None
        if isinstance(told, Sequence):
            told = next((one for one in told if one is not None), None)
        if told is not None:
            return int(told.item() if hasattr(told, "item") else told)
    return DEFAULT_RATE_HZ


def _samples(chunk: Any) -> npt.NDArray[np.float32]:
    """Of a torch tensor on any device, or an array; channels are one after the other, as vllm-omni writes them."""
    if hasattr(chunk, "detach"):
        chunk = chunk.detach().cpu().float().numpy()
    return np.asarray(chunk, np.float32).reshape(-1)


def _text(output: StageOutput) -> str:
    return str(output.outputs[0].text or "") if output.final_output_type == "text" and output.outputs else ""


def _error(sentence: str, status: int | None) -> TandemError:
    return RequestError(sentence) if status in _CLIENT_ERRORS else EngineError(f"a stage failed on this request: {sentence}")


def _bytes(items: list[bytes]) -> npt.NDArray[Any]:
    array = np.empty(len(items), np.object_)
    array[:] = items
    return array
