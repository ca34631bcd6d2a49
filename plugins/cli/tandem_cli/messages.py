# SPDX-License-Identifier: Apache-2.0
"""One generation request and its answer, between Python and KServe's protobuf messages. Pure.

Any server with the tensor contract of `tandem_protocol.tensors` understands these, Triton's own vllm_backend included
as long as none of the additions (`input_ids`, `output_ids`, `num_cached_tokens`) is asked for.
"""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tritonclient.grpc import InferResult, service_pb2

from tandem_protocol import tensors
from tandem_protocol.errors import RequestError

DEFAULT_RETURNS = (tensors.FINISH_REASON, tensors.NUM_INPUT_TOKENS, tensors.NUM_OUTPUT_TOKENS)

MEDIA_SUFFIXES = {tensors.IMAGE_OUTPUT: ".png", tensors.AUDIO_OUTPUT: ".wav"}
"""Outputs whose elements are whole files, and how such files end."""
_KNOWN_RETURNS = frozenset(spec.name for spec in tensors.OPTIONAL_OUTPUTS)
_UNFINISHED = "None"


def new_request_id() -> str:
    """A request id that no other client picks."""
    return uuid.uuid4().hex


@dataclass(frozen=True)
class GenerationRequest:
    """What a client asks for. `returns` names optional outputs without their `return_`."""

    model: str
    prompt: str | tuple[int, ...]
    """Text, or token ids."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = True
    returns: tuple[str, ...] = DEFAULT_RETURNS
    timeout_s: float = 300.0
    """Deadline of the whole answer, from the call to the last token."""
    request_id: str = field(default_factory=new_request_id)
    parameters: Mapping[str, str | bool] = field(default_factory=dict)
    """Triton request parameters, such as the router's."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.returns) - _KNOWN_RETURNS)
        if unknown:
            raise RequestError(f"no output is called {unknown[0]!r}: known are {', '.join(sorted(_KNOWN_RETURNS))}")


@dataclass(frozen=True)
class Delta:
    """One response. `outputs` holds each tensor flattened; the properties read it for requests with one sequence (`n` = 1)."""

    outputs: Mapping[str, tuple[Any, ...]]
    final: bool

    @property
    def text(self) -> str:
        """Text since the last response; all of it when the request doesn't stream."""
        return str(self._first(tensors.TEXT_OUTPUT) or "")

    @property
    def files(self) -> tuple[tuple[str, bytes], ...]:
        """Images and sounds, each with the suffix of its format."""
        return tuple((suffix, file) for name, suffix in MEDIA_SUFFIXES.items() for file in self.outputs.get(name, ()))

    @property
    def output_ids(self) -> tuple[int, ...]:
        """Token ids since the last response, if asked for."""
        return self.outputs.get(tensors.OUTPUT_IDS, ())

    @property
    def finish_reason(self) -> str | None:
        """`stop`, `length` ..., or None while the sequence goes on or if not asked for."""
        reason = self._first(tensors.FINISH_REASON)
        return None if reason in (None, _UNFINISHED) else str(reason)

    @property
    def num_input_tokens(self) -> int | None:
        """Tokens of the prompt, if asked for."""
        return self._count(tensors.NUM_INPUT_TOKENS)

    @property
    def num_output_tokens(self) -> int | None:
        """Tokens since the last response, if asked for."""
        return self._count(tensors.NUM_OUTPUT_TOKENS)

    def _count(self, name: str) -> int | None:
        value = self._first(name)
        return None if value is None else int(value)

    def _first(self, name: str) -> Any:
        values = self.outputs.get(name, ())
        return values[0] if values else None


def encode(request: GenerationRequest) -> service_pb2.ModelInferRequest:
    """The message for one request; the prompt is never repeated in the answer."""
    message = _message(request.model, request.request_id)
    if isinstance(request.prompt, str):
        _add(message, tensors.TEXT_INPUT, "BYTES", bytes_contents=[_utf8(request.prompt)])
    else:
        _add(message, tensors.INPUT_IDS, "INT32", int_contents=request.prompt)
    _add(message, tensors.SAMPLING_PARAMETERS, "BYTES", bytes_contents=[json.dumps(dict(request.sampling)).encode()])
    flags = {tensors.STREAM: request.stream, tensors.EXCLUDE_INPUT_IN_OUTPUT: True, **{f"return_{name}": True for name in request.returns}}
    for name, value in flags.items():
        _add(message, name, "BOOL", bool_contents=[value])
    for name, parameter in request.parameters.items():
        if isinstance(parameter, bool):
            message.parameters[name].bool_param = parameter
        else:
            message.parameters[name].string_param = parameter
    return message


def encode_abort(model: str, request_id: str) -> service_pb2.ModelInferRequest:
    """The message that makes a worker abort `request_id`: a parameter, and no inputs."""
    message = _message(model, f"abort-{request_id}")
    message.parameters[tensors.ABORT_PARAMETER].string_param = request_id
    return message


def decode(message: service_pb2.ModelInferResponse) -> Delta:
    """Reads one response; an empty final one has no outputs."""
    result = InferResult(message)
    flat = {output.name: result.as_numpy(output.name).reshape(-1).tolist() for output in message.outputs}
    outputs = {name: tuple(items) if name in MEDIA_SUFFIXES else _values(items) for name, items in flat.items()}
    final = "triton_final_response" in message.parameters and message.parameters["triton_final_response"].bool_param
    return Delta(outputs, bool(final))


def _message(model: str, request_id: str) -> service_pb2.ModelInferRequest:
    message = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    return message


def _add(message: service_pb2.ModelInferRequest, name: str, datatype: str, **contents: Any) -> None:
    (values,) = contents.values()
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=[len(values)])
    tensor.contents.CopyFrom(service_pb2.InferTensorContents(**contents))
    message.inputs.append(tensor)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as exc:
        raise RequestError(f"the prompt is not valid text at character {exc.start}: give it as UTF-8") from exc


def _values(items: list[Any]) -> tuple[Any, ...]:
    return tuple(item.decode(errors="replace") if isinstance(item, bytes) else item for item in items)
