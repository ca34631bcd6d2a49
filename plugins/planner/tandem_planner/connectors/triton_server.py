# SPDX-License-Identifier: Apache-2.0
"""The model repository of one tritonserver, over HTTP. Edge module: knows aiohttp.

An unload is asked for and looked after: tritonserver 2.51 answers before the model is gone, and a model of which it keeps a request
(docs/limits.md, "Triton") never goes. A load answers when the model serves, which for an engine takes minutes.
"""

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import aiohttp
import msgspec

from tandem_planner.connectors.interface import Bounds
from tandem_protocol.errors import UnavailableError


class ModelState(StrEnum):
    """As the repository's index says it."""

    READY = "READY"
    LOADING = "LOADING"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"
    """Not loaded, also where the index says nothing."""


@dataclass(frozen=True)
class Model:
    """One model of the repository."""

    name: str
    state: ModelState
    reason: str = ""


class _Entry(msgspec.Struct):
    name: str
    state: str = ""
    reason: str = ""


class TritonServer:
    """One server. Used on one event loop. Resource handling: `close` ends its connections."""

    def __init__(self, url: str, bounds: Bounds) -> None:
        self._url = url
        self._bounds = bounds
        self._opened: aiohttp.ClientSession | None = None

    async def models(self) -> tuple[Model, ...]:
        """The repository's index, in order of names. Raises UnavailableError."""
        body = await self._post("/v2/repository/index", self._bounds.call_s)
        try:
            entries = msgspec.json.decode(body, type=list[_Entry])
            return tuple(sorted((Model(entry.name, ModelState(entry.state or "UNAVAILABLE"), entry.reason) for entry in entries),
                                key=lambda model: _natural(model.name)))
        except (msgspec.DecodeError, ValueError) as exc:
            raise UnavailableError(f"{self._url} does not answer as tritonserver does: {exc}") from exc

    async def load(self, name: str) -> None:
        """Returns when the model serves. Raises UnavailableError with Triton's reason."""
        await self._post(f"/v2/repository/models/{name}/load", self._bounds.scale_s)

    async def unload(self, name: str) -> None:
        """Returns when the model is gone. Raises UnavailableError with the reason when it isn't within the bound."""
        await self._post(f"/v2/repository/models/{name}/unload", self._bounds.scale_s)
        try:
            async with asyncio.timeout(self._bounds.scale_s):
                while (model := await self._find(name)).state is not ModelState.UNAVAILABLE:  # noqa: ASYNC110 - another process's state
                    await asyncio.sleep(self._bounds.check_s)
        except TimeoutError as exc:
            raise UnavailableError(f"model {name} is still {model.state} {self._bounds.scale_s:g} s after its unload: "
                                   "requests that Triton believes in may hold it; restart this tritonserver") from exc

    async def _find(self, name: str) -> Model:
        return next((model for model in await self.models() if model.name == name), Model(name, ModelState.UNAVAILABLE))

    async def _post(self, path: str, timeout_s: float) -> bytes:
        if self._opened is None:
            self._opened = aiohttp.ClientSession()
        try:
            async with self._opened.post(f"{self._url}{path}", json={}, timeout=aiohttp.ClientTimeout(total=timeout_s)) as answer:
                body = await answer.read()
        except (aiohttp.ClientError, TimeoutError) as exc:
            reason = str(exc) or f"no answer within {timeout_s:g} s"
            raise UnavailableError(f"tritonserver at {self._url}{path} can't be asked: {reason}") from exc
        if answer.status != 200:
            raise UnavailableError(f"tritonserver refuses {path}: {_error_of(body)}")
        return body

    async def close(self) -> None:
        """Ends its connections; repeating it does nothing."""
        session, self._opened = self._opened, None
        if session is not None:
            await session.close()


def _natural(name: str) -> tuple[str, int]:
    """Ordering in which vllm_10 follows vllm_9."""
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem):] or -1)


def _error_of(body: bytes) -> str:
    try:
        said: Any = msgspec.json.decode(body)
        return str(said["error"])
    except (msgspec.DecodeError, TypeError, KeyError):
        return body[:200].decode(errors="replace")
