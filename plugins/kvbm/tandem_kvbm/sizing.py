# SPDX-License-Identifier: Apache-2.0
"""How many blocks each tier holds. Pure: settings and the size of a block in, a plan out.

The formula is Dynamo's: an override in blocks wins, else floor(GB * 10^9 / bytes per block), where a block's bytes are the sum over
all ranks. vLLM adds padding to whole pages, so that a block can be read from a disk without a copy.
"""

import mmap
from dataclasses import dataclass

from tandem_kvbm.config import GB, KvbmSettings
from tandem_protocol.errors import ConfigError


@dataclass(frozen=True)
class TierPlan:
    """Blocks per tier; None for a tier that isn't there."""

    block_bytes: int
    host_blocks: int
    staging: bool
    """The host tier was not asked for: it is only what disk and objects need to reach the device."""
    disk_blocks: int | None
    object_blocks: int | None
    """0: the object tier has no bound."""

    @property
    def host_bytes(self) -> int:
        """What the host tier takes of /dev/shm."""
        return self.host_blocks * self.block_bytes

    @property
    def disk_bytes(self) -> int | None:
        """The disk tier's quota."""
        return None if self.disk_blocks is None else self.disk_blocks * on_disk(self.block_bytes)


def padded_block_bytes(rank_bytes: int, copies: int, blocks_per_chunk: int, page_bytes: int = mmap.PAGESIZE) -> int:
    """Bytes of one offloaded block: that of `copies` ranks, times KV blocks that travel together, padded to whole pages."""
    return -(-rank_bytes * copies * blocks_per_chunk // page_bytes) * page_bytes


def on_disk(block_bytes: int) -> int:
    """Bytes of a block's file: the block, and a page for the footer that proves it."""
    return block_bytes + mmap.PAGESIZE


def num_blocks(override: int, cache_gb: float, block_bytes: int) -> int:
    """Dynamo's formula."""
    return override if override > 0 else int(cache_gb * GB // block_bytes)


def plan_tiers(settings: KvbmSettings, block_bytes: int) -> TierPlan:
    """The tiers of one engine. Raises ConfigError for a block of no bytes, and for a tier that holds none."""
    if block_bytes <= 0:
        raise ConfigError("the engine has no KV blocks on its device, so there is nothing to offload: give it more memory for KV")
    host = num_blocks(settings.cpu_cache_override_num_blocks, settings.cpu_cache_gb, block_bytes)
    if not settings.has_host:
        host = num_blocks(0, settings.staging_gb, block_bytes)
    _check_not_empty(host, "host tier", "DYN_KVBM_CPU_CACHE_GB" if settings.has_host else "TANDEM_KVBM_STAGING_GB", block_bytes)
    disk = None
    if settings.has_disk:
        disk = num_blocks(settings.disk_cache_override_num_blocks, settings.disk_cache_gb, on_disk(block_bytes))
        _check_not_empty(disk, "disk tier", "DYN_KVBM_DISK_CACHE_GB", block_bytes)
    objects = settings.object_num_blocks if settings.object_enabled else None
    return TierPlan(block_bytes, host, not settings.has_host, disk, objects)


def _check_not_empty(blocks: int, what: str, variable: str, block_bytes: int) -> None:
    if blocks == 0:
        raise ConfigError(f"the {what} is smaller than one block of {block_bytes} bytes: raise {variable}")
