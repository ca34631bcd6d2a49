# SPDX-License-Identifier: Apache-2.0
"""From vLLM's outputs to the tensors of a response."""

import json
import math
from typing import Any

import numpy as np
import pytest

from fakes import FakeLogprob, FakeOutput, FakeSequence
from tandem_protocol import tensors
from tandem_protocol.errors import EngineError
from tandem_protocol.requests import GenerationRequest
from tandem_worker.responses import GenerationEncoder, encode_handoff

NUMPY = {"TYPE_STRING": np.object_, "TYPE_FP32": np.float32, "TYPE_UINT32": np.uint32, "TYPE_INT32": np.int32}


def encoder(*returns: str, n: int = 1, prepend: bool = False) -> GenerationEncoder:
    """The encoder of a request that asks for these outputs."""
    return GenerationEncoder(GenerationRequest("id", "p", (), True, prepend, {}, frozenset(returns), None, 0, None), n)


def full(**changes: Any) -> FakeOutput:
    """An output with something in every field."""
    sequence = FakeSequence(0, "Hi", [5, 6], -1.5, [{5: FakeLogprob(-1.0, 1, "H")}, {6: FakeLogprob(-0.5, 1, "i")}], "stop")
    return FakeOutput(**{"outputs": [sequence], "finished": True, "prompt": "Say: ", "prompt_token_ids": [1, 2, 3], "num_cached_tokens": 2,
                         **changes})


def test_text_alone_unless_asked_for_more() -> None:
    """Every tensor costs the stub time."""
    arrays = encoder().encode(full())
    assert list(arrays) == [tensors.TEXT_OUTPUT]
    assert arrays[tensors.TEXT_OUTPUT].tolist() == [b"Hi"]


def test_text_is_utf8() -> None:
    """Triton's strings are bytes."""
    assert encoder().encode(FakeOutput([FakeSequence(text="Grüße 🚲")]))[tensors.TEXT_OUTPUT].tolist() == ["Grüße 🚲".encode()]


def test_sequences_come_in_order_of_their_index() -> None:
    """Whatever order the engine finished them in."""
    output = FakeOutput([FakeSequence(2, "c"), FakeSequence(0, "a"), FakeSequence(1, "b")])
    assert encoder(n=3).encode(output)[tensors.TEXT_OUTPUT].tolist() == [b"a", b"b", b"c"]


def test_a_sequence_without_news_has_an_empty_delta() -> None:
    """Each per-sequence tensor keeps one element per sequence."""
    returns = (tensors.FINISH_REASON, tensors.CUMULATIVE_LOGPROB, tensors.LOGPROBS, tensors.NUM_OUTPUT_TOKENS, tensors.OUTPUT_IDS)
    arrays = encoder(*returns, n=3).encode(FakeOutput([FakeSequence(1, "b", [7], -0.25)]))
    assert arrays[tensors.TEXT_OUTPUT].tolist() == [b"", b"b", b""]
    assert arrays[tensors.FINISH_REASON].tolist() == [b"None"] * 3
    assert [math.isnan(value) for value in arrays[tensors.CUMULATIVE_LOGPROB]] == [True, False, True]
    assert arrays[tensors.LOGPROBS].tolist() == [b"null"] * 3
    assert arrays[tensors.NUM_OUTPUT_TOKENS].tolist() == [0, 1, 0]
    assert arrays[tensors.OUTPUT_IDS].tolist() == [7]


def test_the_prompt_is_prepended_to_every_sequence_of_the_first_response() -> None:
    """And never again."""
    encode = encoder(n=2, prepend=True).encode
    first = encode(FakeOutput([FakeSequence(0, "a")], prompt="Say: "))
    second = encode(FakeOutput([FakeSequence(0, "b"), FakeSequence(1, "c")], prompt="Say: "))
    assert first[tensors.TEXT_OUTPUT].tolist() == [b"Say: a", b"Say: "]
    assert second[tensors.TEXT_OUTPUT].tolist() == [b"b", b"c"]


def test_the_prompt_is_left_out_unless_asked_for() -> None:
    """`prepend_input` is the request's word."""
    assert encoder().encode(full())[tensors.TEXT_OUTPUT].tolist() == [b"Hi"]


