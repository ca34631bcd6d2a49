# SPDX-License-Identifier: Apache-2.0
"""Settings of the KV block tiers, with Dynamo's names.

They are resolved in the process that needs them, from the environment that the engine's processes inherit: the scheduler, every
worker rank and the metrics' end in the stub each build the spec, and all must see the same. A plugin may not import another, so the
worker could not hand them over anyway; `kv_connector_extra_config: {"kvbm": {"cpu_cache_gb": "4"}}` in `model.json` sets them for one
engine. This is the one module of kvbm's tiers that reads the environment.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from tandem_protocol.errors import ConfigError
from tandem_protocol.settings import parse_bool, parse_float, parse_int, resolve, setting

GB = 1_000_000_000
_MOST_GB = 1_000_000
_MOST_BLOCKS = 1 << 40
_DAY_S = 86_400

IGNORED = {
    "DYN_KVBM_DISK_ZEROFILL_FALLBACK": "blocks are files of their own, so no large file is set aside",
    "DYN_KVBM_LEADER_ZMQ_HOST": "the scheduler and its workers meet through vLLM's own executor",
    "DYN_KVBM_LEADER_ZMQ_ACK_PORT": "the scheduler and its workers meet through vLLM's own executor",
    "DYN_KVBM_METRICS": "the worker's admin port always serves them",
    "DYN_KVBM_METRICS_PORT": "the worker's admin port serves them",
    "DYN_KVBM_TRANSFER_BATCH_SIZE": "vLLM batches copies by engine step",
    "DYN_KVBM_ENABLE_NUMA": "host memory is faulted in by the worker that uses it, which places it",
    "ENABLE_KVBM_RECORD": "there is no recorder; vLLM's KV events can be recorded from their port",
}
"""Variables of Dynamo's KVBM without a meaning here, and why: accepted, and said once in the log."""
IGNORED_PREFIX = "DYN_KVBM_NIXL_BACKEND_"
"""And whatever starts like this: NIXL moves blocks between engines here, never between tiers."""
PRIORITY_VARIABLE = "DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY"

_gb = parse_float(0, _MOST_GB)
_blocks = parse_int(0, _MOST_BLOCKS)


def _host_policy(text: str) -> str:
    if text not in {"lru", "arc"} and text.count(":") != 1:
        raise ValueError("expected lru, arc, or module.path:Class")
    return text


def _copy_method(text: str) -> str:
    if text not in {"auto", "kernel", "dma"}:
        raise ValueError("expected auto, kernel or dma")
    return text


def _disk_policy(text: str) -> str:
    if text not in {"lru", "tinylfu"}:
        raise ValueError("expected lru or tinylfu")
    return text


