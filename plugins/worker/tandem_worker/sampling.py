# SPDX-License-Identifier: Apache-2.0
"""From a request's sampling parameters (JSON or Triton's request parameters) to vLLM's SamplingParams.

Edge module: knows vLLM. Values are coerced to the declared types, because HTTP and gRPC clients send numbers as strings
or integers as floats; names that vLLM doesn't know are refused with the nearest one that it does.
"""

import difflib
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

import msgspec
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from tandem_protocol import handoff
from tandem_protocol.errors import RequestError

LORA_NAME = "lora_name"
PRIORITY = "priority"
_BlockPriority = Annotated[int, msgspec.Meta(ge=-handoff.KVBM_WORTH, le=handoff.KVBM_WORTH)]
_Rank = Annotated[int, msgspec.Meta(ge=0)]
_OWNED = frozenset({"output_kind", "stream_interval", "skip_clone", "detokenize", "extra_args", "output_text_buffer_length",
                    "prompt_logprob_token_ids", "routed_experts_prompt_start", "trace_decode_token_ids", "flat_logprobs",
                    "skip_reading_prefix_cache"})
"""Fields of SamplingParams that the worker sets itself."""
_UNSEEN = frozenset({"prompt_logprobs", "prompt_logprob_start"})
"""Accepted and dropped: no output tensor carries them, and they would turn prefix caching off."""
_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
_STRUCTURED = ("structured_outputs", "guided_decoding")


@dataclass(frozen=True)
class Sampling:
    """Checked sampling parameters of one request, before a leg (aggregated, prefill, decode) makes them its own."""

    values: Mapping[str, Any]
    structured: Mapping[str, Any] | None
    lora_name: str | None
    priority: int | None
    kvbm_priority: int | None = None
    data_parallel_rank: int | None = None

    def transfer_params(self, connectors: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """What KV connectors and tiers are told of the request: the connectors' own part, and what its blocks are worth."""
        if self.kvbm_priority is None:
            return None if connectors is None else dict(connectors)
        return {**(connectors or {}), handoff.KVBM_PRIORITY: self.kvbm_priority}

    @property
    def n(self) -> int:
        """How many sequences the request asks for."""
        return int(self.values.get("n") or 1)


@functools.cache
def _field_types() -> Mapping[str, Any]:
    hints = get_type_hints(SamplingParams)
    return {name: hints[name] for name in SamplingParams.__struct_fields__ if not name.startswith("_") and name not in _OWNED}


def parse_sampling(given: Mapping[str, Any]) -> Sampling:
    """Checks names and types. Raises RequestError."""
    values: dict[str, Any] = {}
    structured: dict[str, Any] = {}
    lora_name = priority = kvbm_priority = rank = None
    for name, value in given.items():
        if value is None:
            continue  # null is "not given"
        if name == LORA_NAME:
            lora_name = str(value)
        elif name == PRIORITY:
            priority = _convert(name, value, int)
        elif name == handoff.KVBM_PRIORITY:
            kvbm_priority = _convert(name, value, _BlockPriority)
        elif name == handoff.DATA_PARALLEL_RANK:
            rank = _convert(name, value, _Rank)
        elif name in _GUIDED:
            structured[_GUIDED[name]] = _guided_value(name, value)
        elif name in _STRUCTURED:
            structured.update(_structured(name, value))
        elif name not in _UNSEEN:
            values[name] = _coerce(name, value)
    return Sampling(values, structured or None, lora_name, priority, kvbm_priority, rank)


def _coerce(name: str, value: Any) -> Any:
    types = _field_types()
    if name not in types:
        own = (LORA_NAME, PRIORITY, handoff.KVBM_PRIORITY, handoff.DATA_PARALLEL_RANK)
        close = difflib.get_close_matches(name, [*types, *_GUIDED, *_STRUCTURED, *own], n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see vLLM's SamplingParams"
        raise RequestError(f"unknown sampling parameter {name!r}: {hint}")
    return _convert(name, value, types[name])


def _convert(name: str, value: Any, declared: Any) -> Any:
    try:
        return msgspec.convert(value, declared, strict=False)
    except (msgspec.ValidationError, TypeError) as exc:
        raise RequestError(f"sampling parameter {name}={value!r} is not valid: {exc}") from exc


def _guided_value(name: str, value: Any) -> Any:
    """A choice is a list; through Triton's request parameters, which know no lists, it comes as JSON text."""
    if name != "guided_choice" or not isinstance(value, str):
        return value
    return _parse_json(name, value)


def _structured(name: str, value: Any) -> dict[str, Any]:
    parsed = _parse_json(name, value) if isinstance(value, str) else value
    known = {field.name for field in fields(StructuredOutputsParams) if field.init}
    if not isinstance(parsed, dict) or not parsed or set(parsed) - known:
        raise RequestError(f"{name} must be an object with one of json, regex, choice, grammar, json_object; got {parsed!r}")
    return parsed


def _parse_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as exc:
        raise RequestError(f"{name} is not JSON ({exc})") from exc


def generation_params(sampling: Sampling, *, stream: bool, detokenize: bool, stream_interval: int,
                      received: Mapping[str, Any] | None = None) -> SamplingParams:
    """Parameters of an aggregated or decode leg, with the handoff that it received. Raises RequestError for values that vLLM refuses."""
    kv_transfer_params = sampling.transfer_params(received)
    return _build(
        **sampling.values,
        structured_outputs=sampling.structured and dict(sampling.structured),
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        stream_interval=stream_interval,
        detokenize=detokenize,
        extra_args={"kv_transfer_params": kv_transfer_params} if kv_transfer_params else None,
    )


def handoff_params(sampling: Sampling, given: Mapping[str, Any]) -> SamplingParams:
    """Parameters of a leg whose one token is thrown away: prefill, or pulling blocks into the prefix cache.

    `ignore_eos` keeps an end-of-sequence guess from ending the request before its blocks are handed off.
    """
    return _build(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
                  extra_args={"kv_transfer_params": sampling.transfer_params(given)})


def prefill_params(sampling: Sampling) -> SamplingParams:
    """Parameters of a prefill leg."""
    return handoff_params(sampling, handoff.PREFILL_REQUEST)


def _build(**values: Any) -> SamplingParams:
    structured = values.pop("structured_outputs", None)
    try:
        if structured is not None:
            values["structured_outputs"] = StructuredOutputsParams(**structured)
        return SamplingParams.from_optional(**values)
    except Exception as exc:  # vLLM raises several types here, all about the client's values
        raise RequestError(f"sampling parameters are not valid: {exc}") from exc
