# SPDX-License-Identifier: Apache-2.0
"""Settings of the KV tiers: Dynamo's names, checked."""

import pytest

from tandem_kvbm.config import IGNORED, KvbmSettings, ignored_variables, load_settings
from tandem_protocol.errors import ConfigError


def test_dynamo_names_are_read() -> None:
    """The environment of the engine decides."""
    settings = load_settings({}, {"DYN_KVBM_CPU_CACHE_GB": "20", "DYN_KVBM_DISK_CACHE_GB": "100", "DYN_KVBM_DISK_CACHE_DIR": "/mnt/nvme",
                                  "DYN_KVBM_DISK_DISABLE_O_DIRECT": "true", "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS": "60"})
    assert (settings.cpu_cache_gb, settings.disk_cache_gb, settings.disk_cache_dir) == (20.0, 100.0, "/mnt/nvme")
    assert settings.disk_disable_o_direct
    assert settings.leader_worker_init_timeout_s == 60.0
    assert settings.has_host
    assert settings.has_disk


def test_the_connectors_extra_config_is_asked_after_the_environment() -> None:
    """Numbers may be numbers there."""
    extra = {"spec_name": "KvbmSpec", "kvbm": {"cpu_cache_gb": 4, "staging_gb": "1"}}
    settings = load_settings(extra, {"DYN_KVBM_CPU_CACHE_GB": "8"})
    assert (settings.cpu_cache_gb, settings.staging_gb) == (8.0, 1.0)
    with pytest.raises(ConfigError, match="unknown parameter 'cpu_gb'"):
        load_settings({"kvbm": {"cpu_gb": 4}}, {})
    with pytest.raises(ConfigError, match="must be an object"):
        load_settings({"kvbm": 4}, {})


def test_overrides_in_blocks_make_a_tier_too() -> None:
    """Without any GB."""
    settings = KvbmSettings(cpu_cache_override_num_blocks=10, disk_cache_override_num_blocks=20)
    assert settings.has_host
    assert settings.has_disk


@pytest.mark.parametrize(
    ("environment", "message"),
    [({}, "no tier: set DYN_KVBM_CPU_CACHE_GB, DYN_KVBM_DISK_CACHE_GB or DYN_KVBM_OBJECT_ENABLED"),
     ({"DYN_KVBM_CPU_CACHE_GB": "0"}, "no tier"),
     ({"DYN_KVBM_CPU_CACHE_GB": "lots"}, "DYN_KVBM_CPU_CACHE_GB='lots' is not valid"),
     ({"DYN_KVBM_CPU_CACHE_GB": "-1"}, "expected a number from 0"),
     ({"DYN_KVBM_CPU_CACHE_GB": "nan"}, "expected a number from 0"),
     ({"DYN_KVBM_OBJECT_ENABLED": "1"}, "no bucket: set DYN_KVBM_OBJECT_BUCKET"),
     ({"DYN_KVBM_CPU_CACHE_GB": "1", "TANDEM_KVBM_HOST_POLICY": "fifo"}, "expected lru, arc, or module.path:Class"),
     ({"DYN_KVBM_CPU_CACHE_GB": "1", "DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY": "5"}, "has no effect here"),
     ({"DYN_KVBM_CPU_CACHE_GB": "1", "DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY": "high"}, "has no effect here")],
)
def test_what_can_not_work_is_refused(environment: dict[str, str], message: str) -> None:
    """With a sentence that says the fix."""
    with pytest.raises(ConfigError, match=message):
        load_settings({}, environment)


def test_variables_without_a_meaning_are_accepted_and_named() -> None:
    """With the reason, for the log."""
    environment = {"DYN_KVBM_CPU_CACHE_GB": "1", "DYN_KVBM_METRICS_PORT": "6880", "DYN_KVBM_NIXL_BACKEND_GDS": "true",
                   "DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY": "0"}
    assert load_settings({}, environment).cpu_cache_gb == 1.0
    assert ignored_variables(environment) == {"DYN_KVBM_METRICS_PORT": IGNORED["DYN_KVBM_METRICS_PORT"],
                                              "DYN_KVBM_NIXL_BACKEND_GDS": "NIXL moves no blocks between tiers here"}


def test_secrets_are_not_shown() -> None:
    """Neither in logs nor in tracebacks."""
    settings = KvbmSettings(cpu_cache_gb=1, object_access_key="AKIA", object_secret_key="hush")
    assert "hush" not in repr(settings)
    assert "AKIA" not in repr(settings)
