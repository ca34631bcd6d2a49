# SPDX-License-Identifier: Apache-2.0
"""A generation request and its responses on the wire to a worker: KServe v2 messages of the tensor contract.

Pure: builds and reads protobuf messages, sends nothing. Tensors travel as raw contents, which is what Triton itself sends.
"""

import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2

from tandem_protocol import handoff, tensors
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.streams import Arrays

_FINAL = "triton_final_response"
_LENGTH = struct.Struct("<I")
"""Before each item of a BYTES tensor."""
_WIRE_TYPES = {"TYPE_STRING": "BYTES", "TYPE_BOOL": "BOOL", "TYPE_INT32": "INT32"}
_DTYPES: dict[str, Any] = {"FP32": np.float32, "UINT32": np.uint32, "INT32": np.int32, "BOOL": np.bool_}
_INPUT_TYPES = {spec.name: _WIRE_TYPES[spec.data_type] for spec in (*tensors.REQUEST_INPUTS, tensors.HANDOFF)}


def request_message(model: str, request: GenerationRequest, timeout_us: int = 0, rank: int | None = None) -> Any:
    """The ModelInferRequest of this request; `timeout_us` is what is left of its own timeout, 0 for none, `rank` the data-parallel one."""
    message = service_pb2.ModelInferRequest(model_name=model, id=request.request_id)
    for name, array in _inputs(request, rank):
        message.inputs.add(name=name, datatype=_INPUT_TYPES[name], shape=list(array.shape))
        message.raw_input_contents.append(_raw(array))
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, value in request.trace.items():
        message.parameters[name].string_param = value
    if timeout_us:
        message.parameters["timeout"].int64_param = timeout_us
    return message


def abort_message(model: str, request_id: str) -> Any:
    """Asks a worker to abort a request by its id."""
    message = service_pb2.ModelInferRequest(model_name=model)
    message.parameters[tensors.ABORT_PARAMETER].string_param = request_id
    return message


def _inputs(request: GenerationRequest, rank: int | None) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    if isinstance(request.prompt, str):
        yield tensors.TEXT_INPUT, strings(request.prompt.encode())
    else:
        yield tensors.INPUT_IDS, np.asarray(request.prompt, dtype=np.int32)
    if request.images:
        yield tensors.IMAGE, strings(*request.images)
    sampling = dict(request.sampling) | ({"priority": request.priority} if request.priority else {})
    if rank is not None:
        sampling[handoff.DATA_PARALLEL_RANK] = rank
    yield tensors.SAMPLING_PARAMETERS, strings(json.dumps(sampling).encode())
    yield tensors.STREAM, np.array([request.stream])
    if not request.stream:
        yield tensors.EXCLUDE_INPUT_IN_OUTPUT, np.array([not request.prepend_input])
    for name in sorted(request.returns):
        yield f"return_{name}", np.array([True])
    if request.handoff is not None:
        yield tensors.KV_TRANSFER_PARAMS, strings(handoff.encode(request.handoff))


def response_arrays(message: Any) -> Arrays:
    """The tensors of a ModelInferResponse; BYTES become object arrays of bytes."""
    raws = message.raw_output_contents
    return {output.name: _array(output.datatype, raw) for output, raw in zip(message.outputs, raws, strict=True)}


def is_final(message: Any) -> bool:
    """Whether this response ends its stream."""
    return _FINAL in message.parameters and bool(message.parameters[_FINAL].bool_param)


def strings(*items: bytes) -> npt.NDArray[Any]:
    """A BYTES tensor."""
    array = np.empty(len(items), dtype=np.object_)
    array[:] = items
    return array


def _raw(array: npt.NDArray[Any]) -> bytes:
    if array.dtype != np.object_:
        return array.tobytes()
    return b"".join(_LENGTH.pack(len(item)) + item for item in array)


def _array(datatype: str, raw: bytes) -> npt.NDArray[Any]:
    if datatype != "BYTES":
        return np.frombuffer(raw, dtype=_DTYPES[datatype])
    (first,) = _LENGTH.unpack_from(raw)
    return strings(raw[4:]) if len(raw) == 4 + first else strings(*_split(raw))


def _split(raw: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(raw):
        (length,) = _LENGTH.unpack_from(raw, start)
        yield raw[start + 4 : start + 4 + length]
        start += 4 + length


NO_TEXT = strings(b"")
LENGTH_REASON = strings(b"length")
"""`text_output` and `finish_reason` of an end that the router itself has to make."""
