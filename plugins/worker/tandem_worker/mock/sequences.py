# SPDX-License-Identifier: Apache-2.0
"""Requests as a mock engine sees them: what comes in, its state while it runs, what comes out."""

from dataclasses import dataclass, field

import msgspec

from tandem_protocol.kv_events import Event
from tandem_worker.mock.tokens import TokenChain, Tokens


@dataclass(frozen=True, eq=False)
class EngineRequest:
    """One request. `remote_tokens` of the prompt's KV arrive by transfer (decode workers), none for 0."""

    request_id: str
    prompt: Tokens
    max_tokens: int
    remote_tokens: int = 0


class EngineOutput(msgspec.Struct, frozen=True, gc=False):
    """One token of one request."""

    request_id: str
    token_id: int
    index: int
    """0 for the request's first token."""
    cached_tokens: int
    """Prompt tokens that the engine's own cache had when the request was first scheduled."""
    finished: bool


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in the engine. Invariant: `computed` <= tokens held by `blocks` <= tokens of `chain`, rounded up to blocks."""

    request: EngineRequest
    chain: TokenChain
    limit: int
    """Tokens to generate in this role."""
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose KV is in `blocks`."""
    cached_blocks: int = 0
    """Leading blocks that are findable by hash."""
    cached_tokens: int = -1
    """-1 until first scheduled."""
    generated: int = 0
    arrives_at: float = 0.0
    """When the transfer of its prompt's KV is done."""


@dataclass(frozen=True)
class StepResult:
    """What one step did. `next_time`: when it ends and the next may begin; None if there is nothing to do before a new request.

    Outputs and events are due at `next_time`; a step without a batch may have events all the same, due at once.
    """

    next_time: float | None
    outputs: tuple[EngineOutput, ...] = ()
    events: tuple[Event, ...] = ()
    busy_s: float = 0.0


@dataclass
class EngineCounts:
    """Totals since the start."""

    steps: int = 0
    prompt_tokens: int = 0
    """Of requests at their first scheduling; `cached_tokens` of them came from the cache."""
    cached_tokens: int = 0
    computed_tokens: int = 0
    """Tokens that steps computed, recomputation after preemption included."""
    generated_tokens: int = 0
    preemptions: int = 0
    transferred_tokens: int = 0
    expired_handoffs: int = 0
