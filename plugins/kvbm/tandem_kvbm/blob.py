# SPDX-License-Identifier: Apache-2.0
"""How a block lies in a file or an object: the bytes of the block, then a footer that proves them.

The footer comes last so that the block itself stays page-aligned (direct I/O), and so that a torn write has none. The checksum
covers the key and the layout too: a file that was renamed, or written by another model or layout, is as bad as a flipped bit.
"""

import struct
from typing import Final

import xxhash

MAGIC: Final = b"TKVB"
VERSION: Final = 1
_FOOTER = struct.Struct("<4sHHQ16s")  # magic, version, flags (0), size of the block in bytes, checksum
FOOTER_BYTES: Final = _FOOTER.size


class CorruptBlockError(Exception):
    """The stored bytes are not the block that was asked for: a miss, and a counter."""


def make_footer(key: bytes, layout: bytes, block: memoryview) -> bytes:
    """The footer, FOOTER_BYTES long, of `block` (C-contiguous) under `key` in a store whose blocks have `layout`."""
    return _FOOTER.pack(MAGIC, VERSION, 0, block.nbytes, _checksum(key, layout, block))


def check_footer(footer: bytes, key: bytes, layout: bytes, block: memoryview) -> None:
    """Raises CorruptBlockError unless `footer` is that of `block` under `key` and `layout`."""
    if len(footer) != FOOTER_BYTES:
        raise CorruptBlockError(f"footer of {len(footer)} bytes, expected {FOOTER_BYTES}")
    magic, version, _, size, checksum = _FOOTER.unpack(footer)
    if (magic, version) != (MAGIC, VERSION):
        raise CorruptBlockError(f"not a block of format {VERSION}")
    if size != block.nbytes:
        raise CorruptBlockError(f"block of {size} bytes, expected {block.nbytes}")
    if checksum != _checksum(key, layout, block):
        raise CorruptBlockError("checksum differs")


def _checksum(key: bytes, layout: bytes, block: memoryview) -> bytes:
    digest = xxhash.xxh3_128(block)  # releases the GIL, some 10 GB/s
    digest.update(len(key).to_bytes(4, "little") + key + layout)
    return digest.digest()
