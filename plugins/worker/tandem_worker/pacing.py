# SPDX-License-Identifier: Apache-2.0
"""How many tokens of one request share a response under load.

A streamed response costs the Python stub 0.1-0.35 ms whatever it carries, on the same interpreter that feeds the engine.
vLLM can hold tokens back per request (`stream_interval`; the first and the last are always sent at once), so the worker
picks the interval at admission such that all streams together stay within a budget of responses per second.
"""

import math

MAX_INTERVAL = 16
"""More would make text arrive in visible jumps without saving anything that matters."""


def stream_interval(active_requests: int, step_s: float, responses_per_s: float) -> int:
    """Tokens per response for a request that joins `active_requests` streams on an engine with steps of `step_s` seconds.

    Without a measured step (an engine that has not run yet) every token travels alone.
    """
    if step_s <= 0:
        return 1
    tokens_per_s = active_requests / step_s
    return min(MAX_INTERVAL, max(1, math.ceil(tokens_per_s / responses_per_s)))
