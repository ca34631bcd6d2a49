# SPDX-License-Identifier: Apache-2.0
"""What one request may say about its own routing: Triton request parameters whose names begin with `router_`.

All others stay sampling parameters, so that any client of a worker can be a client of the router.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tandem_protocol.errors import RequestError

PREFIX = "router_"


@dataclass(frozen=True)
class Overrides:
    """The routing parameters of one request."""

    worker_id: str = ""
    """The generating worker that must take it; Dynamo's backend_instance_id or decode_worker_id."""
    prefill_worker_id: str = ""
    overlap_weight: float | None = None
    temperature: float | None = None
    expected_output_tokens: int = 0
    query: bool = False
    """Only answer which worker it would be; the answer is JSON in `text_output`."""


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "worker_id": str, "prefill_worker_id": str, "overlap_weight": float, "temperature": float, "expected_output_tokens": int,
    "query": lambda value: value if isinstance(value, bool) else str(value).lower() in {"1", "true"},
}


def split(parameters: Mapping[str, Any]) -> tuple[Overrides, dict[str, Any]]:
    """The routing parameters, and the rest. Raises RequestError for an unknown or malformed one."""
    routing = {name.removeprefix(PREFIX): value for name, value in parameters.items() if name.startswith(PREFIX)}
    unknown = sorted(routing.keys() - _PARSERS.keys())
    if unknown:
        known = ", ".join(f"{PREFIX}{name}" for name in _PARSERS)
        raise RequestError(f"unknown routing parameter {PREFIX}{unknown[0]!s}: known are {known}")
    rest = {name: value for name, value in parameters.items() if not name.startswith(PREFIX)}
    return Overrides(**{name: _parse(name, value) for name, value in routing.items()}), rest


def _parse(name: str, value: Any) -> Any:
    try:
        parsed = _PARSERS[name](value)
    except (TypeError, ValueError) as exc:
        raise RequestError(f"{PREFIX}{name}={value!r} is not valid: {exc}") from exc
    if isinstance(parsed, int | float) and not 0 <= parsed < 1e9:
        raise RequestError(f"{PREFIX}{name}={value!r} is out of range: give a number from 0 on")
    return parsed
