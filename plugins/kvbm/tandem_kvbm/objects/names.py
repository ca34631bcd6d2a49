# SPDX-License-Identifier: Apache-2.0
"""Object names: `<prefix>/<namespace>/<hh>/<hash>_g<group>`, where hh spreads the blocks over S3's partitions.

A key is vLLM's: the block hash and four bytes of group index. Pure.
"""

import re
from dataclasses import dataclass

_GROUP_BYTES = 4
_NAME = re.compile(r"[0-9a-f]{2}/([0-9a-f]+)_g(\d+)")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(frozen=True)
class Names:
    """The names of one model and layout."""

    prefix: str
    namespace: str
    """Model and layout: blocks of another one never share a name."""

    @property
    def root(self) -> str:
        """What all names start with."""
        namespace = _UNSAFE.sub("_", self.namespace)
        return f"{self.prefix}/{namespace}/" if self.prefix else f"{namespace}/"

    def name_of(self, key: bytes) -> str:
        """The object that holds the block."""
        text = key[:-_GROUP_BYTES].hex()
        return f"{self.root}{text[:2]}/{text}_g{int.from_bytes(key[-_GROUP_BYTES:], 'big')}"

    def key_of(self, name: str) -> bytes | None:
        """The block that an object holds; None for objects that hold none (ledgers, strangers)."""
        match = _NAME.fullmatch(name.removeprefix(self.root))
        if match is None or not name.startswith(self.root) or len(match[1]) % 2:
            return None
        return bytes.fromhex(match[1]) + int(match[2]).to_bytes(_GROUP_BYTES, "big")

    def ledger_of(self, worker_id: str) -> str:
        """The object in which a worker notes what it wrote."""
        return f"{self.root}ledgers/{_UNSAFE.sub('_', worker_id)}"
