# SPDX-License-Identifier: Apache-2.0
"""Memory of big tables: zeroed, in huge pages where the kernel gives them. A table is read at random, and with 4 KiB pages
every lookup would miss the TLB as well."""

import mmap

import numpy as np
from numpy.typing import NDArray

_HUGE_BYTES = 2 << 20


def zeroed(rows: int, columns: int) -> NDArray[np.uint64]:
    """uint64 [rows, columns] of zeros; given back to the system with the array."""
    size = rows * columns * 8
    if size < _HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.zeros((rows, columns), np.uint64)
    pages = mmap.mmap(-1, -(-size // _HUGE_BYTES) * _HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint64, rows * columns).reshape(rows, columns)
