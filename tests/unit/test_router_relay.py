# SPDX-License-Identifier: Apache-2.0
"""An answer over several legs, and deltas that are merged on the way."""

from typing import Any

import numpy as np
import pytest

from tandem_protocol.errors import UnavailableError
from tandem_protocol.requests import GenerationRequest
from tandem_router import wire
from tandem_router.relay import Answer, Delta


def request(*, stream: bool = True, returns: tuple[str, ...] = (), **sampling: Any) -> GenerationRequest:
    """A request for 10 tokens unless said otherwise."""
    return GenerationRequest(request_id="r", prompt="hello", images=(), stream=stream, prepend_input=False,
                             sampling={"max_tokens": 10, **sampling}, returns=frozenset(returns), handoff=None, priority=0, timeout_s=None)


def response(text: str, *ids: int, **more: Any) -> dict[str, Any]:
    """A worker's response."""
    return {"text_output": wire.strings(text.encode()), "output_ids": np.array(ids, np.int32), **more}


def test_the_next_leg_goes_on_where_the_last_one_stopped() -> None:
    """Prompt and tokens so far become the prompt; limits shrink by what was generated."""
    answer = Answer(request(min_tokens=4), [1, 2, 3])
    first = answer.next_leg()
    assert (first.prompt, first.sampling["max_tokens"]) == ("hello", 10)
    answer.receive(response("ab", 7, 8))
    second = answer.next_leg()
    assert (second.prompt, second.sampling["max_tokens"], second.sampling["min_tokens"]) == ([1, 2, 3, 7, 8], 8, 2)


def test_what_the_client_did_not_ask_for_is_taken_out() -> None:
    """The router asks for the token ids; the client may not have."""
    answer = Answer(request(), [1])
    assert "output_ids" in answer.next_leg().returns
    assert set(answer.receive(response("a", 5))) == {"text_output"}
    assert set(Answer(request(returns=("output_ids",)), [1]).receive(response("a", 5))) == {"text_output", "output_ids"}


@pytest.mark.parametrize("sampling", [{"n": 2}, {"guided_json": "{}"}, {"structured_outputs": {"regex": "a"}}])
def test_an_answer_with_state_elsewhere_cannot_be_resumed(sampling: dict[str, Any]) -> None:
    """Before its first response it may still start anew."""
    answer = Answer(request(**sampling), [1])
    answer.next_leg()
    answer.next_leg()
    answer.receive(response("a", 5))
    with pytest.raises(UnavailableError, match="can't be continued"):
        answer.next_leg()


def test_an_answer_whose_tokens_are_all_there_is_complete() -> None:
    """Only its end was lost."""
    answer = Answer(request(max_tokens=2), [1])
    answer.next_leg()
    answer.receive(response("a", 5))
    assert not answer.complete
    answer.receive(response("b", 6))
    assert answer.complete


def test_cumulative_logprobs_and_prompt_lengths_are_those_of_the_whole() -> None:
    """The second worker counts from its own start."""
    returns = ("cumulative_logprob", "num_input_tokens")
    answer = Answer(request(returns=returns), [1, 2])
    answer.next_leg()
    answer.receive(response("a", 5, cumulative_logprob=np.array([-1.5], np.float32), num_input_tokens=np.array([2], np.uint32)))
    answer.next_leg()
    later = answer.receive(response("b", 6, cumulative_logprob=np.array([-0.5], np.float32), num_input_tokens=np.array([3], np.uint32)))
    assert later["cumulative_logprob"][0] == np.float32(-2.0)
    assert later["num_input_tokens"][0] == 2


def test_merged_deltas_are_as_if_one_response_had_come() -> None:
    """Texts and tokens are appended, counts of this response added, states replaced."""
    def delta(text: str, ids: list[int], reason: bytes, *, finished: bool) -> Delta:
        arrays = response(text, *ids, finish_reason=wire.strings(reason), num_output_tokens=np.array([len(ids)], np.uint32),
                          num_input_tokens=np.array([9], np.uint32), logprobs=wire.strings(b"[1]" if ids else b"null"))
        return Delta(arrays, finished=finished)

    merged = delta("a", [1], b"None", finished=False)
    merged.add(delta("bc", [2, 3], b"length", finished=False), aggregate=True)
    merged.add(Delta({}, finished=True), aggregate=True)
    assert merged.finished
    assert merged.arrays["text_output"].tolist() == [b"abc"]
    assert merged.arrays["output_ids"].tolist() == [1, 2, 3]
    assert merged.arrays["num_output_tokens"].tolist() == [3]
    assert merged.arrays["num_input_tokens"].tolist() == [9]
    assert merged.arrays["finish_reason"].tolist() == [b"length"]
    assert merged.arrays["logprobs"].tolist() == [b"[1, 1]"]
