# SPDX-License-Identifier: Apache-2.0
"""KServe v2 messages from Triton's point of view: requests into our tensors, tensors into responses. Pure."""

from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

from tandem_protocol.errors import RequestError
from tandem_protocol.requests import Envelope, GenerationRequest, parse_request
from tandem_protocol.roles import Role
from tandem_protocol.streams import Arrays

_TRITONS_OWN = ("triton_", "sequence_", "timeout", "priority", "binary_data_output")
_NAMES = {"O": "BYTES", "b": "BOOL", "i": "INT32", "u": "UINT32", "f": "FP32"}


def read_request(message: Any, role: Role) -> GenerationRequest:
    """The generation request of a ModelInferRequest. Raises RequestError."""
    arrays = _input_arrays(message)
    given = parameters(message)
    own = {name: value for name, value in given.items() if not name.startswith(_TRITONS_OWN)}
    envelope = Envelope(message.id, own, timeout_us=int(given.get("timeout") or 0))
    return parse_request(arrays.get, envelope, role)


def parameters(message: Any) -> dict[str, Any]:
    """All parameters of a request."""
    return {name: getattr(value, value.WhichOneof("parameter_choice") or "string_param") for name, value in message.parameters.items()}


def wants_empty_final(message: Any) -> bool:
    """Whether the client asked for a final response of its own, after the last tokens."""
    return bool(parameters(message).get("triton_enable_empty_final_response"))


def response(message: Any, arrays: Arrays, *, final: bool | None = None) -> Any:
    """The ModelInferResponse to `message`; `final` is left out where None (models that answer once)."""
    answer = service_pb2.ModelInferResponse(model_name=message.model_name, model_version="1", id=message.id)
    for name, array in arrays.items():
        answer.outputs.add(name=name, datatype=_NAMES[array.dtype.kind], shape=list(array.shape))
        answer.raw_output_contents.append(_raw(array))
    if final is not None:
        answer.parameters["triton_final_response"].bool_param = final
    return answer


def _input_arrays(message: Any) -> Arrays:
    if len(message.raw_input_contents) != len(message.inputs):
        raise RequestError("the request's inputs must all be sent as raw contents, as Triton's clients do")
    return {tensor.name: _array(tensor, raw) for tensor, raw in zip(message.inputs, message.raw_input_contents, strict=True)}


def _array(tensor: Any, raw: bytes) -> npt.NDArray[Any]:
    shape = tuple(tensor.shape)
    try:
        if tensor.datatype == "BYTES":
            strings: npt.NDArray[Any] = deserialize_bytes_tensor(raw)
            return strings.reshape(shape)
        return np.frombuffer(raw, dtype=triton_to_np_dtype(tensor.datatype)).reshape(shape)
    except (ValueError, TypeError) as exc:
        raise RequestError(f"input {tensor.name} does not hold {tensor.datatype} of shape {list(shape)}: {exc}") from exc


def _raw(array: npt.NDArray[Any]) -> bytes:
    if array.dtype.kind != "O":
        return array.tobytes()
    return bytes(serialize_byte_tensor(array).item()) if array.size else b""
