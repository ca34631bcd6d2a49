# SPDX-License-Identifier: Apache-2.0
"""A worker's settings."""

import pytest

from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role
from tandem_worker.config import IGNORED_PARAMETERS, TRITON_PARAMETERS, WorkerSettings, load_settings, setting_names


@pytest.mark.parametrize(
    ("environ", "role"),
    [({}, Role.AGGREGATED), ({"DYN_VLLM_IS_PREFILL_WORKER": "true"}, Role.PREFILL), ({"DYN_VLLM_IS_DECODE_WORKER": "1"}, Role.DECODE)],
)
def test_role_without_config(environ: dict[str, str], role: Role) -> None:
    """Without a word the worker is aggregated; either flag says otherwise."""
    assert load_settings({}, environ).effective_role is role


@pytest.mark.parametrize(("flag", "role"), [("DYN_VLLM_IS_PREFILL_WORKER", Role.PREFILL), ("DYN_VLLM_IS_DECODE_WORKER", Role.DECODE)])
@pytest.mark.parametrize("configured", list(Role))
def test_role_flags_win_over_the_configured_role(flag: str, role: Role, configured: Role) -> None:
    """As in Dynamo, where the flags are all there is."""
    assert load_settings({"role": configured.value}, {flag: "true"}).effective_role is role


def test_both_role_flags_contradict_each_other() -> None:
    """One worker has one role."""
    with pytest.raises(ConfigError, match="exclude each other"):
        load_settings({"is_prefill_worker": "true", "is_decode_worker": "true"}, {})


def test_an_unknown_role_is_refused() -> None:
    """The message says where it stands."""
    with pytest.raises(ConfigError, match="parameter 'role'='prefil' is not valid"):
        load_settings({"role": "prefil"}, {})


@pytest.mark.parametrize(("port", "index", "effective"), [("8081", "0", 8081), ("8081", "3", 8084), ("0", "3", 0), ("-1", "3", -1)])
def test_admin_port_is_offset_by_the_worker_index(port: str, index: str, effective: int) -> None:
    """But not 0 for any port, nor -1 for none."""
    assert load_settings({"worker_index": index}, {"DYN_SYSTEM_PORT": port}).effective_admin_port == effective


@pytest.mark.parametrize("name", sorted(IGNORED_PARAMETERS | TRITON_PARAMETERS))
def test_parameters_of_triton_and_of_its_vllm_backend_are_accepted(name: str) -> None:
    """A config.pbtxt written for vllm_backend loads as it is."""
    assert load_settings({name: "yes"}, {}) == WorkerSettings()


def test_unknown_parameters_are_refused() -> None:
    """A typo must not pass for a default."""
    with pytest.raises(ConfigError, match="unknown parameter 'rolle'"):
        load_settings({"rolle": "prefill"}, {})


@pytest.mark.parametrize(
    ("parameters", "connectors"),
    [({}, ("none",)), ({"role": "prefill"}, ("nixl",)), ({"role": "decode"}, ("nixl",)),
     ({"role": "prefill", "connector": "nixl lmcache"}, ("nixl", "lmcache")), ({"connector": "null"}, ("null",))],
)
def test_connectors_default_by_role(parameters: dict[str, str], connectors: tuple[str, ...]) -> None:
    """NIXL where KV is handed over, else nothing; what is given wins."""
    assert load_settings(parameters, {}).effective_connectors == connectors


@pytest.mark.parametrize(
    ("variable", "value"),
    [("DYN_VLLM_KV_EVENT_PORT", "50000"), ("VLLM_NIXL_SIDE_CHANNEL_PORT", "80"), ("DYN_SYSTEM_PORT", "-2"), ("DYN_SYSTEM_PORT", "65536"),
     ("TANDEM_RESPONSE_RATE", "0"), ("TANDEM_DRAIN_TIMEOUT_S", "-1"), ("TANDEM_CANCEL_POLL_S", "0"), ("TANDEM_WORKER_INDEX", "1000")],
)
def test_values_out_of_bounds_are_refused(variable: str, value: str) -> None:
    """The message names the variable."""
    with pytest.raises(ConfigError, match=f"{variable}='{value}'"):
        load_settings({}, {variable: value})


def test_the_process_environment_is_the_default_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a worker nothing is handed in."""
    monkeypatch.setenv("TANDEM_WORKER_INDEX", "7")
    assert load_settings({}).worker_index == 7


def test_every_variable_is_used_once() -> None:
    """Two settings behind one variable could not be told apart."""
    from tandem_protocol.settings import specs_of

    specs = specs_of(WorkerSettings)
    assert tuple(specs) == setting_names()
    assert len({spec.env for spec in specs.values()}) == len(specs)
