# SPDX-License-Identifier: Apache-2.0
"""What the index answers: how much of a prompt each worker has already, and in which tier."""

import msgspec
import numpy as np
from numpy.typing import NDArray


class Overlap(msgspec.Struct, frozen=True, eq=False):
    """Leading blocks of one prompt by slot."""

    blocks: NDArray[np.int32]
    """[3, slots]: rows by `Tier`. A slot's prefix ends at the first block that it holds in no tier; each block of the
    prefix counts in the best tier that holds it."""

    @property
    def total(self) -> NDArray[np.int32]:
        """[slots]: length of each slot's prefix in blocks, over all tiers."""
        total: NDArray[np.int32] = self.blocks.sum(axis=0, dtype=np.int32)
        return total
