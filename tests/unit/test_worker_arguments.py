# SPDX-License-Identifier: Apache-2.0
"""Completing and checking engine arguments."""

from dataclasses import replace
from typing import Any

import pytest

from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role
from tandem_worker.arguments import Platform, complete
from tandem_worker.config import WorkerSettings

KNOWN = frozenset({
    "model", "served_model_name", "block_size", "enable_prefix_caching", "scheduling_policy", "enable_log_requests", "disable_log_stats",
    "kv_transfer_config", "kv_events_config", "tensor_parallel_size", "data_parallel_size", "distributed_executor_backend", "max_model_len",
})
GPU, CPU = Platform(False, KNOWN), Platform(True, KNOWN)
MODEL = {"model": "org/name"}
AGGREGATED = WorkerSettings()
PREFILL, DECODE = WorkerSettings(role=Role.PREFILL), WorkerSettings(role=Role.DECODE)


@pytest.fixture(autouse=True)
def _nixl_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the suite runs without it."""
    monkeypatch.setattr("tandem_worker.connectors.find_spec", lambda package: object() if package == "nixl" else None)


@pytest.mark.parametrize(
    ("name", "value"),
    [("enable_prefix_caching", True), ("scheduling_policy", "priority"), ("enable_log_requests", False), ("disable_log_stats", False),
     ("kv_transfer_config", None)],
)
def test_defaults(name: str, value: object) -> None:
    """What an aggregated worker gets that vLLM would not choose by itself."""
    assert complete(MODEL, AGGREGATED, GPU)[name] == value


@pytest.mark.parametrize(("platform", "size"), [(GPU, 16), (CPU, 32)])
def test_block_size_depends_on_the_platform(platform: Platform, size: int) -> None:
    """vLLM's CPU kernels want multiples of 32."""
    assert complete(MODEL, AGGREGATED, platform)["block_size"] == size


@pytest.mark.parametrize(
    ("name", "value"),
    [("enable_prefix_caching", False), ("scheduling_policy", "fcfs"), ("block_size", 64), ("disable_log_stats", True),
     ("max_model_len", 99)],
)
def test_what_is_given_wins(name: str, value: object) -> None:
    """model.json is the operator's word."""
    assert complete({**MODEL, name: value}, AGGREGATED, CPU)[name] == value


@pytest.mark.parametrize("name", ["enable_prefix_caching", "block_size", "scheduling_policy"])
def test_null_counts_as_not_given(name: str) -> None:
    """JSON's null asks for the default."""
    assert complete({**MODEL, name: None}, AGGREGATED, GPU)[name] is not None


def test_the_given_dict_stays_as_it_is() -> None:
    """Completing is pure."""
    given: dict[str, Any] = dict(MODEL)
    complete(given, PREFILL, GPU)
    assert given == MODEL


@pytest.mark.parametrize(("size", "platform"), [(0, GPU), (-16, GPU), ("16", GPU), (1.5, GPU), (16, CPU), (48, CPU)])
def test_impossible_block_sizes_are_refused(size: object, platform: Platform) -> None:
    """In milliseconds instead of after half a minute of engine start."""
    with pytest.raises(ConfigError, match="block_size"):
        complete({**MODEL, "block_size": size}, AGGREGATED, platform)


def test_small_blocks_are_fine_on_a_gpu() -> None:
    """The multiple of 32 is the CPU's."""
    assert complete({**MODEL, "block_size": 8}, AGGREGATED, GPU)["block_size"] == 8


@pytest.mark.parametrize(("name", "hint"), [("max_model_length", "did you mean 'max_model_len'"), ("foo", "see vLLM's engine arguments")])
def test_unknown_arguments_are_refused_with_a_hint(name: str, hint: str) -> None:
    """The nearest one that vLLM knows, if there is one."""
    with pytest.raises(ConfigError, match=f"unknown engine argument '{name}' in model.json: {hint}"):
        complete({**MODEL, name: 1}, AGGREGATED, GPU)


def test_the_setting_wins_over_the_model_of_model_json() -> None:
    """One shipped repository serves any model."""
    assert complete(MODEL, replace(AGGREGATED, model="/models/mine"), GPU)["model"] == "/models/mine"


@pytest.mark.parametrize("given", [{}, {"model": ""}, {"model": None}])
def test_a_model_must_be_named(given: dict[str, Any]) -> None:
    """Else vLLM would download its own default."""
    with pytest.raises(ConfigError, match="no model is named"):
        complete(given, AGGREGATED, GPU)


@pytest.mark.parametrize("names", ["one", ["one"]])
def test_one_served_name_is_fine(names: object) -> None:
    """As text or as a list."""
    assert complete({**MODEL, "served_model_name": names}, AGGREGATED, GPU)["served_model_name"] == names


def test_several_served_names_are_refused() -> None:
    """A Triton model has one name."""
    with pytest.raises(ConfigError, match="served_model_name has 2 entries"):
        complete({**MODEL, "served_model_name": ["a", "b"]}, AGGREGATED, GPU)


