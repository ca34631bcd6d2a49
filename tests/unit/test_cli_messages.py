# SPDX-License-Identifier: Apache-2.0
"""Requests and responses as they cross the wire."""

import json

import pytest

from fake_triton import delta
from tandem_cli.messages import Delta, GenerationRequest, decode, encode, encode_abort
from tandem_protocol import tensors
from tandem_protocol.errors import RequestError

DATA_TYPES = {"TYPE_STRING": "BYTES", "TYPE_BOOL": "BOOL", "TYPE_INT32": "INT32"}


@pytest.mark.parametrize("prompt", ["héllo", (1, 2, 3)])
def test_every_input_is_one_of_the_contract(prompt: str | tuple[int, ...]) -> None:
    """Names, types and numbers of dimensions are those that workers declare."""
    declared = {spec.name: spec for spec in tensors.REQUEST_INPUTS}
    message = encode(GenerationRequest("vllm", prompt, returns=tuple(spec.name for spec in tensors.OPTIONAL_OUTPUTS)))
    for tensor in message.inputs:
        assert tensor.datatype == DATA_TYPES[declared[tensor.name].data_type]
        assert len(tensor.shape) == len(declared[tensor.name].dims)


def test_text_request_carries_prompt_sampling_and_flags() -> None:
    """A default request also suits Triton's vllm_backend: none of Tandem's additions is in it."""
    message = encode(GenerationRequest("vllm", "héllo", {"max_tokens": 3}, stream=False, request_id="r1"))
    inputs = {tensor.name: tensor.contents for tensor in message.inputs}
    assert (message.model_name, message.id) == ("vllm", "r1")
    assert inputs["text_input"].bytes_contents[0].decode() == "héllo"
    assert json.loads(inputs["sampling_parameters"].bytes_contents[0]) == {"max_tokens": 3}
    assert (inputs["stream"].bool_contents[0], inputs["exclude_input_in_output"].bool_contents[0]) == (False, True)
    assert set(inputs) == {"text_input", "sampling_parameters", "stream", "exclude_input_in_output", "return_finish_reason",
                           "return_num_input_tokens", "return_num_output_tokens"}


def test_token_ids_go_in_place_of_text() -> None:
    """A tokenized prompt is `input_ids`, and there is no text beside it."""
    inputs = {tensor.name: tensor for tensor in encode(GenerationRequest("vllm", (7, 8, 9))).inputs}
    assert list(inputs["input_ids"].contents.int_contents) == [7, 8, 9]
    assert "text_input" not in inputs


def test_abort_is_a_parameter_without_inputs() -> None:
    """The abort has an id of its own, so that it is not taken for the request that it ends."""
    message = encode_abort("decode", "r1")
    assert message.parameters["abort"].string_param == "r1"
    assert message.id != "r1"
    assert not message.inputs


def test_requests_get_ids_of_their_own() -> None:
    """Two requests never share an id by default."""
    assert GenerationRequest("vllm", "a").request_id != GenerationRequest("vllm", "a").request_id


def test_unknown_output_is_refused_with_the_known_ones() -> None:
    """A misspelt output fails before anything is sent."""
    with pytest.raises(RequestError, match=r"'logprob'.*logprobs"):
        GenerationRequest("vllm", "a", returns=("logprob",))


def test_prompt_that_is_no_unicode_is_refused() -> None:
    """Bytes of a command line that are not UTF-8 arrive as lone surrogates."""
    with pytest.raises(RequestError, match="character 1"):
        encode(GenerationRequest("vllm", "a\udcff"))


def test_delta_reads_what_was_asked_for() -> None:
    """Text, reason and counts come from their tensors."""
    read = decode(delta("hé", finish_reason="length", tokens=2, final=True).infer_response)
    assert (read.text, read.finish_reason, read.num_input_tokens, read.num_output_tokens, read.final) == ("hé", "length", 5, 2, True)


def test_empty_final_delta_has_no_values() -> None:
    """The response that only carries the FINAL flag reads as nothing, not as zero tokens."""
    read = decode(delta(final=True).infer_response)
    assert read == Delta({}, final=True)
    assert (read.text, read.output_ids, read.finish_reason, read.num_output_tokens) == ("", (), None, None)
