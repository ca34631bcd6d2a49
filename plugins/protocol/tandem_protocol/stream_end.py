# SPDX-License-Identifier: Apache-2.0
"""The end of a gRPC stream of responses, as every client of tritonserver has to leave it."""

import asyncio
import logging
from collections.abc import AsyncIterable
from typing import Any

log = logging.getLogger(__name__)

END_S = 1.0
"""For the server to end a stream after its final response, which it does at once."""


async def read_to_end(stream: AsyncIterable[Any], error: type[Exception], timeout_s: float = END_S) -> None:
    """Lets the server end a stream whose final response, or error, came; what follows is dropped. `error` is what the stream raises.

    tritonserver 2.51 never frees a request whose client cancels between the final response and the end of the stream: the request keeps
    its model from being unloaded, and the server's exit waits for its timeout.
    """
    try:
        async with asyncio.timeout(timeout_s):
            async for _ in stream:
                pass
    except (TimeoutError, error) as exc:
        log.debug("stream.left_open reason=%s", exc or f"not ended within {timeout_s:g} s")
