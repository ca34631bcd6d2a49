# SPDX-License-Identifier: Apache-2.0
"""The contract of every connector: what starts and ends workers."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from tandem_planner.terms import Pool
from tandem_protocol.errors import UnavailableError
from tandem_protocol.roles import Role

ROLE_LABEL = "tandem.dev/role"
FLEET_LABEL = "tandem.dev/fleet"


@dataclass(frozen=True)
class Bounds:
    """Seconds."""

    call_s: float
    """One call to whoever holds the workers."""
    scale_s: float
    """One change of a pool, until its new workers take requests."""
    check_s: float
    """Between two looks whether a change is done."""
    drain_s: float
    """For a worker that is to go, to end its requests and hand over its KV."""


class Connector(ABC):
    """Scales the pools of one fleet. Used on one event loop; `scale` of different roles may run at the same time, of one role not.

    Resource handling: `close` ends its connections and leaves the fleet as it is.
    """

    @abstractmethod
    async def pools(self) -> Mapping[Role, Pool]:
        """Every pool that there is to scale, without loads; changes nothing.

        Raises UnavailableError if that can't be told now. Ends within a few calls' deadline.
        """

    @abstractmethod
    async def scale(self, role: Role, count: int) -> None:
        """Brings a pool to `count` workers; returns when that many take requests and the others are gone.

        Idempotent: what is so already is left alone, what an earlier call left half-done is finished. It may be cancelled at any time; the
        fleet is then somewhere between, and every worker either serves or drains. Workers that go are drained first.

        Raises UnavailableError with a sentence when it can't be done now or took too long, ConfigError when it never could.
        """

    async def close(self) -> None:  # noqa: B027 - a connector may have nothing to close
        """Ends its connections; repeating it does nothing."""


async def wait_until(done: Callable[[], Awaitable[bool]], bounds: Bounds, what: str) -> None:
    """Looks every `check_s` until it is done. Raises UnavailableError after `scale_s`."""
    try:
        async with asyncio.timeout(bounds.scale_s):
            while not await done():  # noqa: ASYNC110 - the state is another process's
                await asyncio.sleep(bounds.check_s)
    except TimeoutError as exc:
        raise UnavailableError(f"not within {bounds.scale_s:g} s: {what}") from exc
