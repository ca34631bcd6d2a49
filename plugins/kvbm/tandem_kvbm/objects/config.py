# SPDX-License-Identifier: Apache-2.0
"""What one worker's object store is and how long it may take. The operator's names for these are in `tandem_kvbm.config`."""

import re
from dataclasses import dataclass, field

from tandem_protocol.errors import ConfigError

WORKER_ID = "{worker_id}"
MIB = 1 << 20
SMALLEST_PART_BYTES = 5 * MIB
"""S3's own bound for every part but the last."""

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"[A-Za-z0-9._/-]*")


@dataclass(frozen=True)
class ObjectConfig:
    """One bucket as one worker uses it. Raises ConfigError with the fix.

    The deadlines hold for a whole operation with all its attempts. A probe holds back a request, so it gets little; a write holds
    back nobody.
    """

    bucket: str
    """May contain {worker_id}."""
    endpoint: str = ""
    """URL; empty: AWS."""
    region: str = ""
    access_key: str = field(default="", repr=False)
    secret_key: str = field(default="", repr=False)
    """Both empty: the SDK's own chain (environment, shared files, roles)."""
    session_token: str = field(default="", repr=False)
    ca_bundle: str = ""
    prefix: str = "tandem-kv"
    worker_id: str = "0"
    """Who wrote a block. It must survive a restart, or the quota forgets what the earlier run wrote."""
    num_blocks: int = 0
    """Quota of blocks that this worker wrote; 0: unbounded (leave it to the bucket's lifecycle rules)."""
    exclusive: bool | None = None
    """Whether all under the prefix is this worker's to remove; None: only if the bucket is named after the worker."""
    connections: int = 8
    """Requests in flight, once for probes and once for transfers."""
    connect_timeout_s: float = 1.0
    probe_deadline_s: float = 1.0
    read_deadline_s: float = 5.0
    write_deadline_s: float = 10.0
    attempts: int = 3
    multipart_bytes: int = 16 * MIB
    """Larger objects are sent in parts: a broken connection costs one of them."""
    part_bytes: int = 8 * MIB
    present_ttl_s: float = 60.0
    """How long a block that was there is believed to be there: others may evict it, which costs a failed load."""
    absent_ttl_s: float = 2.0
    """How long a missing block is believed to be missing: another worker may be writing it right now."""
    presence_entries: int = 100_000
    breaker_failures: int = 3
    backoff_s: float = 1.0
    backoff_max_s: float = 30.0

    def __post_init__(self) -> None:
        self._check_names()
        self._check_numbers()

    def _check_names(self) -> None:
        if not _BUCKET.fullmatch(self.bucket_name):
            raise ConfigError(f"DYN_KVBM_OBJECT_BUCKET: {self.bucket_name!r} is no bucket name: 3 to 63 of a-z, 0-9, dot and dash")
        if bool(self.access_key) != bool(self.secret_key):
            raise ConfigError("set DYN_KVBM_OBJECT_ACCESS_KEY and DYN_KVBM_OBJECT_SECRET_KEY both, or neither for the SDK's own chain")
        if self.endpoint and not self.endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"DYN_KVBM_OBJECT_ENDPOINT: {self.endpoint!r} must start with http:// or https://")
        if not _PREFIX.fullmatch(self.prefix) or self.prefix.startswith("/") or self.prefix.endswith("/"):
            raise ConfigError(f"object prefix {self.prefix!r}: letters, digits, . _ - and inner slashes only")

    def _check_numbers(self) -> None:
        positive = ("connections", "connect_timeout_s", "probe_deadline_s", "read_deadline_s", "write_deadline_s", "attempts",
                    "presence_entries", "breaker_failures", "backoff_s", "backoff_max_s", "multipart_bytes")
        for name in positive:
            if getattr(self, name) <= 0:
                raise ConfigError(f"object store: {name} must be positive, not {getattr(self, name)}")
        for name in ("num_blocks", "present_ttl_s", "absent_ttl_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"object store: {name} must not be negative")
        if self.part_bytes < SMALLEST_PART_BYTES:
            raise ConfigError(f"object store: part_bytes must be at least {SMALLEST_PART_BYTES}, S3's own bound")

    @property
    def bucket_name(self) -> str:
        """The bucket of this worker."""
        return self.bucket.replace(WORKER_ID, self.worker_id)

    @property
    def is_exclusive(self) -> bool:
        """Whether everything under the prefix may be removed."""
        return WORKER_ID in self.bucket if self.exclusive is None else self.exclusive