@pytest.mark.parametrize(
    ("settings", "given", "backend"),
    [(DECODE, {}, "mp"), (PREFILL, {"tensor_parallel_size": 1}, "mp"), (DECODE, {"tensor_parallel_size": 2}, None),
     (DECODE, {"distributed_executor_backend": "uni"}, "uni"), (AGGREGATED, {}, None),
     (replace(AGGREGATED, connector=("nixl",)), {}, "mp")],
)
def test_nixl_gets_a_process_of_its_own_on_one_gpu(settings: WorkerSettings, given: dict[str, Any], backend: str | None) -> None:
    """Only there would it share an interpreter with the scheduler, and only if nobody chose otherwise."""
    assert complete({**MODEL, **given}, settings, GPU).get("distributed_executor_backend") == backend


@pytest.mark.parametrize(("settings", "kv_role"), [(PREFILL, "kv_producer"), (DECODE, "kv_consumer")])
def test_disaggregated_roles_get_their_connector(settings: WorkerSettings, kv_role: str) -> None:
    """Without being asked."""
    config = complete(MODEL, settings, GPU)["kv_transfer_config"]
    assert (config["kv_connector"], config["kv_role"]) == ("NixlConnector", kv_role)


def test_a_given_transfer_config_is_kept() -> None:
    """It is the way to connectors that Tandem doesn't know."""
    own = {"kv_connector": "MyConnector", "kv_role": "kv_both"}
    assert complete({**MODEL, "kv_transfer_config": own}, PREFILL, GPU)["kv_transfer_config"] == own


def test_connector_and_transfer_config_contradict_each_other() -> None:
    """Nobody could say which one was meant."""
    with pytest.raises(ConfigError, match="exclude each other"):
        complete({**MODEL, "kv_transfer_config": {"kv_connector": "x"}}, replace(PREFILL, connector=("nixl",)), GPU)


def test_a_connector_that_is_not_installed_fails_before_the_engine() -> None:
    """The message is the connector's own."""
    with pytest.raises(ConfigError, match="connector 'lmcache' is not installed"):
        complete(MODEL, replace(AGGREGATED, connector=("lmcache",)), GPU)


def test_lmcache_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no connector for one, and would say so minutes later, in a traceback of the engine's process."""
    monkeypatch.setattr("tandem_worker.connectors.find_spec", lambda package: object())
    with pytest.raises(ConfigError, match="LMCache moves no KV blocks on CPUs"):
        complete(MODEL, replace(AGGREGATED, connector=("lmcache",)), CPU)
    config = complete(MODEL, replace(PREFILL, connector=("lmcache", "nixl")), GPU)["kv_transfer_config"]
    assert [child["kv_connector"] for child in config["kv_connector_extra_config"]["connectors"]] == ["LMCacheConnectorV1", "NixlConnector"]


@pytest.mark.parametrize(("settings", "published"), [(AGGREGATED, True), (PREFILL, True), (DECODE, False)])
def test_decode_workers_publish_no_kv_events(settings: WorkerSettings, published: bool) -> None:
    """Nobody should route a prompt by the blocks of a decode worker."""
    assert (complete(MODEL, settings, GPU)["kv_events_config"] is not None) is published


def test_no_kv_events_without_prefix_caching() -> None:
    """There are no blocks to tell of."""
    assert complete({**MODEL, "enable_prefix_caching": False}, AGGREGATED, GPU)["kv_events_config"] is None


@pytest.mark.parametrize(("index", "ranks", "port"), [(0, None, 20080), (2, None, 20082), (2, 1, 20082), (0, 4, 20080), (2, 4, 20088)])
def test_kv_event_ports_never_collide(index: int, ranks: int | None, port: int) -> None:
    """Each worker has one port per data-parallel rank; vLLM adds the rank itself."""
    config = complete({**MODEL, "data_parallel_size": ranks}, replace(AGGREGATED, worker_index=index), GPU)["kv_events_config"]
    assert config == {
        "enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{port}", "replay_endpoint": f"tcp://*:{port + 1000}",
    }


def test_kv_event_ports_stay_in_the_registered_range() -> None:
    """Ephemeral ports get taken by others."""
    with pytest.raises(ConfigError, match="KV-event port 49152 is beyond 49151"):
        complete({**MODEL, "data_parallel_size": 2}, replace(AGGREGATED, kv_event_port=49151), GPU)


def test_given_kv_events_are_kept() -> None:
    """Also on a decode worker, and also to turn them off."""
    own = {"enable_kv_cache_events": False}
    assert complete({**MODEL, "kv_events_config": own}, DECODE, GPU)["kv_events_config"] == own


@pytest.mark.parametrize(("given", "enabled", "expected"), [({}, True, True), ({}, False, None), ({"enable_lora": False}, True, False)])
def test_adapters_at_run_time_need_an_engine_for_them(given: dict[str, Any], enabled: bool, expected: bool | None) -> None:
    """Unless model.json says otherwise."""
    platform = Platform(is_cpu=True, known_arguments=KNOWN | {"enable_lora"})
    assert complete({**MODEL, **given}, WorkerSettings(lora_enabled=enabled), platform).get("enable_lora") is expected
