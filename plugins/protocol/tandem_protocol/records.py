# SPDX-License-Identifier: Apache-2.0
"""What discovery keeps: records of one kind, each under its id, each kind in a collection of its own."""

from typing import ClassVar

import msgspec


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A process that others look for. Encoded as JSON; unknown fields are ignored."""

    collection: ClassVar[str]
    """Where a store keeps this kind, apart from the others."""
    id: str
    """Unique per start of a process: a restarted one is another."""
