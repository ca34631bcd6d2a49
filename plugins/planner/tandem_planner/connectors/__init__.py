# SPDX-License-Identifier: Apache-2.0
"""Who starts and ends workers: one small interface, and a connector for each kind of host. Chosen by a table, imported when asked for."""

import importlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tandem_planner.connectors.interface import FLEET_LABEL, ROLE_LABEL, Bounds, Connector
from tandem_planner.service_config import ConnectorKind, ServiceSettings
from tandem_protocol.roles import Role
from tandem_protocol.workers import WorkerRecord

__all__ = ["FLEET_LABEL", "ROLE_LABEL", "Bounds", "Connector", "Means", "open_connector"]

_OPENERS = {kind: f"tandem_planner.connectors.opening:open_{kind}" for kind in ConnectorKind}


@dataclass(frozen=True)
class Means:
    """What connectors are made of."""

    settings: ServiceSettings
    roles: tuple[Role, ...]
    records: Callable[[], Awaitable[tuple[WorkerRecord, ...]]] | None
    """Lists the workers in discovery; None without one."""

    @property
    def bounds(self) -> Bounds:
        """The settings' times."""
        chosen = self.settings
        return Bounds(call_s=chosen.call_timeout_s, scale_s=chosen.scale_timeout_s, check_s=chosen.scale_check_s,
                      drain_s=chosen.drain_timeout_s)


def open_connector(means: Means) -> Connector:
    """The connector that the settings name. The caller closes it. Raises ConfigError."""
    module, _, name = _OPENERS[means.settings.connector].partition(":")
    opened: Connector = getattr(importlib.import_module(module), name)(means)
    return opened
