# SPDX-License-Identifier: Apache-2.0
"""Images as PNG files and sound as WAV files. Pure, over what stages make: PIL images, and tensors or arrays of samples."""

import io
import wave
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tandem_protocol.errors import EngineError

Samples = npt.NDArray[np.float32]
"""From -1 to 1, shape (samples,)."""
DEFAULT_RATE_HZ = 24_000
"""Of models that don't tell theirs (Qwen-Omni): vllm-omni's own default."""
_FULL_SCALE = 32767
_RATES = ("sr", "audio_sample_rate", "sample_rate", "sampling_rate")
_SOUNDS = ("audio", "model_outputs")


def png(image: Any) -> bytes:
    """A PIL image as a file. Raises EngineError for what can't be one."""
    file = io.BytesIO()
    try:
        image.save(file, format="PNG")
    except (AttributeError, OSError, ValueError) as exc:
        raise EngineError(f"the pipeline made an image that can't be written as PNG: {exc}") from exc
    return file.getvalue()


def wav(chunks: Sequence[Samples], rate: int) -> bytes:
    """Chunks one after the other as a file of one channel, 16 bits; louder than full scale is clipped.

    Raises EngineError for samples that are no numbers.
    """
    samples = np.concatenate(chunks)
    if not np.isfinite(samples).all():
        raise EngineError("the pipeline made sound with samples that are not finite: look at the last stage's log")
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(rate)
        written.writeframes((np.clip(samples, -1.0, 1.0) * _FULL_SCALE).round().astype("<i2").tobytes())
    return file.getvalue()


class SoundReader:
    """Takes what is new of the sound in a stage's payloads, in their order; chunks without samples are none.

    One chunk is new as a whole; a list holds all chunks so far (vllm-omni's own endpoint reads them so).
    """

    def __init__(self) -> None:
        self._seen = 0

    def read(self, payload: Any) -> list[Samples]:
        """The next payload's."""
        given = payload if isinstance(payload, Mapping) else {}
        sound = next((given[name] for name in _SOUNDS if given.get(name) is not None), None)
        if isinstance(sound, list | tuple):
            new, self._seen = sound[self._seen:], len(sound)
        else:
            new = () if sound is None else (sound,)
            self._seen += len(new)
        return [samples for samples in map(_samples, new) if len(samples)]


def rate_hz(payload: Any) -> int:
    """Samples per second, as the stage tells it: a number, a tensor of one, or a list of those, of which the first that is one counts."""
    for name in _RATES:
        told = payload.get(name) if isinstance(payload, Mapping) else None
        if isinstance(told, list | tuple):
            told = next((one for one in told if one is not None), None)
        if told is not None:
            return int(told.item() if hasattr(told, "item") else told)
    return DEFAULT_RATE_HZ


def _samples(chunk: Any) -> Samples:
    """Of a torch tensor on any device, or an array; channels are one after the other, as vllm-omni writes them."""
    if hasattr(chunk, "detach"):
        chunk = chunk.detach().cpu().float().numpy()
    return np.asarray(chunk, np.float32).reshape(-1)
