# SPDX-License-Identifier: Apache-2.0
"""The connector that only says what it would do: `--no-operation`."""

import logging
from collections.abc import Mapping

from tandem_planner.connectors.interface import Connector
from tandem_planner.terms import Pool
from tandem_protocol.roles import Role

log = logging.getLogger(__name__)


class DryRunConnector(Connector):
    """Sees the fleet through another connector, and never changes it."""

    def __init__(self, seen: Connector) -> None:
        self._seen = seen

    async def pools(self) -> Mapping[Role, Pool]:
        """As they are."""
        return await self._seen.pools()

    async def scale(self, role: Role, count: int) -> None:
        """Logs."""
        log.info("planner.dry_run role=%s workers=%d: nothing is changed", role, count)

    async def close(self) -> None:
        """Closes the other."""
        await self._seen.close()