@dataclass(frozen=True)
class KvbmSettings:
    """Settings of one engine's tiers, resolved; GB are 10^9 bytes, and a block is one KV block of all layers and ranks."""

    cpu_cache_gb: float = setting(
        env="DYN_KVBM_CPU_CACHE_GB", default=0.0, parse=_gb, unit="GB",
        help="Host tier (G2) of one engine, in /dev/shm. 0 for none: memory is only taken when somebody says how much.",
    )
    cpu_cache_override_num_blocks: int = setting(
        env="DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS", default=0, parse=_blocks, unit="blocks",
        help="Host tier in blocks, in place of GB; 0 leaves it to GB.",
    )
    disk_cache_gb: float = setting(
        env="DYN_KVBM_DISK_CACHE_GB", default=0.0, parse=_gb, unit="GB", help="Quota of the disk tier (G3) of one engine; 0 for none."
    )
    disk_cache_override_num_blocks: int = setting(
        env="DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS", default=0, parse=_blocks, unit="blocks",
        help="Disk tier in blocks, in place of GB; 0 leaves it to GB.",
    )
    disk_cache_dir: str = setting(
        env="DYN_KVBM_DISK_CACHE_DIR", default="/tmp", parse=str,  # noqa: S108 - Dynamo's default; the tier makes a folder of its own in it
        help="Where the disk tier makes its folder. Dynamo's default; give a local NVMe, since /tmp is often small or in memory.",
    )
    disk_disable_o_direct: bool = setting(
        env="DYN_KVBM_DISK_DISABLE_O_DIRECT", default=False, parse=parse_bool,
        help="Write and read through the page cache. Off: it would hold a second copy of what the host tier has.",
    )
    disk_policy: str = setting(
        env="TANDEM_KVBM_DISK_POLICY", default="lru", parse=_disk_policy,
        help="What the disk tier gives up first: lru or tinylfu; lru, since a filter has kept one-time prompts out already.",
    )
    disk_shared: bool = setting(
        env="TANDEM_KVBM_DISK_SHARED", default=False, parse=parse_bool,
        help="All engines of this model use one folder and find each other's blocks, as on a network file system. Off: one folder each.",
    )
    disk_fdatasync: bool = setting(
        env="TANDEM_KVBM_DISK_FDATASYNC", default=False, parse=parse_bool,
        help="Wait until each block is on the medium. Off: what a power cut tears is told by its checksum, and waiting slows every write.",
    )
    disk_forget_days: float = setting(
        env="TANDEM_KVBM_DISK_FORGET_DAYS", default=0.0, parse=parse_float(0, 3650), unit="days",
        help="At start, remove folders of other models, layouts and engines in the same place that nobody used for so long. 0: never.",
    )
    disable_disk_offload_filter: bool = setting(
        env="DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER", default=False, parse=parse_bool,
        help="Write every block to the disk tier. Off: only blocks seen twice, since most prompts never come back and disks wear.",
    )
    object_enabled: bool = setting(
        env="DYN_KVBM_OBJECT_ENABLED", default=False, parse=parse_bool, help="Keep blocks in an object store (G4), shared by workers."
    )
    object_bucket: str = setting(
        env="DYN_KVBM_OBJECT_BUCKET", default="", parse=str,
        help="Bucket of the object tier; `{worker_id}` in it becomes TANDEM_KVBM_WORKER_ID, which gives every worker its own.",
    )
    object_endpoint: str = setting(
        env="DYN_KVBM_OBJECT_ENDPOINT", default="", parse=str, help="URL of an S3-compatible store; empty for AWS."
    )
    object_region: str = setting(env="DYN_KVBM_OBJECT_REGION", default="", parse=str, help="Region of the bucket; empty: the SDK's own.")
    object_access_key: str = setting(
        env="DYN_KVBM_OBJECT_ACCESS_KEY", default="", parse=str, flag=False, help="Access key; empty: the SDK's chain of credentials."
    )
    object_secret_key: str = setting(
        env="DYN_KVBM_OBJECT_SECRET_KEY", default="", parse=str, flag=False,
        help="Secret key. No flag, since command lines can be read by others.",
    )
    object_num_blocks: int = setting(
        env="DYN_KVBM_OBJECT_NUM_BLOCKS", default=0, parse=_blocks, unit="blocks",
        help="Blocks that this worker keeps in the object store; 0 for no bound, since a bucket has its own life cycle rules.",
    )
    worker_id: str = setting(
        env="TANDEM_KVBM_WORKER_ID", default="", parse=str, flag=False,
        help="Who writes into the object store: its quota and `{worker_id}` must survive a restart. Workers set host and index; empty: new "
             "at every start.",
    )
    staging_gb: float = setting(
        env="TANDEM_KVBM_STAGING_GB", default=2.0, parse=parse_float(0.001, _MOST_GB), unit="GB",
        help="Host memory when only disk or objects are asked for: vLLM moves their blocks through it, and a prompt must fit whole.",
    )
    host_policy: str = setting(
        env="TANDEM_KVBM_HOST_POLICY", default="lru", parse=_host_policy,
        help="What the host tier gives up first: lru, arc, or module.path:Class of a CachePolicy; lru, since prefixes are used by recency.",
    )
    copy_method: str = setting(
        env="TANDEM_KVBM_COPY", default="auto", parse=_copy_method,
        help="How pages move between GPU and host: kernel, dma (the driver's batched copies), or auto, the faster one as measured at "
             "start.",
    )
    offload_decode_blocks: bool = setting(
        env="TANDEM_KVBM_OFFLOAD_DECODE_BLOCKS", default=True, parse=parse_bool,
        help="Offload generated blocks too, as KVBM does: the next turn of a chat sends them back. Off where answers never come back.",
    )
    leader_worker_init_timeout_s: float = setting(
        env="DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS", default=1800.0, parse=parse_float(1, _DAY_S), unit="s",
        help="How long an engine process may take to set up its tiers before it ends; wide, since pinning a terabyte takes minutes.",
    )
    cache_stats_max_requests: int = setting(
        env="DYN_KVBM_CACHE_STATS_MAX_REQUESTS", default=1000, parse=parse_int(1, 1_000_000), unit="requests",
        help="Hit rates are those of so many last requests.",
    )
    cache_stats_log_interval_s: float = setting(
        env="DYN_KVBM_CACHE_STATS_LOG_INTERVAL_SECS", default=5.0, parse=parse_float(0, _DAY_S), unit="s",
        help="Least time between two lines on hit rates in the log; they come with requests only, and 0 means none.",
    )

    def __repr__(self) -> str:
        """Without the keys of the object store: settings end up in logs and tracebacks."""
        shown = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self) if not field.name.endswith("_key"))
        return f"KvbmSettings({shown})"

    def __post_init__(self) -> None:
        if not (self.has_host or self.has_disk or self.object_enabled):
            tiers = "DYN_KVBM_CPU_CACHE_GB, DYN_KVBM_DISK_CACHE_GB or DYN_KVBM_OBJECT_ENABLED"
            raise ConfigError(f"the connector kvbm has no tier: set {tiers}")
        if self.object_enabled and not self.object_bucket:
            raise ConfigError("the object tier has no bucket: set DYN_KVBM_OBJECT_BUCKET, or DYN_KVBM_OBJECT_ENABLED=false")

    @property
    def has_host(self) -> bool:
        """Whether a host tier is asked for; without one there is a staging area of `staging_gb`."""
        return self.cpu_cache_gb > 0 or self.cpu_cache_override_num_blocks > 0

    @property
    def has_disk(self) -> bool:
        """Whether a disk tier is asked for."""
        return self.disk_cache_gb > 0 or self.disk_cache_override_num_blocks > 0


def load_settings(extra_config: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> KvbmSettings:
    """Resolves the settings from the environment and the connector's extra config. Raises ConfigError."""
    environment = os.environ if environ is None else environ
    _refuse_priority(environment.get(PRIORITY_VARIABLE, "0"))
    parameters = extra_config.get("kvbm", {})
    if not isinstance(parameters, Mapping):
        raise ConfigError('`kvbm` in kv_connector_extra_config must be an object of setting to value, like {"cpu_cache_gb": "4"}')
    return resolve(KvbmSettings, {name: str(value) for name, value in parameters.items()}, environment)


def _refuse_priority(text: str) -> None:
    if text.strip() not in {"", "0"}:
        raise ConfigError(f"{PRIORITY_VARIABLE}={text} has no effect here, since vLLM doesn't tell tiers a request's priority: remove it")


def ignored_variables(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables of the environment that are accepted without effect, with the reason."""
    environment = os.environ if environ is None else environ
    reasons = {name: reason for name, reason in IGNORED.items() if environment.get(name)}
    backends = dict.fromkeys((name for name in environment if name.startswith(IGNORED_PREFIX)), "NIXL moves no blocks between tiers here")
    return reasons | backends
