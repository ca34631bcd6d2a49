# SPDX-License-Identifier: Apache-2.0
"""What workers with the connector kvbm will need of this host, checked before anything starts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tandem_kvbm.checks import SHM, check_disk, check_host_memory
from tandem_kvbm.config import GB, KvbmSettings, load_settings
from tandem_worker.config import WorkerSettings


def check_tiers(workers: Sequence[WorkerSettings], environment: Mapping[str, str], shm: Path = SHM) -> None:
    """Raises ConfigError if a tier is missing, or the host is too small for all of them together.

    Sizes given in blocks are only known to the engine, which checks them when it starts.
    """
    count = sum("kvbm" in worker.effective_connectors for worker in workers)
    if not count:
        return
    settings = load_settings({}, environment)
    check_host_memory(int(host_gb(settings) * GB) * count, shm)
    if settings.has_disk:
        check_disk(Path(settings.disk_cache_dir), 0)


def host_gb(settings: KvbmSettings) -> float:
    """GB of /dev/shm per engine, as far as they are given in GB."""
    if settings.cpu_cache_override_num_blocks:
        return 0.0
    return settings.cpu_cache_gb if settings.has_host else settings.staging_gb
