# SPDX-License-Identifier: Apache-2.0
"""Stages and outputs of vllm-omni, over stand-ins of its outputs, and over its own where it is installed."""

import io
import wave
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tandem_protocol.errors import ConfigError, EngineError, RequestError
from tandem_worker.omni.outputs import OmniEncoder, StageOutput
from tandem_worker.omni.stages import Stage, parse_stages, sampling_by_stage

THINKER = {"stage_id": 0, "devices": "0", "gpu_memory_utilization": 0.8, "default_sampling_params": {"temperature": 0.4, "max_tokens": 64}}
TALKER = {"stage_id": 1, "devices": "1", "gpu_memory_utilization": 0.8}
VOCODER = {"stage_id": 2, "devices": 0, "gpu_memory_utilization": 0.15}


@dataclass
class Output:
    """OmniRequestOutput, as far as it is read."""

    final_output_type: str = "text"
    outputs: list[Any] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    multimodal_output: Any = field(default_factory=dict)
    finished: bool = False
    error: str | None = None
    error_status_code: int | None = None


def played(files: Any) -> tuple[int, np.ndarray]:
    """(Hz, samples) of the one WAV file of a response."""
    [file] = files
    with wave.open(io.BytesIO(file)) as read:
        assert (read.getnchannels(), read.getsampwidth()) == (1, 2)
        return read.getframerate(), np.frombuffer(read.readframes(read.getnframes()), "<i2") / 32767


def test_the_stages_are_read() -> None:
    """In the order of their ids, with devices and defaults."""
    edges = [{"from": 0, "to": 1}, {"from": 1, "to": 2}]
    stages = parse_stages({"async_chunk": False, "stages": [VOCODER, THINKER, TALKER], "edges": edges})
    assert [stage.id for stage in stages] == [0, 1, 2]
    assert stages[0] == Stage(0, (0,), 0.8, {"temperature": 0.4, "max_tokens": 64})
    assert parse_stages({"stages": [{"stage_id": 0, "devices": "0, 1"}]})[0].devices == (0, 1)
    assert parse_stages({"base_config": "other.yaml"}) == ()


@pytest.mark.parametrize(("config", "sentence"), [
    ([], "must be a YAML mapping"),
    ({}, "has no stages"),
    ({"stage_args": []}, "`stage_args` is the stage configuration of vllm-omni before"),
    ({"stage": []}, "unknown key 'stage' .*: did you mean 'stages'"),
    ({"stages": {}, "model_runner": "v3"}, "model_runner 'v3' does not exist: use v1 or v2"),
    ({"stages": "0"}, "must be a list"),
    ({"stages": [{}]}, "a mapping with a stage_id"),
    ({"stages": [{"stage_id": "0"}]}, "stage_id '0' does not work"),
    ({"stages": [THINKER, {**TALKER, "stage_id": 0}]}, "stage_id 0 is given twice"),
    ({"stages": [{**THINKER, "devices": "cuda:0"}]}, "devices 'cuda:0' of stage 0 does not work"),
    ({"stages": [{**THINKER, "devices": "0,0"}]}, "names a GPU twice"),
    ({"stages": [{**THINKER, "gpu_memory_utilization": 1.2}]}, "gpu_memory_utilization 1.2 of stage 0"),
    ({"stages": [THINKER, {**TALKER, "devices": "0"}]}, r"stages on GPU 0 want more than its memory \(stage 0 0.8, stage 1 0.8\)"),
    ({"stages": [{**THINKER, "default_sampling_params": [1]}]}, "default_sampling_params of stage 0 must be a mapping"),
    ({"stages": [THINKER], "edges": [{"from": 0, "to": 1}]}, "an edge leads to stage 1, which is not there: stages are 0"),
    ({"stages": [THINKER], "edges": [[0, 1]]}, "an edge is a mapping with from and to"),
    ({"stages": [THINKER, TALKER], "edges": [{"from": 0, "to": 1}, {"from": 1, "to": 0}]}, "the edges lead in a circle"),
])
def test_each_mistake_has_its_sentence(config: Any, sentence: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(ConfigError, match=sentence):
        parse_stages(config)


def test_a_requests_sampling_parameters_reach_their_stages() -> None:
    """Plain ones the first stage, those by id theirs, over the stages' own defaults."""
    stages = parse_stages({"stages": [THINKER, TALKER]})
    assert sampling_by_stage({"temperature": 0, "stages": {"1": {"seed": 7}}}, stages) == (
        {"temperature": 0, "max_tokens": 64}, {"seed": 7})
    assert sampling_by_stage({}, stages) == ({"temperature": 0.4, "max_tokens": 64}, {})
    assert sampling_by_stage({"seed": 1, "stages": {0: {"seed": 2}}}, stages)[0]["seed"] == 2
    with pytest.raises(RequestError, match="for stage 5, which is not there: stages are 0, 1"):
        sampling_by_stage({"stages": {"5": {}}}, stages)
    with pytest.raises(RequestError, match="must map stage ids to parameters"):
        sampling_by_stage({"stages": [1]}, stages)


def test_text_comes_as_it_grows() -> None:
    """Only of stages whose output is text: a talker's tokens are no words."""
    encoder = OmniEncoder(streamed=True)
    arrays = encoder.encode(Output(outputs=[SimpleNamespace(text="Pa")]))
    assert {name: list(array) for name, array in arrays.items()} == {
        "text_output": [b"Pa"], "image": [], "audio": [], "modality": [b"text"]}
    spoken = encoder.encode(Output("audio", outputs=[SimpleNamespace(text="<codec>")]))
    assert list(spoken["text_output"]) == [b""]


def test_images_are_png_files() -> None:
    """Every pixel as it was."""
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    [first, _] = OmniEncoder(streamed=False).encode(Output("image", images=[image, image]))["image"]
    assert first.startswith(b"\x89PNG")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(first))), np.asarray(image))
    with pytest.raises(EngineError, match="can't be written as PNG"):
        OmniEncoder(streamed=False).encode(Output("image", images=["no image"]))


