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
from tandem_worker.omni.outputs import MODALITIES, AnswerReader, OmniAnswer, OmniEncoder, StageOutput
from tandem_worker.omni.requests import parse_omni_request


def encoder(**given: Any) -> OmniEncoder:
    """Of a streamed request with these tensors more."""
    return OmniEncoder(parse_omni_request(reader({"text_input": "Say", "stream": [True], **given}), Envelope("r", {})))


def answer_of(output: StageOutput) -> OmniAnswer:
    """Of a request's only output."""
    return AnswerReader(MODALITIES).read(output)


def encoded(output: StageOutput) -> dict[str, Any]:
    """The tensors of a request's only output."""
    return {name: list(array) for name, array in encoder().encode(answer_of(output)).items()}


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
    first, last = (told.encode(answer_of(output)) for output in (words("Pa", 5), words("ris", 6, 7, end="stop")))
    assert (list(first["finish_reason"]), first["num_input_tokens"].tolist(), first["num_output_tokens"].tolist()) == ([b"None"], [3], [1])
    assert (list(last["finish_reason"]), last["num_output_tokens"].tolist()) == ([b"stop"], [2])


def test_an_end_that_brings_nothing_is_no_response_of_its_own() -> None:
    """But of an answer without anything it is the one response."""
    end = OmniAnswer(finished=True)
    told = encoder()
    told.encode(answer_of(words("Pa", 5)))
    assert told.encode(end) == {}
    assert list(encoder().encode(end)["text_output"]) == [b""]


def test_the_prompt_goes_before_a_text_only() -> None:
    """As the other models do where it is not excluded; an image has no words to continue."""
    request = {"stream": [False], "exclude_input_in_output": [False]}
    assert list(encoder(**request).encode(answer_of(words(" yes", 4)))["text_output"]) == [b"Say yes"]
    painted = Output("image", images=[Image.new("RGB", (2, 2))])
    assert list(encoder(**request).encode(answer_of(painted))["text_output"]) == [b""]


def test_answers_that_wait_are_merged() -> None:
    """Text, images and sound one after the other; the text's reason counts."""
    sound = {"audio": np.zeros(2, np.float32), "sr": 8000}
    whole = OmniAnswer()
    for output in (words("Pa", 5), words("ris", 6, end="stop"), Output("image", images=["i"]), Output("audio", multimodal_output=sound)):
        whole.add(answer_of(output))
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
    """Of one chunk, or of all that a list has more than before; louder than full scale is clipped."""
    chunks = [np.array([[0.0, 0.5]], np.float32), np.array([-0.5, 3.0], np.float32)]
    told = {"model_outputs": chunks, "sr": [None, np.array(44_100)]}
    rate, samples = played(encoded(Output("audio", multimodal_output=told))["audio_output"])
    assert rate == 44_100
    assert samples == pytest.approx([0.0, 0.5, -0.5, 1.0], abs=1e-4)
    assert played(encoded(Output("audio", multimodal_output={"audio": chunks[1]}))["audio_output"])[0] == 24_000


@pytest.mark.parametrize("payloads", [
    [[1.0], [2.0, 3.0], [4.0]],
    [[[1.0]], [[1.0], [2.0, 3.0], [4.0]]],
    [[1.0], [[1.0], [2.0, 3.0]], None, [[1.0], [2.0, 3.0], [], [4.0]]],
])
def test_no_chunk_of_a_stream_is_lost_or_comes_twice(payloads: list[Any]) -> None:
    """However many come at a time, and whether alone or in a growing list."""
    reader = AnswerReader(("audio",))
    heard = [reader.read(Output("audio", multimodal_output={"audio": _chunks(payload)})) for payload in payloads]
    assert np.concatenate([chunk for answer in heard for chunk in answer.sound]).tolist() == [1.0, 2.0, 3.0, 4.0]


def _chunks(payload: Any) -> Any:
    if payload is None or not isinstance(payload[0], list):
        return None if payload is None else np.asarray(payload, np.float32)
    return [np.asarray(chunk, np.float32) for chunk in payload]


def test_what_is_not_wanted_does_not_come() -> None:
    """A text that is only painted; but its errors do, and how long the prompt was."""
    reader = AnswerReader(("image",))
    unwanted = reader.read(words("Pa", 5, end="length"))
    assert (unwanted.modalities, unwanted.finish_reason) == ((), None)
    painted = reader.read(Output("image", images=["i"], stage_id=1))
    assert (painted.images, painted.num_input_tokens) == (["i"], 3)
    with pytest.raises(EngineError, match="no"):
        reader.read(Output(error="no"))


def test_the_reason_and_the_prompt_are_the_first_stages() -> None:
    """A voice that spoke a cut text has not been cut itself, and what it read is not what the client wrote."""
    reader, told = AnswerReader(MODALITIES), encoder(return_finish_reason=[True], return_num_input_tokens=[True])
    spoken = Output("audio", outputs=[SimpleNamespace(text="", token_ids=[], finish_reason="stop")],
                    multimodal_output={"audio": np.ones(1)}, prompt_token_ids=[9], stage_id=1)
    whole = OmniAnswer()
    for output in (words("Pa", 5, end="length"), spoken):
        answer = reader.read(output)
        whole.add(answer)
        response = told.encode(answer)
        assert (list(response["finish_reason"]), response["num_input_tokens"].tolist()) == ([b"length"], [3])
    assert (whole.finish_reason, whole.num_input_tokens) == ("length", 3)


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
    assert len(encoded(image)["image_output"]) == 1
    sound = outputs.OmniRequestOutput.from_diffusion("r", [], multimodal_output={"audio": [torch.zeros(1, 3), torch.ones(2)]},
                                                     final_output_type="audio")
    assert len(played(encoded(sound)["audio_output"])[1]) == 5
    with pytest.raises(RequestError, match="no"):
        encoded(outputs.OmniRequestOutput.from_error("r", "no", status_code=400))
