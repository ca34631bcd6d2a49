# SPDX-License-Identifier: Apache-2.0
"""Asks one Prometheus over its HTTP API. Edge module: knows aiohttp. Every question has a deadline."""

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
import msgspec

from tandem_protocol.errors import UnavailableError

_CONNECTIONS = 4
"""Questions under way at a time: a look asks some twenty, which is no reason to crowd others out."""


@dataclass(frozen=True)
class Sample:
    """One series of an answer."""

    labels: Mapping[str, str]
    value: float
    """May be NaN or infinite: that is for the reader to judge."""


class Asks(Protocol):
    """What answers queries."""

    async def query(self, expression: str) -> tuple[Sample, ...]:
        """An instant query now. Raises UnavailableError."""

    async def close(self) -> None:
        """Ends its connections."""


class _Series(msgspec.Struct):
    metric: dict[str, str]
    value: tuple[float, str]


class _Data(msgspec.Struct):
    resultType: str
    result: list[msgspec.Raw]


class _Answer(msgspec.Struct):
    status: str
    data: _Data | None = None
    error: str = ""


class Prometheus:
    """One server. Used on one event loop. Resource handling: `close` ends its connections."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = f"{url}/api/v1/query"
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def query(self, expression: str) -> tuple[Sample, ...]:
        """An instant query now. Raises UnavailableError with what was wrong, after the deadline at the latest."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return _samples(expression, await self._post(expression))
        except TimeoutError as exc:
            raise UnavailableError(f"Prometheus did not answer within {self._timeout_s:g} s") from exc
        except aiohttp.ClientError as exc:
            raise UnavailableError(f"Prometheus at {self._url} can't be asked: {exc}") from exc

    async def _post(self, expression: str) -> bytes:
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=_CONNECTIONS))
        async with self._session.post(self._url, data={"query": expression}) as answer:
            return await answer.read()

    async def close(self) -> None:
        """Ends its connections; repeating it does nothing."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


def _samples(expression: str, body: bytes) -> tuple[Sample, ...]:
    """Raises UnavailableError for what is not an answer of Prometheus, or one that says that it failed."""
    try:
        answer = msgspec.json.decode(body, type=_Answer)
        if answer.status != "success" or answer.data is None:
            raise UnavailableError(f"Prometheus refuses {expression!r}: {answer.error}")
        if answer.data.resultType != "vector":
            raise UnavailableError(f"Prometheus answers {expression!r} with a {answer.data.resultType}, not a vector")
        return tuple(_sample(msgspec.json.decode(raw, type=_Series)) for raw in answer.data.result)
    except (msgspec.DecodeError, ValueError) as exc:
        raise UnavailableError(f"what answers in Prometheus' place is none: {exc}") from exc


def _sample(series: _Series) -> Sample:
    return Sample(series.metric, float(series.value[1]))


def only_value(samples: tuple[Sample, ...]) -> float | None:
    """The value of an answer with one series; None where there is none, or no finite one."""
    return samples[0].value if len(samples) == 1 and math.isfinite(samples[0].value) else None


async def ask_all(prometheus: Asks, queries: Mapping[str, str]) -> dict[str, tuple[Sample, ...]]:
    """All queries, together. Raises UnavailableError as soon as one can't be answered: figures of one look belong together."""
    tasks: dict[str, asyncio.Task[Any]] = {}
    try:
        async with asyncio.TaskGroup() as group:
            for name, expression in queries.items():
                tasks[name] = group.create_task(prometheus.query(expression))
    except* UnavailableError as failed:
        raise UnavailableError(str(failed.exceptions[0])) from failed.exceptions[0]
    return {name: task.result() for name, task in tasks.items()}
