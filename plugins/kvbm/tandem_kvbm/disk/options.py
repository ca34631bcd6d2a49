# SPDX-License-Identifier: Apache-2.0
"""What one engine's disk tier is. The operator's names for these are in `tandem_kvbm.config`."""

from dataclasses import dataclass

from tandem_protocol.errors import ConfigError


@dataclass(frozen=True)
class DiskOptions:
    """Raises ConfigError with the fix."""

    folder: str
    """Where the tier makes its own folder; a local NVMe, best of all."""
    quota_bytes: int
    """Of block files; the file system's own needs come on top."""
    direct_io: bool = True
    """Past the page cache, where the file system can: the cache would hold again what host memory holds."""
    fdatasync: bool = False
    """Wait until each block is on the medium. Off: a block that a power cut tore is found by its checksum, and computed anew;
    waiting would make every write slower to save some of them."""
    shared: bool = False
    """One folder for all engines of this model and layout, which then find each other's blocks."""
    forget_s: float = 0.0
    """At the start, remove other engines' folders that nobody has used for so long; 0: never."""
    policy: str = "lru"
    """What is given up first: lru or tinylfu."""
    rescan_s: float = 30.0
    """How often a shared folder is listed for what others wrote and removed."""
    failures: int = 3
    """So many errors in a row, and the disk is left alone for `backoff_s`, doubling up to `backoff_max_s`."""
    backoff_s: float = 1.0
    backoff_max_s: float = 60.0
    full_s: float = 60.0
    """After the disk was full before the quota was, how long the tier keeps to what fitted."""

    def __post_init__(self) -> None:
        if not self.folder:
            raise ConfigError("the disk tier has no folder: set DYN_KVBM_DISK_CACHE_DIR")
        for name in ("quota_bytes", "rescan_s", "failures", "backoff_s", "backoff_max_s", "full_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"disk tier: {name} must be positive, not {getattr(self, name)}")
        if self.forget_s < 0:
            raise ConfigError("disk tier: forget_s must not be negative; 0 removes nothing")
