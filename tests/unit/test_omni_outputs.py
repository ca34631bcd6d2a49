# SPDX-License-Identifier: Apache-2.0
"""Outputs of vllm-omni become tensors, over stand-ins of its outputs, and over its own where it is installed."""

import io
import wave
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fakes import reader
from omni_pipelines import Output, words
from tandem_protocol.errors import EngineError, RequestError
from tandem_protocol.requests import Envelope
from tandem_worker.omni.outputs import OmniAnswer, OmniEncoder, StageOutput, answer_of
from tandem_worker.omni.requests import parse_omni_request


def encoder(**given: Any) -> OmniEncoder:
    """Of a streamed request with these tensors more."""
    return OmniEncoder(parse_omni_request(reader({"text_input": "Say", "stream": [True], **given}), Envelope("r", {})))


def encoded(output: StageOutput, *, streamed: bool = True) -> dict[str, Any]:
    """The tensors of a request's only output."""
    return {name: list(array) for name, array in encoder().encode(answer_of(output, streamed=streamed)).items()}


def played(files: Any) -> tuple[int, np.ndarray]:
    """(Hz, samples) of the one WAV file of a response."""
    [file] = files
    with wave.open(io.BytesIO(file)) as read:
        assert (read.getnchannels(), read.getsampwidth()) == (1, 2)
        return read.getframerate(), np.frombuffer(read.readframes(read.getnframes()), "<i2") / 32767


def test_text_comes_as_it_grows() -> None:
    """Only of stages whose output is text: a talker's tokens are no words."""
    assert encoded(words("Pa", 5)) == {"text_output": [b"Pa"], "image_output": [], "audio_output": [], "modality": [b"text"]}
    spoken = encoded(Output("audio", outputs=[SimpleNamespace(text="<codec>", token_ids=[9], finish_reason=None)]))
    assert (spoken["text_output"], spoken["modality"]) == ([b""], [])


def test_asked_for_counts_and_reasons_come_with_the_text() -> None:
    """Tokens of this response, the reason once it is known."""
    told = encoder(return_finish_reason=[True], return_num_input_tokens=[True], return_num_output_tokens=[True])
    first, last = (told.encode(answer_of(output, streamed=True)) for output in (words("Pa", 5), words("ris", 6, 7, end="stop")))
    assert (list(first["finish_reason"]), first["num_input_tokens"].tolist(), first["num_output_tokens"].tolist()) == ([b"None"], [3], [1])
    assert (list(last["finish_reason"]), last["num_output_tokens"].tolist()) == ([b"stop"], [2])


def test_an_end_that_brings_nothing_is_no_response_of_its_own() -> None:
    """But of an answer without anything it is the one response."""
    end = OmniAnswer(finished=True)
    told = encoder()
    told.encode(answer_of(words("Pa", 5), streamed=True))
    assert told.encode(end) == {}
    assert list(encoder().encode(end)["text_output"]) == [b""]


def test_the_prompt_goes_before_a_text_only() -> None:
    """As the other models do where it is not excluded; an image has no words to continue."""
    request = {"stream": [False], "exclude_input_in_output": [False]}
    assert list(encoder(**request).encode(answer_of(words(" yes", 4), streamed=False))["text_output"]) == [b"Say yes"]
    painted = Output("image", images=[Image.new("RGB", (2, 2))])
    assert list(encoder(**request).encode(answer_of(painted, streamed=False))["text_output"]) == [b""]


def test_answers_that_wait_are_merged() -> None:
    """Text, images and sound one after the other; the last reason counts."""
    sound = {"audio": np.zeros(2, np.float32), "sr": 8000}
    whole = OmniAnswer()
    for output in (words("Pa", 5), words("ris", 6, end="stop"), Output("image", images=["i"]), Output("audio", multimodal_output=sound)):
        whole.add(answer_of(output, streamed=True))
    whole.add(OmniAnswer(finished=True))
    assert ([(one.text, one.token_ids) for one in whole.outputs], whole.images) == ([("Paris", [5, 6])], ["i"])
    assert (len(whole.sound), whole.rate, whole.finish_reason, whole.finished, whole.num_input_tokens) == (1, 8000, "stop", True, 3)
    assert whole.modalities == ("text", "image", "audio")


def test_images_are_png_files() -> None:
    """Every pixel as it was."""
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    response = encoded(Output("image", images=[image, image]))
    [first, _] = response["image_output"]
    assert first.startswith(b"\x89PNG")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(first))), np.asarray(image))
    assert response["modality"] == [b"image"]
    with pytest.raises(EngineError, match="can't be written as PNG"):
        encoded(Output("image", images=["no image"]))


def test_sound_is_one_wav_file_of_what_is_new() -> None:
    """Streamed: the latest chunk; else all of them. Louder than full scale is clipped."""
    chunks = [np.array([[0.0, 0.5]], np.float32), np.array([-0.5, 3.0], np.float32)]
    rate, samples = played(encoded(Output("audio", multimodal_output={"audio": chunks}))["audio_output"])
    assert rate == 24_000
    assert samples == pytest.approx([-0.5, 1.0], abs=1e-4)
    told = {"model_outputs": chunks, "sr": [None, np.array(44_100)]}
    rate, samples = played(encoded(Output("audio", multimodal_output=told), streamed=False)["audio_output"])
    assert rate == 44_100
    assert samples == pytest.approx([0.0, 0.5, -0.5, 1.0], abs=1e-4)


@pytest.mark.parametrize("payload", [{}, None, {"audio": None}, {"audio": []}, {"audio": [np.zeros(0, np.float32)]}])
def test_a_response_without_sound_has_no_file(payload: Any) -> None:
    """The last response of a stream often brings nothing more."""
    assert encoded(Output("audio", multimodal_output=payload))["audio_output"] == []


def test_sound_that_is_no_number_is_an_error() -> None:
    """Not a file of noise."""
    with pytest.raises(EngineError, match="not finite"):
        encoded(Output("audio", multimodal_output={"audio": np.array([np.nan])}))


@pytest.mark.parametrize(("status", "kind"), [(400, RequestError), (422, RequestError), (500, EngineError), (None, EngineError)])
def test_a_stages_error_is_whose_fault_it_is(status: int | None, kind: type[Exception]) -> None:
    """By the status that vllm-omni gives it."""
    with pytest.raises(kind, match="too long"):
        encoded(Output(error="the prompt is too long", error_status_code=status))


def test_vllm_omnis_own_outputs_are_read() -> None:
    """Where it is installed: text, image, sound and error by its own class."""
    outputs = pytest.importorskip("vllm_omni.outputs", exc_type=ImportError)
    torch = pytest.importorskip("torch")
    image: StageOutput = outputs.OmniRequestOutput.from_diffusion("r", [Image.new("RGB", (2, 2))])
    assert len(encoded(image, streamed=False)["image_output"]) == 1
    sound = outputs.OmniRequestOutput.from_diffusion("r", [], multimodal_output={"audio": [torch.zeros(1, 3), torch.ones(2)]},
                                                     final_output_type="audio")
    assert len(played(encoded(sound, streamed=False)["audio_output"])[1]) == 5
    with pytest.raises(RequestError, match="no"):
        encoded(outputs.OmniRequestOutput.from_error("r", "no", status_code=400))
