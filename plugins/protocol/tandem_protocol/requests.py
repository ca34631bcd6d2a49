# SPDX-License-Identifier: Apache-2.0
"""From the tensors and parameters of one Triton request to a GenerationRequest.

Pure: the edge hands in a reader of tensors. Whatever is wrong raises RequestError with a sentence that says the fix;
nothing of the engine is touched before that.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from tandem_protocol import handoff, tensors
from tandem_protocol.errors import RequestError
from tandem_protocol.roles import Role

TensorReader = Callable[[str], npt.NDArray[Any] | None]
"""Name -> tensor as an array, or None when the request doesn't carry it."""


@dataclass(frozen=True)
class Envelope:
    """What Triton says of a request besides its tensors."""

    request_id: str
    parameters: Mapping[str, Any]
    priority: int = 0
    timeout_us: int = 0
    trace: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationRequest:
    """One request, checked as far as that goes without the engine."""

    request_id: str
    prompt: str | list[int]
    images: tuple[bytes, ...]
    stream: bool
    prepend_input: bool
    sampling: Mapping[str, Any]
    returns: frozenset[str]
    handoff: dict[str, Any] | None
    priority: int
    timeout_s: float | None
    trace: Mapping[str, str] = field(default_factory=dict)
    """W3C trace headers (`trace`); empty without a trace."""


def parse_request(read: TensorReader, envelope: Envelope, role: Role) -> GenerationRequest:
    """Reads one request for a worker of this role. Raises RequestError."""
    stream = _flag(read, tensors.STREAM, default=False)
    return GenerationRequest(
        request_id=envelope.request_id,
        prompt=_prompt(read),
        images=_images(read),
        stream=stream,
        prepend_input=_prepend_input(read, stream),
        sampling=_sampling(read, envelope.parameters),
        returns=frozenset(spec.name for spec in tensors.OPTIONAL_OUTPUTS if _flag(read, f"return_{spec.name}", default=False)),
        handoff=_handoff(read) if role is Role.DECODE else None,
        priority=envelope.priority,
        timeout_s=envelope.timeout_us / 1e6 if envelope.timeout_us > 0 else None,
        trace=envelope.trace,
    )


def _prompt(read: TensorReader) -> str | list[int]:
    text, ids = read(tensors.TEXT_INPUT), read(tensors.INPUT_IDS)
    if (text is None) == (ids is None):
        raise RequestError("give the prompt either as text_input or as input_ids, not both and not neither")
    if ids is None:
        return _string(text, tensors.TEXT_INPUT)
    token_ids = [int(token) for token in ids.reshape(-1)]
    if not token_ids:
        raise RequestError("input_ids is empty: give at least one token")
    if min(token_ids) < 0:
        raise RequestError(f"input_ids holds {min(token_ids)}: token ids are not negative")
    return token_ids


def _images(read: TensorReader) -> tuple[bytes, ...]:
    images = read(tensors.IMAGE)
    return () if images is None else tuple(_as_bytes(item) for item in images.reshape(-1))


def _prepend_input(read: TensorReader, stream: bool) -> bool:
    exclude = _flag(read, tensors.EXCLUDE_INPUT_IN_OUTPUT, default=stream)
    if stream and not exclude:
        raise RequestError("When streaming, `exclude_input_in_output` = False is not allowed.")
    return not exclude


def _sampling(read: TensorReader, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tensor alone if it is there, else Triton's request parameters, as in vllm_backend."""
    tensor = read(tensors.SAMPLING_PARAMETERS)
    if tensor is None:
        return parameters
    text = _string(tensor, tensors.SAMPLING_PARAMETERS)
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise RequestError(f'sampling_parameters is not JSON ({exc}): write it like {{"temperature": 0.7}}') from exc
    if not isinstance(value, dict):
        raise RequestError(f'sampling_parameters must be a JSON object like {{"temperature": 0.7}}, got {type(value).__name__}')
    return value


def _handoff(read: TensorReader) -> dict[str, Any] | None:
    tensor = read(tensors.KV_TRANSFER_PARAMS)
    return None if tensor is None else handoff.decode(_as_bytes(_single(tensor, tensors.KV_TRANSFER_PARAMS)))


def _flag(read: TensorReader, name: str, *, default: bool) -> bool:
    tensor = read(name)
    return default if tensor is None else bool(_single(tensor, name))


def _string(tensor: npt.NDArray[Any] | None, name: str) -> str:
    assert tensor is not None
    try:
        return _as_bytes(_single(tensor, name)).decode()
    except UnicodeDecodeError as exc:
        raise RequestError(f"{name} is not UTF-8 ({exc.reason} at byte {exc.start}): encode it as UTF-8") from exc


def _single(tensor: npt.NDArray[Any], name: str) -> Any:
    if tensor.size != 1:
        raise RequestError(f"{name} must hold exactly one element, got shape {list(tensor.shape)}: send one request per prompt")
    return tensor.reshape(-1)[0]


def _as_bytes(item: Any) -> bytes:
    return item.encode() if isinstance(item, str) else bytes(item)
