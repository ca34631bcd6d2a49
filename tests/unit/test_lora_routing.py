# SPDX-License-Identifier: Apache-2.0
"""The router's picture of one worker with two adapters: hits of one are never taken for those of the other, or of the base model."""

import random

import numpy as np
import pytest

from router_fleet import BLOCK, Clock, worker
from tandem_protocol.kv_events import BlockStored
from tandem_protocol.requests import GenerationRequest
from tandem_protocol.roles import Role
from tandem_router.config import RouterSettings
from tandem_router.index import KvIndex
from tandem_router.placement import Placement, RouteRequest
from tandem_router.prompts import block_keys, lora_of

TOKENS = list(range(100, 100 + 5 * BLOCK + 1))
USERS = ("", "fr", "de")


def route(lora: str) -> RouteRequest:
    """As the router makes it of a client's request."""
    request = GenerationRequest(
        request_id="", prompt=TOKENS, images=(), stream=True, prepend_input=False, sampling={"lora_name": lora} if lora else {},
        returns=frozenset(), handoff=None, priority=0, timeout_s=None,
    )
    return RouteRequest(isl=len(TOKENS), keys=block_keys(TOKENS, BLOCK, request), lora=lora_of(request))


@pytest.fixture
def index() -> KvIndex:
    """Knows nothing yet."""
    return KvIndex()


@pytest.fixture
def placed(index: KvIndex) -> Placement:
    """One worker that has both adapters."""
    made = Placement(RouterSettings(), Role.AGGREGATED, index, Clock(), random.Random(1))
    made.set_workers([worker("w0", loras=("fr", "de"))])
    return made


def explained(placed: Placement, lora: str) -> int:
    """Cached tokens that a query would be told."""
    return placed.peek(route(lora)).cached_tokens


@pytest.mark.parametrize("owner", USERS)
def test_events_of_one_are_hits_of_no_other(placed: Placement, index: KvIndex, owner: str) -> None:
    """Keys are rooted in the adapter's name."""
    tokens = np.array(TOKENS[: 5 * BLOCK], np.uint32)
    index.apply(0, BlockStored(hashes=np.arange(1, 6, dtype=np.uint64), tokens=tokens, block_size=BLOCK, lora_name=owner))
    assert {user: explained(placed, user) for user in USERS} == {user: 5 * BLOCK if user == owner else 0 for user in USERS}


@pytest.mark.parametrize("owner", USERS)
def test_nor_are_prefixes_that_are_only_believed_in(placed: Placement, owner: str) -> None:
    """What was placed a moment ago counts before its events come, for the same adapter alone."""
    placed.choose(route(owner))
    assert {user: explained(placed, user) for user in USERS} == {user: 5 * BLOCK if user == owner else 0 for user in USERS}
