# SPDX-License-Identifier: Apache-2.0
"""From connector names to vLLM's KV-transfer configuration.

Names and combinations are those of `--connector`: `nixl` moves KV between engines, `lmcache` and `kvbm` offload it, and
`null` or `none` alone means no connector. Several are joined by vLLM's MultiConnector in the given order: it loads from
the first with a hit and saves to all.
"""

from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role

VALID = ("nixl", "lmcache", "kvbm", "null", "none")
KV_ROLE = {Role.AGGREGATED: "kv_both", Role.PREFILL: "kv_producer", Role.DECODE: "kv_consumer", Role.ENCODE: "kv_both"}

_CONNECTORS: dict[str, dict[str, Any]] = {
    "nixl": {"kv_connector": "NixlConnector"},
    "lmcache": {"kv_connector": "LMCacheConnectorV1"},
    "kvbm": {
        "kv_connector": "OffloadingConnector",
        "kv_connector_extra_config": {"spec_name": "KvbmSpec", "spec_module_path": "tandem_kvbm.spec"},
    },
}
_PACKAGES = {"nixl": "nixl", "lmcache": "lmcache", "kvbm": "tandem_kvbm"}
_INSTALL = {
    "nixl": "install the packages nixl and nixl-cu12 or nixl-cu13",
    "lmcache": "install the package lmcache with --no-deps (its own pins contradict vLLM's) and what it then misses",
    "kvbm": "install the plugin tandem_kvbm, which is a part of Tandem",
}


def _installed(package: str) -> bool:
    return find_spec(package) is not None


def parse_connectors(names: tuple[str, ...], role: Role) -> tuple[str, ...]:
    """Checks the names against each other and the role; () means no connector."""
    unknown = [name for name in names if name not in VALID]
    if unknown:
        raise ConfigError(f"unknown connector {unknown[0]!r}: choose from {', '.join(VALID)}")
    if len(set(names)) != len(names):
        raise ConfigError(f"connector given twice in {' '.join(names)!r}: name each once")
    if {"null", "none"} & set(names):
        if len(names) > 1:
            raise ConfigError(f"connector null/none can't be combined, got {' '.join(names)!r}: give it alone or not at all")
        names = ()
    if role.is_disaggregated and "nixl" not in names:
        raise ConfigError(f"a {role} worker needs the connector nixl to hand KV over: add it, or use the role aggregated")
    return names


def transfer_config(names: tuple[str, ...], role: Role, installed: Callable[[str], bool] = _installed) -> dict[str, Any] | None:
    """vLLM's KVTransferConfig as a dict, or None without connectors. Raises ConfigError for a package that is not there.

    A block that fails to load is recomputed: a lost block must cost time, never a request.
    """
    missing = [name for name in names if not installed(_PACKAGES[name])]
    if missing:
        raise ConfigError(f"connector {missing[0]!r} is not installed: {_INSTALL[missing[0]]}, or choose another --connector")
    children = [{**deepcopy(_CONNECTORS[name]), "kv_role": KV_ROLE[role]} for name in names]
    if not children:
        return None
    if len(children) == 1:
        return {**children[0], "kv_load_failure_policy": "recompute"}
    return {
        "kv_connector": "MultiConnector",
        "kv_role": KV_ROLE[role],
        "kv_connector_extra_config": {"connectors": children},
        "kv_load_failure_policy": "recompute",
    }
