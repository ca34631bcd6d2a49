# SPDX-License-Identifier: Apache-2.0
"""Discovery: where workers (and routers, each kind apart) leave their records, and where routers and planners watch them.

One interface and four stores, chosen by a URL: `memory:` (one process), `file:/folder` (one host, no server),
`etcd://host:port[/prefix]` (many hosts), and `kubernetes[://namespace/fleet]` (one cluster, no server of ours). Every store keeps the
same contract, written at `Discovery` and `Registration`; tests/discovery_contract.py checks it for all.
"""

import importlib

from tandem_protocol.discovery.interface import DEBOUNCE_S, LEASE_TTL_S, Counts, Discovery, R, Registration, Snapshot
from tandem_protocol.errors import ConfigError
from tandem_protocol.workers import WorkerRecord

__all__ = ["DEBOUNCE_S", "LEASE_TTL_S", "Counts", "Discovery", "Registration", "Snapshot", "check_url", "open_collection",
           "open_discovery"]

_STORES = {
    "memory": "tandem_protocol.discovery.memory:open_memory",
    "file": "tandem_protocol.discovery.file:open_folder",
    "etcd": "tandem_protocol.discovery.etcd:open_etcd",
    "kubernetes": "tandem_protocol.discovery.kubernetes:open_kubernetes",
}
"""Scheme -> what opens it; imported when asked for, so that only users of etcd or Kubernetes need their clients."""
_ALONE = "kubernetes"
"""The scheme that needs no more: the pod says the rest."""


def check_url(url: str) -> str:
    """Returns `url` if a store of its scheme exists; raises ValueError. Empty means no discovery and passes."""
    scheme, colon, _ = url.partition(":")
    if url and url != _ALONE and (not colon or scheme not in _STORES):
        raise ValueError("expected file:/folder, etcd://host:port[/prefix], kubernetes[://namespace/fleet] or memory:, "
                         "or nothing for no discovery")
    return url


def open_discovery(url: str) -> Discovery:
    """Opens the workers' store of `url`; see `open_collection`."""
    return open_collection(url, WorkerRecord)


def open_collection(url: str, kind: type[R]) -> Discovery[R]:
    """Opens the store of `url` for records of one kind; asks no store yet. The caller closes it.

    Use one discovery object on one event loop. Raises ConfigError for a URL that no store understands, and for Kubernetes where there
    are no credentials.
    """
    try:
        scheme, _, rest = check_url(url).partition(":")
    except ValueError as exc:
        raise ConfigError(f"TANDEM_DISCOVERY={url!r} is not valid: {exc}") from exc
    if not scheme:
        raise ConfigError("there is no discovery to open: set TANDEM_DISCOVERY, e.g. to file:/run/tandem/discovery")
    module, _, name = _STORES[scheme].partition(":")
    opened: Discovery[R] = getattr(importlib.import_module(module), name)(rest, kind)
    return opened
