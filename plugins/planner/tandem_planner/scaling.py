# SPDX-License-Identifier: Apache-2.0
"""Has the connector do what was decided, one change per role at a time, in the background: a start of minutes must not blind the planner.

A newer decision for a role cancels the change under way. A change that fails is logged and counted, and the fleet stays as it is; the
same is tried again after a while, if it is still decided.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tandem_planner.connectors.interface import Connector
from tandem_planner.terms import Pool
from tandem_protocol.errors import TandemError
from tandem_protocol.roles import Role

log = logging.getLogger(__name__)

_CANCEL_S = 10.0
"""A cancelled change may still have a call under way; its deadline is shorter."""


@dataclass
class Change:
    """What a role was last told."""

    count: int
    task: "asyncio.Task[None]"
    failed_at_s: float | None = None
    """On the scaler's clock."""


@dataclass
class Scaler:
    """One fleet's. Used on one event loop. Resource handling: `close` cancels what is under way; the connector is not its own."""

    connector: Connector
    retry_s: float
    clock: Callable[[], float]
    """Monotonic seconds."""
    ended: Callable[[Role, str], None]
    """Told of each change's end: `done`, `failed`, `cancelled`."""
    _changes: dict[Role, Change] = field(default_factory=dict)

    async def follow(self, target: Mapping[Role, int], pools: Mapping[Role, Pool]) -> None:
        """Begins what the target asks for. Returns at once, but for a change that has to be cancelled, which is bounded."""
        for role, count in target.items():
            pool = pools.get(role)
            if pool is None:
                log.warning("planner.no_pool role=%s: the decision has %d workers for it, the connector knows none", role, count)
            elif self._is_due(role, count, pool):
                await self._begin(role, count, pool)

    def _is_due(self, role: Role, count: int, pool: Pool) -> bool:
        """Something is to change, or was left half-done, and isn't under way nor failed a moment ago."""
        last = self._changes.get(role)
        if last is not None and last.count == count:
            if not last.task.done():
                return False
            if last.failed_at_s is not None and self.clock() - last.failed_at_s < self.retry_s:
                return False
        under_way = last is not None and not last.task.done()
        return under_way or count != pool.wanted or not pool.settled

    async def _begin(self, role: Role, count: int, pool: Pool) -> None:
        last = self._changes.get(role)
        if last is not None and not last.task.done():
            last.task.cancel()
            await asyncio.wait([last.task], timeout=_CANCEL_S)
            if not last.task.done():
                log.warning("planner.change_stuck role=%s workers=%d: it is not followed by another yet", role, last.count)
                return
        log.info("planner.scale role=%s from=%d to=%d", role, pool.wanted, count)
        self._changes[role] = Change(count, asyncio.create_task(self._scale(role, count), name=f"scale {role} to {count}"))

    async def _scale(self, role: Role, count: int) -> None:
        try:
            await self.connector.scale(role, count)
        except TandemError as exc:
            self._failed(role, str(exc))
        except asyncio.CancelledError:
            self.ended(role, "cancelled")
            raise
        except Exception as exc:  # a connector's bug must not end the planner: the fleet stays as it is
            log.exception("planner.connector_bug role=%s", role)
            self._failed(role, f"{type(exc).__name__}: {exc}")
        else:
            log.info("planner.scaled role=%s workers=%d", role, count)
            self.ended(role, "done")

    def _failed(self, role: Role, reason: str) -> None:
        log.error("planner.scale_failed role=%s reason=%s; the fleet stays as it is", role, reason)
        self._changes[role].failed_at_s = self.clock()
        self.ended(role, "failed")

    @property
    def under_way(self) -> Mapping[Role, int]:
        """Role -> what its pool is being brought to."""
        return {role: change.count for role, change in self._changes.items() if not change.task.done()}

    async def close(self) -> None:
        """Cancels what is under way, within a bound."""
        tasks = [change.task for change in self._changes.values() if not change.task.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CANCEL_S)
