# SPDX-License-Identifier: Apache-2.0
"""From the tensors of one request to what a pipeline is asked. Pure; whatever is wrong raises RequestError before a stage is touched."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from tandem_protocol import tensors
from tandem_protocol.errors import RequestError
from tandem_protocol.requests import Envelope, GenerationRequest, TensorReader, parse_request
from tandem_protocol.roles import Role


@dataclass(frozen=True)
class OmniRequest(GenerationRequest):
    """A request of any model, and what only pipelines take."""

    modalities: tuple[str, ...] = ()
    """Wanted kinds of output; empty for all that the pipeline makes."""
    negative_prompt: str | None = None
    """What an image shall not show."""


def parse_omni_request(read: TensorReader, envelope: Envelope) -> OmniRequest:
    """Reads one request. Raises RequestError."""
    request = parse_request(read, envelope, Role.OMNI)
    common = {field.name: getattr(request, field.name) for field in fields(GenerationRequest)}
    negative = _texts(read, tensors.NEGATIVE_PROMPT)
    if len(negative) > 1:
        raise RequestError(f"negative_prompt must hold exactly one element, got {len(negative)}: send one request per prompt")
    return OmniRequest(**common, modalities=_texts(read, tensors.MODALITIES), negative_prompt=negative[0] if negative else None)


def omni_prompt(request: OmniRequest, pixels: Sequence[Any], modalities: Sequence[str]) -> dict[str, Any]:
    """The prompt as vllm-omni takes it; `pixels` are the request's images, decoded."""
    prompt: dict[str, Any] = {"modalities": list(modalities)}
    if isinstance(request.prompt, str):
        prompt["prompt"] = request.prompt
    else:
        prompt["prompt_token_ids"] = list(request.prompt)
    if request.negative_prompt is not None:
        prompt["negative_prompt"] = request.negative_prompt
    if pixels:
        # Pipelines that edit one image take it alone, and a list of several (vllm-omni's own chat endpoint does the same).
        prompt["multi_modal_data"] = {"image": pixels[0] if len(pixels) == 1 else list(pixels)}
    return prompt


def _texts(read: TensorReader, name: str) -> tuple[str, ...]:
    tensor = read(name)
    if tensor is None:
        return ()
    try:
        return tuple(item if isinstance(item, str) else bytes(item).decode() for item in tensor.reshape(-1))
    except UnicodeDecodeError as exc:
        raise RequestError(f"{name} is not UTF-8 ({exc.reason} at byte {exc.start}): encode it as UTF-8") from exc
