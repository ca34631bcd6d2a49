# SPDX-License-Identifier: Apache-2.0
"""From connector names to vLLM's KV-transfer configuration."""

import pytest

from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role
from tandem_worker.connectors import KV_ROLE, parse_connectors, transfer_config

KINDS = {"nixl": "NixlConnector", "lmcache": "LMCacheConnectorV1", "kvbm": "OffloadingConnector"}


def everything(_: str) -> bool:
    """Every package is installed."""
    return True


@pytest.mark.parametrize("names", [(), ("null",), ("none",)])
def test_null_and_none_alone_mean_no_connector(names: tuple[str, ...]) -> None:
    """As an empty list does."""
    assert parse_connectors(names, Role.AGGREGATED) == ()
    assert transfer_config((), Role.AGGREGATED, everything) is None


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("names", [("nixl",), ("nixl", "lmcache"), ("lmcache", "nixl"), ("nixl", "kvbm"), ("nixl", "lmcache", "kvbm")])
def test_combinations_with_nixl_fit_every_role(names: tuple[str, ...], role: Role) -> None:
    """The order is kept: the first with a hit is loaded from."""
    assert parse_connectors(names, role) == names


@pytest.mark.parametrize("names", [("lmcache",), ("kvbm",), ("lmcache", "kvbm")])
def test_offloading_alone_fits_an_aggregated_worker(names: tuple[str, ...]) -> None:
    """It hands nothing over, so it needs no NIXL."""
    assert parse_connectors(names, Role.AGGREGATED) == names


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("names", [(), ("none",), ("null",), ("lmcache",), ("kvbm", "lmcache")])
def test_disaggregated_roles_need_nixl(names: tuple[str, ...], role: Role) -> None:
    """Without it there is no handoff."""
    with pytest.raises(ConfigError, match=f"a {role} worker needs the connector nixl"):
        parse_connectors(names, role)


@pytest.mark.parametrize(
    ("names", "message"),
    [(("nixel",), "unknown connector 'nixel': choose from nixl"), (("nixl", "nixl"), "given twice in 'nixl nixl'"),
     (("null", "nixl"), "can't be combined"), (("nixl", "none"), "can't be combined"), (("null", "none"), "can't be combined")],
)
def test_contradictions_are_refused(names: tuple[str, ...], message: str) -> None:
    """Each with a sentence that says the fix."""
    with pytest.raises(ConfigError, match=message):
        parse_connectors(names, Role.DECODE)


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
@pytest.mark.parametrize("role", list(KV_ROLE))
def test_one_connector_stands_for_itself(name: str, kind: str, role: Role) -> None:
    """With the role's direction, and recomputing what fails to load."""
    config = transfer_config((name,), role, everything)
    assert config is not None
    assert (config["kv_connector"], config["kv_role"], config["kv_load_failure_policy"]) == (kind, KV_ROLE[role], "recompute")


@pytest.mark.parametrize("names", [("lmcache",), ("kvbm",), ("nixl",), ("lmcache", "nixl"), ("kvbm", "nixl")])
@pytest.mark.parametrize("role", list(KV_ROLE))
def test_vllm_takes_what_is_built(names: tuple[str, ...], role: Role) -> None:
    """Its configuration is checked, and its factory knows the names."""
    config = pytest.importorskip("vllm.config").KVTransferConfig(**(transfer_config(names, role, everything) or {}))
    known = pytest.importorskip("vllm.distributed.kv_transfer.kv_connector.factory").KVConnectorFactory._registry
    children = config.kv_connector_extra_config.get("connectors", [{"kv_connector": config.kv_connector}])
    assert config.kv_connector in known
    assert [child["kv_connector"] for child in children] == [KINDS[name] for name in names]
    assert {child["kv_connector"] for child in children} <= known.keys()


def test_several_connectors_are_joined_in_order() -> None:
    """By vLLM's MultiConnector, every child with the role's direction."""
    config = transfer_config(("nixl", "lmcache", "kvbm"), Role.PREFILL, everything)
    assert config is not None
    assert (config["kv_connector"], config["kv_role"], config["kv_load_failure_policy"]) == ("MultiConnector", "kv_producer", "recompute")
    children = config["kv_connector_extra_config"]["connectors"]
    assert [child["kv_connector"] for child in children] == list(KINDS.values())
    assert {child["kv_role"] for child in children} == {"kv_producer"}


@pytest.mark.parametrize(("name", "fix"), [("nixl", "nixl-cu12"), ("lmcache", "the package lmcache"), ("kvbm", "the plugin tandem_kvbm")])
def test_a_connector_that_is_not_installed_is_named(name: str, fix: str) -> None:
    """With what to install."""
    with pytest.raises(ConfigError, match=f"connector '{name}' is not installed: .*{fix}"):
        transfer_config((name,), Role.AGGREGATED, lambda package: package not in {"nixl", "lmcache", "tandem_kvbm"})


def test_the_shared_table_is_not_handed_out() -> None:
    """What the engine writes into its configuration must not reach the next one."""
    first = transfer_config(("kvbm",), Role.DECODE, everything)
    assert first is not None
    first["kv_connector"] = "changed"
    first["kv_connector_extra_config"]["spec_name"] = "changed"
    second = transfer_config(("kvbm",), Role.DECODE, everything)
    assert second is not None
    assert (second["kv_connector"], second["kv_connector_extra_config"]["spec_name"]) == ("OffloadingConnector", "KvbmSpec")
