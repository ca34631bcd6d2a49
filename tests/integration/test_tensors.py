# SPDX-License-Identifier: Apache-2.0
"""Every optional input and output, streaming and not, on the aggregated worker and on the ensemble."""

import json
from dataclasses import replace
from typing import Any

import pytest

from calls import PARIS_PROMPT, Call, Response, collect, ids_of, text_of
from tandem_protocol import tensors

ANSWER = "The capital of France is Paris."
OUTPUTS = tuple(spec.name for spec in tensors.OPTIONAL_OUTPUTS)
GREEDY = {"temperature": 0, "max_tokens": 24, "logprobs": 2}
MODELS = pytest.mark.parametrize("model", ["vllm", "disagg"])
STREAMING = pytest.mark.parametrize("stream", [True, False], ids=["stream", "no-stream"])


@MODELS
@STREAMING
@pytest.mark.parametrize("name", OUTPUTS)
async def test_one_optional_output(client: Any, model: str, stream: bool, name: str) -> None:
    """An output comes when it is asked for, alone, with the right values."""
    got = await collect(client, Call(model, sampling=GREEDY, stream=stream, returns=(name,)))
    assert all(set(response) == {"text_output", name} for response in got)
    assert len(got) > 1 if stream else len(got) == 1  # deltas merge while a machine is busy
    _check(name, got)


def _check(name: str, got: list[Response]) -> None:
    values = [response[name] for response in got]
    match name:
        case "finish_reason":
            assert [value[0] for value in values[:-1]] == ["None"] * (len(got) - 1)
            assert values[-1] == ["stop"]
        case "cumulative_logprob":
            assert -10 < values[-1][0] < 0
        case "logprobs":
            tokens = [token for value in values for token in json.loads(value[0])]
            assert len(tokens) == 8
            assert all({"logprob", "rank", "decoded_token"} == set(entry) for token in tokens for entry in token.values())
        case "num_input_tokens":
            assert all(value == [16] for value in values)
        case "num_output_tokens":
            assert sum(value[0] for value in values) == 8
        case "output_ids":
            assert [token for value in values for token in value][:2] == [504, 3575]
        case "num_cached_tokens":
            assert all(value[0] >= 0 for value in values)
        case _:
            raise AssertionError(f"no check for {name}")


@MODELS
@STREAMING
async def test_all_optional_outputs_together(client: Any, model: str, stream: bool) -> None:
    """All outputs come together, in every response."""
    got = await collect(client, Call(model, sampling=GREEDY, stream=stream, returns=OUTPUTS))
    assert all(set(response) == {"text_output", *OUTPUTS} for response in got)


@MODELS
@pytest.mark.parametrize("exclude", [None, True, False])
async def test_exclude_input_in_output(client: Any, model: str, exclude: bool | None) -> None:
    """Without streaming the prompt stands in front unless it is excluded."""
    text = await text_of(client, Call(model, sampling=GREEDY, stream=False, exclude_input_in_output=exclude))
    assert text == (ANSWER if exclude else PARIS_PROMPT + ANSWER)


@MODELS
@STREAMING
async def test_token_ids_in(client: Any, model: str, stream: bool) -> None:
    """Token ids in place of text give the same answer."""
    prompt = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
    assert await text_of(client, Call(model, prompt=prompt, sampling=GREEDY, stream=stream, exclude_input_in_output=True)) == ANSWER


@MODELS
async def test_request_parameters_as_sampling_parameters(client: Any, model: str) -> None:
    """Triton's own request parameters work as sampling parameters, also as text."""
    assert await text_of(client, Call(model, parameters={"temperature": "0", "max_tokens": 24})) == ANSWER


@MODELS
async def test_stream_is_off_by_default(client: Any, model: str) -> None:
    """Without `stream` there is one response."""
    assert len(await collect(client, Call(model, sampling=GREEDY, stream=None))) == 1


@MODELS
@STREAMING
async def test_several_sequences(client: Any, model: str, stream: bool) -> None:
    """`n` sequences are elements of every response, each with its own deltas; the disaggregated handoff serves all of them."""
    sampling = {"n": 3, "temperature": 0.8, "seed": 5, "max_tokens": 12, "ignore_eos": True}
    got = await collect(client, Call(model, sampling=sampling, stream=stream, returns=("num_output_tokens", "finish_reason")))
    assert all(len(response["text_output"]) == 3 for response in got)
    assert [sum(response["num_output_tokens"][i] for response in got) for i in range(3)] == [12, 12, 12]
    assert got[-1]["finish_reason"] == ["length"] * 3


@MODELS
async def test_stop_string(client: Any, model: str) -> None:
    """A stop string ends the text before it."""
    assert await text_of(client, Call(model, sampling={**GREEDY, "stop": [" Paris"]})) == "The capital of France is"


@MODELS
@pytest.mark.parametrize(
    ("guided", "check"),
    [
        ({"structured_outputs": {"choice": ["blue", "green"]}}, lambda text: text in ("blue", "green")),
        ({"guided_choice": ["blue", "green"]}, lambda text: text in ("blue", "green")),
        ({"guided_regex": "[0-9]{4}"}, lambda text: len(text) == 4 and text.isdigit()),
        ({"guided_grammar": 'root ::= "yes" | "no"'}, lambda text: text in ("yes", "no")),
        ({"guided_decoding": {"json": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
                                       "additionalProperties": False}}}, lambda text: set(json.loads(text)) == {"a"}),
    ],
    ids=["choice", "guided_choice", "regex", "grammar", "json"],
)
async def test_guided_decoding(client: Any, model: str, guided: dict[str, Any], check: Any) -> None:
    """The text obeys the constraint."""
    text = await text_of(client, Call(model, sampling={"temperature": 0, "max_tokens": 40, **guided}))
    assert check(text), text


async def test_priority_is_a_sampling_parameter(client: Any) -> None:
    """A priority is accepted; the order it makes is vLLM's."""
    assert await text_of(client, Call("vllm", sampling={**GREEDY, "priority": 1})) == ANSWER


@MODELS
async def test_cached_tokens_grow_on_the_second_ask(client: Any, model: str) -> None:
    """`num_cached_tokens` tells a prefix hit: on disagg it is the prefill worker's."""
    prompt = f"A long story for {model}. " + "The ship sailed on and on. " * 30
    call = Call(model, prompt=prompt, sampling={"temperature": 0, "max_tokens": 2}, stream=False, returns=("num_cached_tokens",))
    first = (await collect(client, call))[0]["num_cached_tokens"][0]
    second = (await collect(client, call))[0]["num_cached_tokens"][0]
    assert first == 0
    assert second >= 128


async def test_streamed_equals_not_streamed(client: Any) -> None:
    """Deltas add up to the text of one response."""
    call = Call("disagg", prompt="Once upon a time", sampling={"temperature": 0, "max_tokens": 40}, returns=("output_ids",))
    assert await ids_of(client, call) == await ids_of(client, replace(call, stream=False, exclude_input_in_output=True))
