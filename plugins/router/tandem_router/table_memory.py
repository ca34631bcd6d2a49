# SPDX-License-Identifier: Apache-2.0
"""Memory of big tables: zeroed, in huge pages where the kernel gives them. A table is read at random, and with 4 KiB pages
every lookup would miss the TLB as well."""

import mmap

import numpy as np
from numpy.typing import NDArray

HUGE_BYTES = 2 << 20
"""Smaller arrays come from the heap."""


def zeroed(words: int) -> NDArray[np.uint64]:
    """uint64 [words] of zeros; takes memory where it is first written, and is given back to the system with the array."""
    size = words * 8
    if size < HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.zeros(words, np.uint64)
    pages = mmap.mmap(-1, -(-size // HUGE_BYTES) * HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint64, words)
