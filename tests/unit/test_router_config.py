# SPDX-License-Identifier: Apache-2.0
"""Settings of the router: names, defaults, contradictions."""

from typing import Any

import pytest

from tandem_protocol.errors import ConfigError
from tandem_protocol.settings import specs_of
from tandem_router.config import RouterMode, RouterSettings, load_settings


def test_defaults_route_by_kv() -> None:
    """Without any setting the router routes by cost and reads events."""
    settings = load_settings({}, {})
    assert settings == RouterSettings()
    assert settings.router_mode is RouterMode.KV
    assert settings.reads_events
    assert (settings.router_ttl, settings.router_max_tree_size, settings.router_prune_target_ratio) == (120, 1_048_576, 0.8)
    assert (settings.router_host_cache_hit_weight, settings.router_disk_cache_hit_weight) == (0.75, 0.25)


def test_environment_wins_over_parameters() -> None:
    """As for every component."""
    settings = load_settings({"router_mode": "random", "migration_limit": "1"}, {"DYN_ROUTER_MODE": "least-loaded"})
    assert (settings.router_mode, settings.migration_limit) == (RouterMode.LEAST_LOADED, 1)


@pytest.mark.parametrize(
    ("env", "value"),
    [("DYN_ROUTER_MODE", "best"), ("DYN_ROUTER_TEMPERATURE", "-1"), ("DYN_KV_EVENTS", "maybe"), ("DYN_ROUTER_PRUNE_TARGET_RATIO", "1.5"),
     ("DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD", "85"), ("DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD", "many"), ("DYN_ROUTER_TTL", "nan")],
)
def test_bad_values_name_their_setting(env: str, value: str) -> None:
    """The operator is told where the value stands."""
    with pytest.raises(ConfigError, match=env):
        load_settings({}, {env: value})


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"kv_overlap_score_weight": 2.0, "router_prefill_load_scale": 2.0}, "set only one"),
     ({"router_track_output_blocks": True, "router_track_active_blocks": False}, "DYN_ROUTER_TRACK_ACTIVE_BLOCKS"),
     ({"enforce_disagg": True, "router_conditional_disagg": True}, "set one of them"),
     ({"router_temperature": 0.5, "router_mode": RouterMode.RANDOM}, "DYN_ROUTER_MODE=kv")],
)
def test_contradictions_stop_with_the_fix(fields: dict[str, Any], named: str) -> None:
    """Nothing is silently ignored."""
    with pytest.raises(ConfigError, match=named):
        RouterSettings(**fields)


@pytest.mark.parametrize("name", ["kv_overlap_score_weight", "router_prefill_load_scale"])
def test_both_names_set_the_prefill_factor(name: str) -> None:
    """The older and the newer name of Dynamo; without a prefill term there is nothing to learn from events."""
    fields: dict[str, Any] = {name: 2.5}
    assert RouterSettings(**fields).prefill_load_scale == 2.5
    assert not RouterSettings(**{name: 0.0}).reads_events  # type: ignore[arg-type] # the name decides the type


def test_events_are_read_only_where_they_matter() -> None:
    """Load balancing needs none, but conditional disaggregation does in every mode."""
    assert not RouterSettings(router_mode=RouterMode.ROUND_ROBIN).reads_events
    assert not RouterSettings(kv_events=False).reads_events
    assert RouterSettings(router_mode=RouterMode.ROUND_ROBIN, router_conditional_disagg=True).reads_events


def test_thresholds_can_be_unset() -> None:
    """An inherited threshold can be taken back."""
    parameters = {"active_prefill_tokens_threshold": "10"}
    assert load_settings(parameters, {}).active_prefill_tokens_threshold == 10
    assert load_settings(parameters, {"DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD": "none"}).active_prefill_tokens_threshold is None


def test_every_setting_has_its_own_variable_and_a_reason() -> None:
    """A sentence each, and no variable twice."""
    specs = specs_of(RouterSettings).values()
    assert len({spec.env for spec in specs}) == len(specs)
    assert all(spec.help.endswith(".") and spec.env.startswith(("DYN_", "TANDEM_")) for spec in specs)
