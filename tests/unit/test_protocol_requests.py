# SPDX-License-Identifier: Apache-2.0
"""Reading one Triton request."""

from typing import Any

import numpy as np
import pytest

from fakes import reader
from tandem_protocol import handoff, tensors
from tandem_protocol.errors import RequestError
from tandem_protocol.requests import Envelope, GenerationRequest, parse_request
from tandem_protocol.roles import Role

ANSWER = {"do_remote_prefill": True, "remote_engine_id": "e"}


def parse(inputs: dict[str, Any], role: Role = Role.AGGREGATED, parameters: dict[str, Any] | None = None, priority: int = 0,
          timeout_us: int = 0) -> GenerationRequest:
    """A request with these tensors and parameters."""
    return parse_request(reader(inputs), Envelope("id", parameters or {}, priority, timeout_us), role)


@pytest.mark.parametrize(
    ("inputs", "prompt"),
    [({"text_input": "Grüße"}, "Grüße"), ({"text_input": ""}, ""), ({"input_ids": [1, 2, 3]}, [1, 2, 3]),
     ({"input_ids": [[0, 5]]}, [0, 5])],
)
def test_the_prompt_is_text_or_token_ids(inputs: dict[str, Any], prompt: object) -> None:
    """Token ids come back as plain integers, whatever their shape."""
    assert parse(inputs).prompt == prompt


@pytest.mark.parametrize("inputs", [{}, {"text_input": "a", "input_ids": [1]}])
def test_the_prompt_is_given_exactly_once(inputs: dict[str, Any]) -> None:
    """Both or neither is a mistake of the client."""
    with pytest.raises(RequestError, match="either as text_input or as input_ids"):
        parse(inputs)


@pytest.mark.parametrize(("ids", "message"), [(np.zeros(0, np.int32), "is empty"), ([3, -1], "holds -1")])
def test_impossible_token_ids_are_refused(ids: Any, message: str) -> None:
    """Before the engine sees them."""
    with pytest.raises(RequestError, match=f"input_ids {message}"):
        parse({"input_ids": ids})


@pytest.mark.parametrize("name", ["text_input", "sampling_parameters"])
def test_text_must_be_utf8(name: str) -> None:
    """The message says where it breaks."""
    with pytest.raises(RequestError, match=f"{name} is not UTF-8 .* at byte 1"):
        parse({"text_input": "a", name: b"a\xff"})


@pytest.mark.parametrize(
    "inputs",
    [{"text_input": ["a", "b"]}, {"text_input": "a", "stream": [True, False]}, {"text_input": "a", "sampling_parameters": ["{}", "{}"]},
     {"text_input": np.zeros(0, np.object_)}, {"text_input": "a", "return_logprobs": [True, True]}],
)
def test_one_request_holds_one_prompt(inputs: dict[str, Any]) -> None:
    """Batches by tensor are refused, not cut."""
    with pytest.raises(RequestError, match="must hold exactly one element, got shape"):
        parse(inputs)


@pytest.mark.parametrize("text", ["{", "temperature=1", "nan,"])
def test_sampling_parameters_must_be_json(text: str) -> None:
    """The message shows how they look."""
    with pytest.raises(RequestError, match=r"is not JSON .*\"temperature\": 0.7"):
        parse({"text_input": "a", "sampling_parameters": text})


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("3", "int"), ("null", "NoneType"), ('"x"', "str")])
def test_sampling_parameters_must_be_an_object(text: str, kind: str) -> None:
    """Other JSON is named."""
    with pytest.raises(RequestError, match=f"must be a JSON object .* got {kind}"):
        parse({"text_input": "a", "sampling_parameters": text})


@pytest.mark.parametrize(
    ("inputs", "sampling"),
    [({}, {"max_tokens": 5}), ({"sampling_parameters": '{"temperature": 0}'}, {"temperature": 0}), ({"sampling_parameters": ""}, {}),
     ({"sampling_parameters": " "}, {}), ({"sampling_parameters": "{}"}, {})],
)
def test_request_parameters_count_only_without_the_tensor(inputs: dict[str, Any], sampling: dict[str, Any]) -> None:
    """As in Triton's vllm_backend: the two are never mixed."""
    assert parse({"text_input": "a", **inputs}, parameters={"max_tokens": 5}).sampling == sampling


@pytest.mark.parametrize(
    ("inputs", "stream", "prepend"),
    [({}, False, True), ({"stream": [True]}, True, False), ({"exclude_input_in_output": [True]}, False, False),
     ({"exclude_input_in_output": [False]}, False, True), ({"stream": [True], "exclude_input_in_output": [True]}, True, False)],
)
def test_the_prompt_is_prepended_unless_streamed_or_excluded(inputs: dict[str, Any], stream: bool, prepend: bool) -> None:
    """The defaults of Triton's vllm_backend."""
    request = parse({"text_input": "a", **inputs})
    assert (request.stream, request.prepend_input) == (stream, prepend)


def test_a_stream_cannot_carry_the_prompt() -> None:
    """The message is that of Triton's vllm_backend."""
    with pytest.raises(RequestError, match=r"When streaming, `exclude_input_in_output` = False is not allowed\."):
        parse({"text_input": "a", "stream": [True], "exclude_input_in_output": [False]})


@pytest.mark.parametrize("name", [spec.name for spec in tensors.OPTIONAL_OUTPUTS])
@pytest.mark.parametrize("asked", [True, False])
def test_optional_outputs_are_asked_for_by_flag(name: str, asked: bool) -> None:
    """False is as good as leaving the flag out."""
    assert parse({"text_input": "a", f"return_{name}": [asked]}).returns == ({name} if asked else frozenset())


@pytest.mark.parametrize(("timeout_us", "timeout_s"), [(0, None), (1_500_000, 1.5), (1, 1e-6)])
def test_the_timeout_is_in_microseconds(timeout_us: int, timeout_s: float | None) -> None:
    """Triton's 0 means none."""
    assert parse({"text_input": "a"}, timeout_us=timeout_us).timeout_s == timeout_s


def test_id_and_priority_are_taken_over() -> None:
    """They come from Triton, not from tensors."""
    request = parse({"text_input": "a"}, priority=3)
    assert (request.request_id, request.priority) == ("id", 3)


@pytest.mark.parametrize(("role", "expected"), [(Role.DECODE, ANSWER), (Role.AGGREGATED, None), (Role.PREFILL, None)])
def test_only_decode_reads_the_handoff(role: Role, expected: dict[str, Any] | None) -> None:
    """Other roles don't declare the tensor."""
    assert parse({"text_input": "a", "kv_transfer_params": handoff.encode(ANSWER)}, role).handoff == expected


def test_decode_works_without_a_handoff() -> None:
    """Then it serves like an aggregated worker."""
    assert parse({"text_input": "a"}, Role.DECODE).handoff is None


def test_a_bad_handoff_is_refused() -> None:
    """It is the client's to pass on unchanged."""
    with pytest.raises(RequestError, match="kv_transfer_params is not JSON"):
        parse({"text_input": "a", "kv_transfer_params": b"x"}, Role.DECODE)


def test_images_come_as_bytes_in_order() -> None:
    """They are decoded on the engine's side."""
    assert parse({"text_input": "a", "image": [b"one", b"two"]}).images == (b"one", b"two")
    assert parse({"text_input": "a"}).images == ()
