# SPDX-License-Identifier: Apache-2.0
"""Requests and responses on the wire are what Triton's own client sends and reads."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.grpc import service_pb2

from tandem_protocol.errors import RequestError
from tandem_protocol.requests import Envelope, GenerationRequest, parse_request
from tandem_protocol.roles import Role
from tandem_router import wire
from tandem_router.overrides import Overrides, split

HANDOFF = {"do_remote_prefill": True, "remote_host": "x"}
FULL = GenerationRequest(request_id="id", prompt=[3, 4], images=(b"a", b""), stream=False, prepend_input=True, sampling={"top_k": 2},
                         returns=frozenset({"output_ids", "finish_reason"}), handoff=HANDOFF, priority=0, timeout_s=None)


def reader(message: Any) -> Any:
    """Reads a message's inputs as a worker does."""
    arrays = {}
    for tensor, raw in zip(message.inputs, message.raw_input_contents, strict=True):
        output = service_pb2.ModelInferResponse.InferOutputTensor(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        one = service_pb2.ModelInferResponse(outputs=[output], raw_output_contents=[raw])
        arrays[tensor.name] = grpcclient.InferResult(one).as_numpy(tensor.name)
    return arrays.get


@pytest.mark.parametrize("role", [Role.DECODE, Role.AGGREGATED])
def test_a_worker_parses_the_request_that_was_sent(role: Role) -> None:
    """Every field survives; a worker that is not a decode worker reads no handoff."""
    message = wire.request_message("vllm", FULL, timeout_us=5)
    parsed = parse_request(reader(message), Envelope("id", {}), role)
    assert parsed.handoff == (HANDOFF if role is Role.DECODE else None)
    assert (parsed.prompt, parsed.images, parsed.stream, parsed.prepend_input) == ([3, 4], (b"a", b""), False, True)
    assert (parsed.sampling, parsed.returns) == ({"top_k": 2}, FULL.returns)
    assert (message.id, message.model_name, message.parameters["timeout"].int64_param) == ("id", "vllm", 5)


def test_the_rank_of_the_decision_travels_as_a_sampling_parameter() -> None:
    """It stands above one that the client gave; without one of the router's, the client's stays."""
    named = parse_request(reader(wire.request_message("vllm", FULL, rank=1)), Envelope("id", {}), Role.DECODE)
    assert named.sampling == {"top_k": 2, "data_parallel_rank": 1}
    asked = replace(FULL, sampling={"data_parallel_rank": 0})
    for rank, sent in ((3, 3), (None, 0)):
        message = wire.request_message("vllm", asked, rank=rank)
        assert parse_request(reader(message), Envelope("id", {}), Role.DECODE).sampling == {"data_parallel_rank": sent}


def test_a_response_is_read_back() -> None:
    """All types of the contract, several strings, an empty one."""
    response = service_pb2.ModelInferResponse()
    outputs = (("text_output", "BYTES", wire.strings(b"a", b"", "ä".encode())), ("output_ids", "INT32", np.array([1, 2], np.int32)),
               ("cumulative_logprob", "FP32", np.array([-1.5], np.float32)), ("num_input_tokens", "UINT32", np.array([7], np.uint32)))
    for name, kind, array in outputs:
        response.outputs.add(name=name, datatype=kind, shape=list(array.shape))
        raw = b"".join(len(item).to_bytes(4, "little") + item for item in array) if kind == "BYTES" else array.tobytes()
        response.raw_output_contents.append(raw)
    arrays = wire.response_arrays(response)
    assert arrays["text_output"].tolist() == [b"a", b"", "ä".encode()]
    assert arrays["output_ids"].tolist() == [1, 2]
    assert arrays["cumulative_logprob"].tolist() == [-1.5]
    assert arrays["num_input_tokens"].tolist() == [7]
    assert not wire.is_final(response)
    response.parameters["triton_final_response"].bool_param = True
    assert wire.is_final(response)


def test_routing_parameters_are_taken_out_of_the_others() -> None:
    """The rest stay sampling parameters."""
    overrides, rest = split({"router_worker_id": "w", "router_temperature": "0.5", "router_query": True, "top_k": 3})
    assert overrides == Overrides(worker_id="w", temperature=0.5, query=True)
    assert rest == {"top_k": 3}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"router_wrker": 1}, "unknown routing parameter router_wrker: known are router_worker_id"),
     ({"router_temperature": "warm"}, "router_temperature='warm' is not valid"), ({"router_overlap_weight": -1}, "out of range")],
)
def test_wrong_routing_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    """With the fix in the message."""
    with pytest.raises(RequestError, match=message):
        split(parameters)
