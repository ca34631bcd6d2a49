# SPDX-License-Identifier: Apache-2.0
"""W3C trace context (https://www.w3.org/TR/trace-context) as Triton request parameters: `traceparent` and `tracestate`.

It is passed on as it came, router to workers and worker to engine; spans are made by vLLM alone (`--otlp-traces-endpoint`).
"""

import re
from collections.abc import Mapping
from typing import Any

PARENT, STATE = "traceparent", "tracestate"
_PARENT_FORM = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_LONGEST_STATE = 512


def split_trace(parameters: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """The trace headers, and the other parameters. A malformed `traceparent` is as good as none, and so is a state without a parent."""
    rest = {name: value for name, value in parameters.items() if name not in {PARENT, STATE}}
    parent, state = str(parameters.get(PARENT, "")), str(parameters.get(STATE, ""))
    if not _PARENT_FORM.fullmatch(parent):
        return {}, rest
    return {PARENT: parent, **({STATE: state} if 0 < len(state) <= _LONGEST_STATE else {})}, rest


def trace_id_of(headers: Mapping[str, str]) -> str:
    """The 32 hexadecimal digits that all spans of a trace share; empty without a trace."""
    matched = _PARENT_FORM.fullmatch(headers.get(PARENT, ""))
    return matched[1] if matched else ""
