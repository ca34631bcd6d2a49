# SPDX-License-Identifier: Apache-2.0
"""From a request's sampling parameters to vLLM's."""

from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import RequestOutputKind, SamplingParams

from tandem_protocol import handoff
from tandem_protocol.errors import RequestError
from tandem_worker.sampling import generation_params, parse_sampling, prefill_params


def build(given: dict[str, Any], **leg: Any) -> SamplingParams:
    """vLLM's parameters of an aggregated leg."""
    return generation_params(parse_sampling(given), **{"stream": False, "detokenize": True, "stream_interval": 1, **leg})


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [("max_tokens", "16", 16), ("max_tokens", 16.0, 16), ("temperature", "0.5", 0.5), ("temperature", 1, 1.0), ("top_p", "0.9", 0.9),
     ("ignore_eos", "true", True), ("ignore_eos", 1, True), ("seed", "7", 7), ("stop_token_ids", ["1", 2.0], [1, 2]), ("n", "2", 2),
     ("logprobs", "3", 3), ("stop", "end", ["end"]), ("stop", ["a", "b"], ["a", "b"]), ("logit_bias", {"5": "1"}, {5: 1.0})],
)
def test_values_are_coerced_to_the_declared_type(name: str, given: Any, value: object) -> None:
    """HTTP and gRPC clients send numbers as strings, or integers as floats."""
    built = getattr(build({"temperature": 1.0, name: given}), name)
    assert built == value
    assert type(built) is type(value)


@pytest.mark.parametrize(
    ("name", "given"),
    [("max_tokens", "many"), ("max_tokens", 1.5), ("temperature", "hot"), ("ignore_eos", "perhaps"), ("stop_token_ids", ["x"]),
     ("priority", "high"), ("n", [1])],
)
def test_values_of_the_wrong_type_are_refused(name: str, given: Any) -> None:
    """The message names parameter and value."""
    with pytest.raises(RequestError, match=f"sampling parameter {name}=.* is not valid"):
        parse_sampling({name: given})


@pytest.mark.parametrize(
    ("name", "hint"),
    [("max_token", "did you mean 'max_tokens'"), ("temprature", "did you mean 'temperature'"), ("guided_jsn", "did you mean 'guided_json'"),
     ("xyzzy", "see vLLM's SamplingParams"), ("_eos_token_id", "")],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, hint: str) -> None:
    """A typo must not be ignored."""
    with pytest.raises(RequestError, match=f"unknown sampling parameter '{name}': {hint}"):
        parse_sampling({name: 1})


@pytest.mark.parametrize("name", ["output_kind", "detokenize", "extra_args", "stream_interval", "skip_clone"])
def test_what_the_worker_sets_itself_is_not_for_clients(name: str) -> None:
    """A client could turn the stream into something that the worker can't encode."""
    with pytest.raises(RequestError, match=f"unknown sampling parameter '{name}'"):
        parse_sampling({name: 1})


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [("guided_json", {"type": "object"}, "json"), ("guided_regex", "[0-9]+", "regex"), ("guided_choice", ["a", "b"], "choice"),
     ("guided_grammar", 'root ::= "a"', "grammar")],
)
def test_guided_forms_become_structured_outputs(name: str, value: Any, field: str) -> None:
    """The names that vLLM had before."""
    structured = build({name: value}).structured_outputs
    assert structured is not None
    assert getattr(structured, field) == value


def test_a_choice_may_come_as_json_text() -> None:
    """Triton's request parameters know no lists."""
    structured = build({"guided_choice": '["yes", "no"]'}).structured_outputs
    assert structured is not None
    assert structured.choice == ["yes", "no"]


@pytest.mark.parametrize("name", ["structured_outputs", "guided_decoding"])
@pytest.mark.parametrize("value", [{"regex": "[0-9]+"}, '{"regex": "[0-9]+"}'])
def test_structured_outputs_come_as_object_or_text(name: str, value: Any) -> None:
    """Under vLLM's new and old name."""
    structured = build({name: value}).structured_outputs
    assert structured is not None
    assert structured.regex == "[0-9]+"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("structured_outputs", "{", "is not JSON"), ("structured_outputs", [], "must be an object"),
     ("guided_decoding", {}, "must be an object"), ("guided_decoding", {"regexp": "x"}, "must be an object"),
     ("guided_choice", "yes", "is not JSON")],
)
def test_malformed_structured_outputs_are_refused(name: str, value: Any, message: str) -> None:
    """The message names the parameter."""
    with pytest.raises(RequestError, match=f"{name} {message}"):
        parse_sampling({name: value})


def test_two_constraints_at_once_are_refused() -> None:
    """vLLM takes one; its own message is passed on."""
    with pytest.raises(RequestError, match="sampling parameters are not valid"):
        build({"guided_regex": "a", "guided_choice": ["a"]})