def test_a_prompt_of_token_ids_prepends_nothing() -> None:
    """vLLM has no text of it."""
    assert encoder(prepend=True).encode(full(prompt=None))[tensors.TEXT_OUTPUT].tolist() == [b"Hi"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [(tensors.FINISH_REASON, [b"stop"]), (tensors.CUMULATIVE_LOGPROB, [-1.5]), (tensors.NUM_INPUT_TOKENS, [3]),
     (tensors.NUM_OUTPUT_TOKENS, [2]), (tensors.OUTPUT_IDS, [5, 6]), (tensors.NUM_CACHED_TOKENS, [2])],
)
def test_optional_outputs(name: str, expected: list[Any]) -> None:
    """Each reads its own field."""
    assert encoder(name).encode(full())[name].tolist() == expected


@pytest.mark.parametrize("spec", tensors.GENERATION_OUTPUTS, ids=lambda spec: spec.name)
def test_arrays_have_the_type_and_rank_of_the_contract(spec: tensors.TensorSpec) -> None:
    """Triton refuses a response whose type differs from the declared one."""
    arrays = encoder(*(output.name for output in tensors.OPTIONAL_OUTPUTS)).encode(full())
    assert arrays[spec.name].dtype == NUMPY[spec.data_type]
    assert arrays[spec.name].ndim == len(spec.dims)
    if spec.dims != (-1,):
        assert arrays[spec.name].shape == spec.dims


@pytest.mark.parametrize(("name", "expected"), [(tensors.NUM_INPUT_TOKENS, [0]), (tensors.NUM_CACHED_TOKENS, [0])])
def test_what_the_engine_leaves_out_counts_as_zero(name: str, expected: list[int]) -> None:
    """vLLM gives None where it has not counted."""
    assert encoder(name).encode(full(prompt_token_ids=None, num_cached_tokens=None))[name].tolist() == expected


def test_logprobs_have_the_shape_of_vllm_backend() -> None:
    """A list with one object per token: token id, as text, to logprob, rank and decoded token."""
    positions = [{5: FakeLogprob(-1.0, 1, "H"), 9: FakeLogprob(-2.0, 2, "Ü")}, {6: FakeLogprob(-0.5, None, None)}]
    arrays = encoder(tensors.LOGPROBS).encode(FakeOutput([FakeSequence(0, "Hi", [5, 6], logprobs=positions)]))
    assert json.loads(arrays[tensors.LOGPROBS][0]) == [
        {"5": {"logprob": -1.0, "rank": 1, "decoded_token": "H"}, "9": {"logprob": -2.0, "rank": 2, "decoded_token": "Ü"}},
        {"6": {"logprob": -0.5, "rank": None, "decoded_token": None}},
    ]


def test_without_logprobs_the_tensor_says_null() -> None:
    """As in vllm_backend."""
    assert encoder(tensors.LOGPROBS).encode(FakeOutput([FakeSequence()]))[tensors.LOGPROBS].tolist() == [b"null"]


def test_a_finish_reason_stays_once_it_is_known() -> None:
    """A sequence that ended early keeps its reason while the others go on."""
    encode = encoder(tensors.FINISH_REASON, n=2).encode
    outputs = [FakeOutput([FakeSequence(0), FakeSequence(1)]), FakeOutput([FakeSequence(0, finish_reason="stop"), FakeSequence(1)]),
               FakeOutput([FakeSequence(1, finish_reason="length")])]
    reasons = [encode(output)[tensors.FINISH_REASON].tolist() for output in outputs]
    assert reasons == [[b"None", b"None"], [b"stop", b"None"], [b"stop", b"length"]]


def test_a_prefill_answer_is_the_handoff_alone() -> None:
    """As compact JSON."""
    arrays = encode_handoff(full(kv_transfer_params={"do_remote_prefill": True, "block": [1]}))
    assert {name: array.tolist() for name, array in arrays.items()} == {
        tensors.KV_TRANSFER_PARAMS: [b'{"do_remote_prefill":true,"block":[1]}'],
    }


@pytest.mark.parametrize("params", [None, {}])
def test_prefill_without_a_handoff_is_the_engines_failure(params: dict[str, Any] | None) -> None:
    """Decode could do nothing with it."""
    with pytest.raises(EngineError, match="without a handoff"):
        encode_handoff(full(kv_transfer_params=params))
