# SPDX-License-Identifier: Apache-2.0
"""Blocks per tier by Dynamo's formula, and the checks before tiers are set up."""

import threading
from pathlib import Path

import pytest

from tandem_kvbm import checks
from tandem_kvbm.config import KvbmSettings
from tandem_kvbm.sizing import num_blocks, padded_block_bytes, plan_tiers
from tandem_protocol.errors import ConfigError

PAGE = 4096
BLOCK = 1_474_560
"""One block of 32 tokens of SmolLM2-135M in float32."""


@pytest.mark.parametrize(
    ("override", "gb", "block_bytes", "blocks"),
    [(0, 1.0, 1_000_000, 1000), (0, 1.0, 1_000_001, 999), (7, 1.0, 1_000_000, 7), (7, 0.0, 1_000_000, 7), (0, 0.0005, 1_000_000, 0),
     (0, 20.0, 2_097_152, 9536)],
)
def test_an_override_wins_else_gigabytes_are_divided_and_rounded_down(override: int, gb: float, block_bytes: int, blocks: int) -> None:
    """GB are 10^9 bytes."""
    assert num_blocks(override, gb, block_bytes) == blocks


@pytest.mark.parametrize(
    ("rank_bytes", "copies", "blocks_per_chunk", "padded"),
    [(4096, 1, 1, 4096), (4097, 1, 1, 8192), (1000, 2, 2, 4096), (BLOCK, 2, 1, 2 * BLOCK), (0, 4, 1, 0)],
)
def test_a_block_is_that_of_all_ranks_padded_to_pages(rank_bytes: int, copies: int, blocks_per_chunk: int, padded: int) -> None:
    """As vLLM lays it out."""
    assert padded_block_bytes(rank_bytes, copies, blocks_per_chunk, page_bytes=4096) == padded


def test_a_plan_has_the_tiers_that_were_asked_for() -> None:
    """None for the others."""
    plan = plan_tiers(KvbmSettings(cpu_cache_gb=0.2), BLOCK)
    assert (plan.host_blocks, plan.staging, plan.disk_blocks, plan.object_blocks) == (135, False, None, None)
    assert plan.host_bytes == 135 * BLOCK
    assert plan.disk_bytes is None
    plan = plan_tiers(KvbmSettings(cpu_cache_override_num_blocks=4, disk_cache_gb=1, object_enabled=True, object_bucket="b"), BLOCK)
    assert (plan.host_blocks, plan.disk_blocks, plan.object_blocks) == (4, 676, 0)
    assert plan.disk_bytes == 676 * (BLOCK + PAGE)


def test_disk_alone_gets_a_staging_area() -> None:
    """vLLM moves every block through host memory."""
    plan = plan_tiers(KvbmSettings(disk_cache_override_num_blocks=100, staging_gb=0.1), BLOCK)
    assert (plan.host_blocks, plan.staging, plan.disk_blocks) == (67, True, 100)


@pytest.mark.parametrize(
    ("settings", "block_bytes", "message"),
    [(KvbmSettings(cpu_cache_gb=1), 0, "no KV blocks on its device"),
     (KvbmSettings(cpu_cache_gb=0.001), BLOCK, "host tier is smaller than one block of 1474560 bytes: raise DYN_KVBM_CPU_CACHE_GB"),
     (KvbmSettings(disk_cache_gb=1, staging_gb=0.001), BLOCK, "host tier is smaller .*: raise TANDEM_KVBM_STAGING_GB"),
     (KvbmSettings(cpu_cache_gb=1, disk_cache_gb=0.001), BLOCK, "disk tier is smaller than one block .*: raise DYN_KVBM_DISK_CACHE_GB")],
)
def test_a_tier_without_a_block_is_refused(settings: KvbmSettings, block_bytes: int, message: str) -> None:
    """With the variable to raise."""
    with pytest.raises(ConfigError, match=message):
        plan_tiers(settings, block_bytes)


def test_host_memory_must_be_free(tmp_path: Path) -> None:
    """A tmpfs that ends early kills by SIGBUS."""
    checks.check_host_memory(1, tmp_path)
    with pytest.raises(ConfigError, match=r"lower DYN_KVBM_CPU_CACHE_GB .* or give the container a larger --shm-size"):
        checks.check_host_memory(1 << 60, tmp_path)


def test_a_disk_must_be_there_and_have_room(tmp_path: Path) -> None:
    """Each with its fix; what the tier holds already is its own."""
    checks.check_disk(tmp_path, 1)
    with pytest.raises(ConfigError, match="does not exist: create it"):
        checks.check_disk(tmp_path / "missing", 1)
    with pytest.raises(ConfigError, match="lower DYN_KVBM_DISK_CACHE_GB"):
        checks.check_disk(tmp_path, 1 << 60)
    checks.check_disk(tmp_path, 1 << 60, held_bytes=1 << 60)
    (tmp_path / "tandem-kv" / "model").mkdir(parents=True)
    (tmp_path / "tandem-kv" / "model" / "block").write_bytes(bytes(1000))
    (tmp_path / "other").write_bytes(bytes(1000))
    assert checks.folder_bytes(tmp_path, "tandem-kv") == 1000


def test_a_folder_that_refuses_writing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, whom permissions don't stop."""
    monkeypatch.setattr(checks.os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"can't write to .*: change its permissions"):
        checks.check_disk(tmp_path, 1)


def test_a_body_beyond_its_deadline_is_reported() -> None:
    """On another thread, since the body can't be interrupted."""
    said: list[str] = []
    expired = threading.Event()

    def expire(sentence: str) -> None:
        said.append(sentence)
        expired.set()

    with checks.bounded("mapping", 0.001, expire):
        assert expired.wait(10)
    assert said == ["mapping took longer than 0.001 s: lower the tier's size, or raise DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS"]


def test_a_body_in_time_is_not() -> None:
    """No timer is left behind."""
    with checks.bounded("mapping", 3600, lambda _: None):
        [timer] = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    timer.join(10)
    assert not timer.is_alive()