@pytest.mark.parametrize(("given", "expected"), [({"lora_name": "french"}, "french"), ({"lora_name": None}, None), ({}, None)])
def test_lora_name_is_taken_out(given: dict[str, Any], expected: str | None) -> None:
    """It chooses the adapter and is no parameter of vLLM's."""
    sampling = parse_sampling(given)
    assert sampling.lora_name == expected
    assert sampling.values == {}


@pytest.mark.parametrize(("given", "expected"), [({"priority": "5"}, 5), ({"priority": 5.0}, 5), ({}, None)])
def test_priority_is_taken_out(given: dict[str, Any], expected: int | None) -> None:
    """It belongs to the request, not to SamplingParams."""
    sampling = parse_sampling(given)
    assert sampling.priority == expected
    assert sampling.values == {}


@pytest.mark.parametrize("name", ["prompt_logprobs", "prompt_logprob_start"])
def test_what_no_tensor_carries_is_dropped(name: str) -> None:
    """It would turn prefix caching off for nothing."""
    assert parse_sampling({name: 1}).values == {}


@pytest.mark.parametrize("given", [{"temperature": -1}, {"top_p": 2}, {"max_tokens": 0}, {"n": 0}, {"top_k": -5}, {"logit_bias": {"x": 1}},
                                   {"min_tokens": 5, "max_tokens": 1}, {"temperature": 0, "n": 2}])
def test_values_that_vllm_refuses_are_the_clients(given: dict[str, Any]) -> None:
    """INVALID_ARGUMENT, not an engine failure."""
    with pytest.raises(RequestError, match=r"(is|are) not valid"):
        build(given)


@pytest.mark.parametrize(("stream", "kind"), [(True, RequestOutputKind.DELTA), (False, RequestOutputKind.FINAL_ONLY)])
def test_output_kind_follows_the_request(stream: bool, kind: RequestOutputKind) -> None:
    """Deltas for a stream, one output otherwise."""
    assert build({}, stream=stream).output_kind is kind


def test_the_leg_is_the_workers_to_set() -> None:
    """Interval, detokenizer and handoff."""
    params = build({}, stream=True, detokenize=False, stream_interval=4, received={"do_remote_prefill": True})
    assert (params.stream_interval, params.detokenize) == (4, False)
    assert params.extra_args == {"kv_transfer_params": {"do_remote_prefill": True}}
    assert build({}).extra_args is None


@pytest.mark.parametrize("given", [7, "7", 7.0])
def test_what_blocks_are_worth_goes_to_the_kv_tiers_with_every_leg(given: Any) -> None:
    """Beside the connectors' own part, which stays as it is."""
    sampling = parse_sampling({"kvbm_priority": given})
    remote = {"do_remote_prefill": True}
    assert build({"kvbm_priority": given}).extra_args == {"kv_transfer_params": {"kvbm_priority": 7}}
    assert build({"kvbm_priority": given}, received=remote).extra_args == {"kv_transfer_params": {**remote, "kvbm_priority": 7}}
    assert prefill_params(sampling).extra_args == {
        "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False, "kvbm_priority": 7}
    }
    assert remote == {"do_remote_prefill": True}


@pytest.mark.parametrize("given", ["much", 1.5, 101, -101, [1]])
def test_a_worth_that_is_no_small_integer_is_refused(given: Any) -> None:
    """Not ignored: the client means something by it."""
    with pytest.raises(RequestError, match=r"sampling parameter kvbm_priority=.* is not valid"):
        parse_sampling({"kvbm_priority": given})


@pytest.mark.parametrize("given", [1, "1", 1.0])
def test_the_rank_is_the_engines_not_the_samplers(given: Any) -> None:
    """It says where, not how, to generate."""
    assert parse_sampling({"data_parallel_rank": given}).data_parallel_rank == 1
    assert build({"data_parallel_rank": given}) == build({})
    with pytest.raises(RequestError, match=r"sampling parameter data_parallel_rank=-1 is not valid"):
        parse_sampling({"data_parallel_rank": -1})


@pytest.mark.parametrize(("given", "n"), [({}, 1), ({"n": 3}, 3)])
def test_number_of_sequences(given: dict[str, Any], n: int) -> None:
    """One unless asked."""
    assert parse_sampling(given).n == n


def test_prefill_makes_one_token_and_keeps_the_blocks() -> None:
    """An end-of-sequence guess must not end it before the handoff."""
    params = prefill_params(parse_sampling({}))
    assert (params.max_tokens, params.temperature, params.ignore_eos, params.detokenize) == (1, 0.0, True, False)
    assert params.output_kind is RequestOutputKind.FINAL_ONLY
    assert params.extra_args == {"kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}}
    assert params.extra_args is not None
    assert params.extra_args["kv_transfer_params"] is not handoff.PREFILL_REQUEST