def test_sound_is_one_wav_file_of_what_is_new() -> None:
    """Streamed: the latest chunk; else all of them. Louder than full scale is clipped."""
    chunks = [np.array([[0.0, 0.5]], np.float32), np.array([-0.5, 3.0], np.float32)]
    rate, samples = played(OmniEncoder(streamed=True).encode(Output("audio", multimodal_output={"audio": chunks}))["audio"])
    assert rate == 24_000
    assert samples == pytest.approx([-0.5, 1.0], abs=1e-4)
    told = {"audio": chunks, "sr": [None, np.array(44_100)]}
    rate, samples = played(OmniEncoder(streamed=False).encode(Output("audio", multimodal_output=told))["audio"])
    assert rate == 44_100
    assert samples == pytest.approx([0.0, 0.5, -0.5, 1.0], abs=1e-4)


@pytest.mark.parametrize("payload", [{}, {"audio": None}, {"audio": []}, {"audio": [np.zeros(0, np.float32)]}])
def test_a_response_without_sound_has_no_file(payload: dict[str, Any]) -> None:
    """The last response of a stream often brings nothing more."""
    assert list(OmniEncoder(streamed=True).encode(Output("audio", multimodal_output=payload))["audio"]) == []


def test_sound_that_is_no_number_is_an_error() -> None:
    """Not a file of noise."""
    with pytest.raises(EngineError, match="not finite"):
        OmniEncoder(streamed=True).encode(Output("audio", multimodal_output={"audio": np.array([np.nan])}))


@pytest.mark.parametrize(("status", "kind"), [(400, RequestError), (422, RequestError), (500, EngineError), (None, EngineError)])
def test_a_stages_error_is_whose_fault_it_is(status: int | None, kind: type[Exception]) -> None:
    """By the status that vllm-omni gives it."""
    with pytest.raises(kind, match="too long"):
        OmniEncoder(streamed=True).encode(Output(error="the prompt is too long", error_status_code=status))


def test_vllm_omnis_own_outputs_are_read() -> None:
    """Where it is installed: text, image, sound and error by its own class."""
    outputs = pytest.importorskip("vllm_omni.outputs", exc_type=ImportError)
    torch = pytest.importorskip("torch")
    encoder = OmniEncoder(streamed=False)
    image: StageOutput = outputs.OmniRequestOutput.from_diffusion("r", [Image.new("RGB", (2, 2))])
    assert len(encoder.encode(image)["image"]) == 1
    sound = outputs.OmniRequestOutput.from_diffusion("r", [], multimodal_output={"audio": [torch.zeros(1, 3), torch.ones(2)]},
                                                     final_output_type="audio")
    assert len(played(encoder.encode(sound)["audio"])[1]) == 5
    with pytest.raises(RequestError, match="no"):
        encoder.encode(outputs.OmniRequestOutput.from_error("r", "no", status_code=400))


def test_vllm_omnis_own_configurations_are_taken() -> None:
    """Where it is installed: every deploy configuration that it ships."""
    vllm_omni = pytest.importorskip("vllm_omni", exc_type=ImportError)
    yaml = pytest.importorskip("yaml")
    folder = Path(vllm_omni.__file__).parent / "deploy"
    refused = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            parse_stages(yaml.safe_load(path.read_text()))
        except ConfigError as exc:
            refused[path.name] = str(exc)
    assert refused == {}
