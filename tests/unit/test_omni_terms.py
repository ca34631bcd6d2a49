# SPDX-License-Identifier: Apache-2.0
"""A request's tensors become a prompt, parameters of each stage, and wanted modalities, or a sentence that says the fix."""

from dataclasses import replace
from typing import Any

import pytest

from fakes import reader
from tandem_protocol import tensors
from tandem_protocol.errors import RequestError
from tandem_protocol.requests import Envelope
from tandem_protocol.roles import Role
from tandem_worker.omni.requests import OmniRequest, omni_prompt, parse_omni_request
from tandem_worker.omni.terms import Stage, StageKind, check_images, sampling_by_stage, wanted_modalities

TOKENS = {"temperature": float, "max_tokens": int | None, "seed": int | None, "stop": list[str] | None}
STEPS = {"num_inference_steps": int | None, "height": int | None, "seed": int | None, "guidance_scale": float | None}
THINKER = Stage(0, StageKind.LLM, "thinker", "text", TOKENS)
TALKER = Stage(1, StageKind.LLM, "talker", None, TOKENS)
PAINTER = Stage(2, StageKind.DIFFUSION, "", "image", STEPS)
STAGES = (THINKER, TALKER, PAINTER)


def parsed(**given: Any) -> OmniRequest:
    """A request with these tensors."""
    return parse_omni_request(reader(given), Envelope("r", {}))


def test_a_bare_name_is_meant_for_the_first_stage_that_has_it() -> None:
    """Those of other stages go by id or name, and every value is the declared type."""
    given = {"temperature": "0.5", "num_inference_steps": 4.0, "seed": 1,
             "stages": {"talker": {"temperature": 1, "seed": 2}, "2": {"seed": 3}}}
    assert sampling_by_stage(given, STAGES) == (
        {"temperature": 0.5, "seed": 1}, {"temperature": 1.0, "seed": 2}, {"num_inference_steps": 4, "seed": 3})


def test_what_is_not_given_is_left_to_the_stages() -> None:
    """Null is not given; a stage's own word counts over a bare one."""
    assert sampling_by_stage({}, STAGES) == ({}, {}, {})
    assert sampling_by_stage({"seed": None, "stages": {"0": {"seed": None}}}, STAGES) == ({}, {}, {})
    assert sampling_by_stage({"seed": 1, "stages": {"thinker": {"seed": 2}}}, STAGES)[0] == {"seed": 2}


def test_stages_may_come_as_text() -> None:
    """Triton's request parameters know no objects."""
    assert sampling_by_stage({"stages": '{"1": {"seed": 7}}'}, STAGES)[1] == {"seed": 7}


@pytest.mark.parametrize(("given", "sentence"), [
    ({"temprature": 1}, "no stage of this pipeline has a sampling parameter 'temprature': did you mean 'temperature'"),
    ({"zzz": 1}, "known are guidance_scale, height, max_tokens"),
    ({"n": 2}, "answers a request once, so send it several times"),
    ({"stages": {"2": {"temperature": 1}}}, "stage 2 has no sampling parameter 'temperature': known are"),
    ({"stages": {"vocoder": {}}}, r"stage 'vocoder', which is not there: this pipeline has stage 0 \(thinker\), .*, stage 2$"),
    ({"stages": [1]}, "must map stages to parameters"),
    ({"stages": "{"}, "is not JSON"),
    ({"max_tokens": "many"}, r"max_tokens='many' of stage 0 \(thinker\) is not valid"),
    ({"num_inference_steps": 0}, "num_inference_steps=0 of stage 2 is not valid: give at least 1"),
])
def test_each_mistake_has_its_sentence(given: dict[str, Any], sentence: str) -> None:
    """Nothing is dropped in silence."""
    with pytest.raises(RequestError, match=sentence):
        sampling_by_stage(given, STAGES)


def test_stages_of_one_name_are_told_apart_by_id() -> None:
    """A name that fits two is refused."""
    with pytest.raises(RequestError, match="several stages are called 'thinker': use their ids 0, 1"):
        sampling_by_stage({"stages": {"thinker": {}}}, (THINKER, Stage(1, StageKind.LLM, "thinker")))


def test_all_that_the_pipeline_makes_is_wanted_unless_some_is_named() -> None:
    """In the pipeline's order; what it doesn't make is refused."""
    assert wanted_modalities((), STAGES) == ("text", "image")
    assert wanted_modalities(("image",), STAGES) == ("image",)
    assert wanted_modalities(("image", "text"), STAGES) == ("text", "image")
    with pytest.raises(RequestError, match="makes no 'audio': ask in `modalities` for text, image"):
        wanted_modalities(("audio",), STAGES)


def test_images_that_nobody_would_look_at_are_refused() -> None:
    """Where the first stage takes none."""
    blind = replace(THINKER, takes_images=False)
    check_images(2, STAGES)
    check_images(0, (blind, PAINTER))
    with pytest.raises(RequestError, match=r"stage 0 \(thinker\) of this pipeline, .*, takes none: leave `image` out"):
        check_images(1, (blind, PAINTER))


def test_a_request_is_read_like_any_other() -> None:
    """With what only pipelines take."""
    request = parsed(text_input="a cat", modalities=["image"], negative_prompt="a dog", sampling_parameters='{"seed": 1}',
                     return_finish_reason=[True])
    assert (request.prompt, request.modalities, request.negative_prompt) == ("a cat", ("image",), "a dog")
    assert (request.sampling, request.returns, request.stream) == ({"seed": 1}, {"finish_reason"}, False)
    plain = parsed(input_ids=[1, 2], stream=[True])
    assert (plain.prompt, plain.modalities, plain.negative_prompt) == ([1, 2], (), None)


@pytest.mark.parametrize(("given", "sentence"), [
    ({}, "text_input or as input_ids"),
    ({"text_input": "a", "negative_prompt": ["b", "c"]}, "negative_prompt must hold exactly one element, got 2"),
    ({"text_input": "a", "modalities": [b"\xff"]}, "modalities is not UTF-8"),
])
def test_a_wrong_tensor_is_refused(given: dict[str, Any], sentence: str) -> None:
    """Before a stage is touched."""
    with pytest.raises(RequestError, match=sentence):
        parsed(**given)


def test_the_prompt_is_vllm_omnis() -> None:
    """Text or ids; one image alone, several as a list."""
    request = parsed(text_input="a cat", negative_prompt="a dog")
    assert omni_prompt(request, [], ("image",)) == {"prompt": "a cat", "negative_prompt": "a dog", "modalities": ["image"]}
    assert omni_prompt(parsed(input_ids=[3]), ["a"], ("text",)) == {
        "prompt_token_ids": [3], "modalities": ["text"], "multi_modal_data": {"image": "a"}}
    assert omni_prompt(request, ["a", "b"], ())["multi_modal_data"] == {"image": ["a", "b"]}


def test_every_optional_output_can_be_asked_for() -> None:
    """And what a request reads is what the model declares."""
    inputs = {spec.name for spec in tensors.inputs_of(Role.OMNI)}
    outputs = {spec.name for spec in tensors.outputs_of(Role.OMNI)}
    assert {name.removeprefix("return_") for name in inputs if name.startswith("return_")} < outputs
    assert {"text_input", "input_ids", "image", "stream", "sampling_parameters", "modalities", "negative_prompt"} < inputs
    assert tensors.is_decoupled(Role.OMNI)
