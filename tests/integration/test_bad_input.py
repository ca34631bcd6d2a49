# SPDX-License-Identifier: Apache-2.0
"""Bad input gets a clear error, disturbs nothing, and the next good request works."""

from dataclasses import dataclass
from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from calls import Call, collect, prefill, text_of
from servers import Server, wait_for

GOOD = Call("vllm", sampling={"temperature": 0, "max_tokens": 24})
ANSWER = "The capital of France is Paris."


@dataclass(frozen=True)
class Case:
    """A request and a piece of its error."""

    call: Call
    error: str


def _sampling(value: Any) -> Call:
    return Call("vllm", sampling=value)


CASES = {
    "no prompt": Case(Call("vllm", prompt=None), "text_input or as input_ids"),
    "empty ids": Case(Call("vllm", prompt=[]), "input_ids is empty"),
    "negative id": Case(Call("vllm", prompt=[1, -5]), "not negative"),
    "id beyond the vocabulary": Case(Call("vllm", prompt=[1, 10_000_000]), "vocab"),
    "empty text": Case(Call("vllm", prompt=""), "prompt"),
    "longer than the context": Case(Call("vllm", prompt=[5] * 5000), "4096"),
    "sampling parameters not JSON": Case(_sampling("{temperature: 1}"), "not JSON"),
    "sampling parameters not an object": Case(_sampling("[1]"), "must be a JSON object"),
    "unknown sampling parameter": Case(_sampling({"temprature": 1}), "did you mean 'temperature'"),
    "unknown request parameter": Case(Call("vllm", parameters={"colour": "red"}), "unknown sampling parameter 'colour'"),
    "temperature not a number": Case(_sampling({"temperature": "warm"}), "temperature"),
    "temperature negative": Case(_sampling({"temperature": -1}), "temperature"),
    "temperature NaN": Case(_sampling('{"temperature": NaN}'), "temperature"),
    "top_p too large": Case(_sampling({"top_p": 1.5}), "top_p"),
    "rank that is not there": Case(_sampling({"data_parallel_rank": 1}), "its only rank is 0"),
    "top_k negative": Case(_sampling({"top_k": -7}), "top_k"),
    "max_tokens zero": Case(_sampling({"max_tokens": 0}), "max_tokens"),
    "max_tokens a fraction": Case(_sampling({"max_tokens": 1.5}), "max_tokens"),
    "min_tokens above max_tokens": Case(_sampling({"min_tokens": 9, "max_tokens": 3}), "min_tokens"),
    "n zero": Case(_sampling({"n": 0}), "n must"),
    "n with greedy": Case(_sampling({"n": 2, "temperature": 0}), "greedy"),
    "logprobs too many": Case(_sampling({"logprobs": 100_000}), "logprobs"),
    "empty stop string": Case(_sampling({"stop": [""]}), "stop"),
    "LoRA not enabled": Case(_sampling({"lora_name": "x"}), "LoRA feature is not enabled."),
    "reserved parameter": Case(_sampling({"extra_args": {"kv_transfer_params": {}}}), "unknown sampling parameter 'extra_args'"),
    "two constraints": Case(_sampling({"guided_regex": "a", "guided_choice": ["b"]}), "structured"),
    "invalid regex": Case(_sampling({"guided_regex": "["}), ""),
    "invalid grammar": Case(_sampling({"guided_grammar": "root ::= ("}), ""),
    "invalid JSON schema": Case(_sampling({"guided_json": "{not json"}), ""),
    "huge seed": Case(_sampling({"seed": 10**30}), ""),
    "huge token id to ban": Case(_sampling({"logit_bias": {"99999999": 1}}), "99999999"),
    "streamed with the prompt": Case(Call("vllm", exclude_input_in_output=False), "exclude_input_in_output"),
    "image to a text model": Case(Call("vllm", images=(b"aGk=",)), "takes no images"),
    "handoff not JSON": Case(Call("decode", handoff=b"{"), "kv_transfer_params is not JSON"),
    "handoff of something else": Case(Call("decode", handoff=b'{"a": 1}'), "not a prefill answer"),
    "disagg: unknown parameter": Case(Call("disagg", sampling={"temprature": 1}), "did you mean 'temperature'"),
    "disagg: longer than the context": Case(Call("disagg", prompt=[5] * 5000), "4096"),
    "disagg: no prompt": Case(Call("disagg", prompt=None), "text_input or as input_ids"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
async def test_error_then_a_good_request(server: Server, client: Any, case: Case) -> None:
    """The error says what is wrong; nothing stays in flight; the next request gets its answer."""
    with pytest.raises(InferenceServerException) as caught:
        await collect(client, case.call)
    assert case.error.lower() in str(caught.value).lower()
    assert "Traceback" not in str(caught.value)
    assert await text_of(client, GOOD) == ANSWER
    wait_for(lambda: all(server.health(name)["active"] == 0 for name in ("vllm", "prefill", "decode")), 5, "nothing in flight")


async def test_prefill_by_hand_gets_its_error_too(client: Any) -> None:
    """The non-decoupled model answers errors with a proper gRPC status."""
    with pytest.raises(InferenceServerException) as caught:
        await prefill(client, Call("prefill", sampling={"temprature": 1}))
    assert "INVALID_ARGUMENT" in str(caught.value.status())


def kv_usage(server: Server) -> float:
    """The used share of the prefill worker's blocks, as of its latest step."""
    return float(server.health("prefill")["kv_usage"])


async def test_refused_decode_gives_the_handoff_back(server: Server, client: Any) -> None:
    """A decode request that is refused after its prefill frees the prefill worker's blocks, long before their lease ends."""
    # What others and the probe below hold until their own leases end is far less.
    before = kv_usage(server)
    handoff = await prefill(client, Call("prefill", prompt="Words. " * 200))
    held = kv_usage(server)
    assert held > before
    with pytest.raises(InferenceServerException):
        await collect(client, Call("decode", prompt="Words. " * 200, handoff=handoff, sampling={"max_tokens": 0}))
    await collect(client, Call("prefill", prompt="Another one.", stream=None))  # a step, so that the statistics are new
    wait_for(lambda: kv_usage(server) < (before + held) / 2, 5, "the prefill worker's blocks to be free")
