# SPDX-License-Identifier: Apache-2.0
"""What KV tiers need of the host, before a server starts."""

from pathlib import Path

import pytest

from tandem_cli.serve.tiers import check_tiers
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role
from tandem_worker.config import WorkerSettings

KVBM = WorkerSettings(role=Role.AGGREGATED, connector=("kvbm",))
PREFILL = WorkerSettings(role=Role.PREFILL, prefill_connector=("kvbm", "nixl"))
DECODE = WorkerSettings(role=Role.DECODE, prefill_connector=("kvbm", "nixl"))


def test_workers_without_tiers_need_nothing() -> None:
    """Whatever stands in the environment."""
    check_tiers([DECODE, WorkerSettings()], {"DYN_KVBM_CPU_CACHE_GB": "1000000"})


def test_the_prefill_worker_alone_may_offload() -> None:
    """The decode worker of that server keeps its role's default."""
    assert PREFILL.effective_connectors == ("kvbm", "nixl")
    assert DECODE.effective_connectors == ("nixl",)


@pytest.mark.parametrize(
    ("environment", "message"),
    [({}, "no tier"), ({"DYN_KVBM_CPU_CACHE_GB": "1000000"}, "lower DYN_KVBM_CPU_CACHE_GB"),
     ({"DYN_KVBM_CPU_CACHE_GB": "0.001", "DYN_KVBM_DISK_CACHE_GB": "1", "DYN_KVBM_DISK_CACHE_DIR": "/nowhere"}, "/nowhere does not exist")],
)
def test_a_host_that_is_too_small_is_refused(environment: dict[str, str], message: str, tmp_path: Path) -> None:
    """With the fix."""
    with pytest.raises(ConfigError, match=message):
        check_tiers([PREFILL, DECODE], environment, tmp_path)


def test_the_host_tiers_of_all_workers_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each engine has its own; those in blocks are left to the engine, and disk alone takes its staging area."""
    needed: list[int] = []
    monkeypatch.setattr("tandem_cli.serve.tiers.check_host_memory", lambda size, _: needed.append(size))
    check_tiers([KVBM, PREFILL, DECODE], {"DYN_KVBM_CPU_CACHE_GB": "2"}, tmp_path)
    check_tiers([KVBM], {"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "2"}, tmp_path)
    check_tiers([KVBM], {"DYN_KVBM_DISK_CACHE_GB": "2", "DYN_KVBM_DISK_CACHE_DIR": str(tmp_path), "TANDEM_KVBM_STAGING_GB": "3"}, tmp_path)
    assert needed == [4_000_000_000, 0, 3_000_000_000]
