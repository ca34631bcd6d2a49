# SPDX-License-Identifier: Apache-2.0
"""A request of our own after idleness: an engine that nobody asks can be broken without anybody knowing.

One token, on this engine alone: a prefill worker's canary hands nothing off and a decode worker's pulls nothing, so that no KV
blocks are held for a peer that never comes. A canary that is late makes the worker unwell, but stays in the engine: it is the work
without which a hang could not be told from idleness (`heartbeat`). Runs on the worker's event loop.
"""

import asyncio
import json
import logging
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from tandem_protocol.requests import GenerationRequest

log = logging.getLogger(__name__)

DEFAULT_BOS = 1
TEXT = "Test"
_SAMPLING = {"temperature": 0.0, "max_tokens": 1, "ignore_eos": True}
_LOOKS_PER_WAIT = 10


def parse_payload(text: str) -> str:
    """Checks `DYN_HEALTH_CHECK_PAYLOAD`: a JSON object with `prompt` or `token_ids`, perhaps `sampling_options` and `stop_conditions`."""
    payload = json.loads(text)
    if not isinstance(payload, dict) or ("prompt" in payload) == ("token_ids" in payload):
        raise ValueError('expected a JSON object with either prompt or token_ids, e.g. {"token_ids": [1]}')
    ids = payload.get("token_ids", [1])
    if not isinstance(payload.get("prompt", ""), str) or not ids or not all(isinstance(token, int) for token in ids):
        raise ValueError("prompt must be a string, token_ids a list of at least one integer")
    return text


def canary_request(payload: str, *, takes_text: bool, bos: int | None) -> GenerationRequest:
    """The request of a worker that takes text, or token ids only; `payload` as from `parse_payload`, or empty for the default."""
    given: dict[str, Any] = json.loads(payload) if payload else {"prompt": TEXT} if takes_text else {"token_ids": [bos or DEFAULT_BOS]}
    sampling = {**_SAMPLING, **given.get("sampling_options", {}), **given.get("stop_conditions", {})}
    return GenerationRequest(
        request_id=f"canary-{uuid.uuid4().hex}", prompt=given.get("prompt") or given["token_ids"], images=(), stream=False,
        prepend_input=False, sampling=sampling, returns=frozenset(), handoff=None, priority=0, timeout_s=None,
    )


@dataclass(frozen=True)
class Patience:
    """After how much idleness a canary is sent, when its answer is late, and when it is given up; seconds."""

    wait_s: float
    timeout_s: float
    give_up_s: float


class Canary:
    """Sends a canary whenever the worker has been idle. Resource handling: whoever cancels `run` also ends the canary in flight."""

    def __init__(self, send: Callable[[], Awaitable[None]], idle_s: Callable[[], float], tell: Callable[[str | None], None],
                 patience: Patience) -> None:
        """`idle_s` is for how long the worker has had no request; `tell` takes why it is unwell, or None when it is well."""
        self._send = send
        self._idle_s = idle_s
        self._tell = tell
        self._patience = patience

    async def run(self) -> None:
        """Until cancelled. Between two canaries there is one wait, also without traffic."""
        while True:
            if self._idle_s() >= self._patience.wait_s:
                await self.check()
                await asyncio.sleep(self._patience.wait_s)
            else:
                await asyncio.sleep(self._patience.wait_s / _LOOKS_PER_WAIT)

    async def check(self) -> None:
        """One canary, to its end."""
        sending = asyncio.ensure_future(self._send())
        try:
            await asyncio.wait({sending}, timeout=self._patience.timeout_s)
            if not sending.done():
                self._note(f"the engine did not answer a canary request within {self._patience.timeout_s:g} s "
                           "(DYN_HEALTH_CHECK_REQUEST_TIMEOUT)")
                await asyncio.wait({sending}, timeout=self._patience.give_up_s)
            self._conclude(sending)
        finally:
            sending.cancel()

    def _conclude(self, sending: "asyncio.Future[None]") -> None:
        if not sending.done():
            return  # unwell already
        exc = sending.exception()
        self._note(None if exc is None else f"the engine failed on a canary request: {exc}")

    def _note(self, reason: str | None) -> None:
        if reason is not None:
            log.warning("canary.failed: %s", reason)
        self._tell(reason)
