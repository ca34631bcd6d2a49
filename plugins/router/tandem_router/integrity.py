# SPDX-License-Identifier: Apache-2.0
"""Compares the tables of the index with one another. Its caller keeps writers out."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tandem_protocol.errors import TandemError
from tandem_protocol.kv_events import Tier
from tandem_router import holdings, index_table
from tandem_router.members import Member
from tandem_router.places import WORDS, Table, is_broken


def check(table: Table, members: Sequence[Member | None], held: int) -> None:
    """Raises TandemError for the first contradiction; `held`: what all members should hold."""
    bits = np.zeros((len(Tier), 64 * int(table.state[WORDS])), np.int64)
    if index_table.count_bits(table.address, bits) != table.used or is_broken(table.address):
        raise TandemError("the KV index counts its rows wrongly: restart the router, and report this")
    if sum(member.held for member in members if member is not None) != held:
        raise TandemError("the KV index counts its holdings wrongly: restart the router, and report this")
    for slot in range(bits.shape[1]):
        _check_slot(table, slot, members[slot] if slot < len(members) else None, bits[:, slot])


def _check_slot(table: Table, slot: int, member: Member | None, bits: NDArray[np.int64]) -> None:
    held, wrong = np.zeros(len(Tier), np.int64), 0
    if member is not None:
        wrong = holdings.faults(table.address, member.address, held)
        wrong += (member.table.used != member.held) + is_broken(member.table.address)
    if wrong or (held != bits).any():
        raise TandemError(f"slot {slot} of the KV index contradicts itself ({wrong} faults, {held} blocks by tier, {bits} bits): "
                          "remove the worker and add it again, and report this")
