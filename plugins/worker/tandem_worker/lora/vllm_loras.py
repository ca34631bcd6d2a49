# SPDX-License-Identifier: Apache-2.0
"""vLLM's side of adapters. Edge module: calls vLLM; runs on the event loop."""

import asyncio
import logging
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from tandem_protocol.errors import RequestError, UnavailableError
from tandem_worker.lora.adapter import Adapter

log = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 120.0
"""A change of adapters waits for the step that is under way, which may be a long prompt on few cores; vLLM offers no other bound."""


class VllmLoras:
    """The adapters in one engine."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine

    @property
    def takes_loras(self) -> bool:
        """Whether it was started with --enable-lora."""
        return self._engine.vllm_config.lora_config is not None

    async def add(self, adapter: Adapter) -> None:
        """Reads the files and puts them on the device. Raises RequestError with vLLM's reason, UnavailableError."""
        if not await self._ask(self._engine.add_lora(lora_request(adapter)), f"load {adapter.name!r}"):
            raise RequestError(f"vLLM did not take the adapter {adapter.name!r}: see the server's log")

    async def remove(self, adapter: Adapter) -> None:
        """Also of one that the engine has evicted already. Raises UnavailableError."""
        try:
            await self._ask(self._engine.remove_lora(adapter.id), f"unload {adapter.name!r}")
        except RequestError as exc:
            raise UnavailableError(f"the engine did not unload {adapter.name!r}: {exc}") from exc

    async def _ask(self, call: Any, what: str) -> Any:
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                return await call
        except TimeoutError as exc:
            raise UnavailableError(f"the engine did not {what} within {_ANSWER_TIMEOUT_S:g} s: retry later") from exc
        except EngineDeadError as exc:
            raise UnavailableError("the engine of this worker died: retry on another worker or after its restart") from exc
        except Exception as exc:  # what vLLM refuses comes back as a bare Exception with its words
            raise RequestError(f"vLLM can't {what}: {_reason(exc)}") from exc


def lora_request(adapter: Adapter) -> LoRARequest:
    """As vLLM wants it with each request."""
    return LoRARequest(lora_name=adapter.name, lora_int_id=adapter.id, lora_path=adapter.path)


def _reason(exc: Exception) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[-1] if lines else type(exc).__name__
