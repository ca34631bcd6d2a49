# SPDX-License-Identifier: Apache-2.0
"""The record by which a worker is known to routers and planners: what discovery stores and watches."""

from enum import StrEnum
from typing import ClassVar

import msgspec

from tandem_protocol.records import Record
from tandem_protocol.roles import Role


class WorkerState(StrEnum):
    """Whether a worker may be given requests."""

    STARTING = "starting"
    READY = "ready"
    """The only state in which placement considers a worker."""
    DRAINING = "draining"
    ASLEEP = "asleep"


class EventSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where one data-parallel rank of a worker publishes its KV events."""

    dp_rank: int
    endpoint: str
    """ZMQ PUB, to connect to: `tcp://host:port`."""
    replay_endpoint: str = ""
    """ZMQ ROUTER that repeats its buffer; empty if there is none."""
    merged: bool = False
    """The endpoint is that of all ranks of the worker: only batches of this rank, or of none, are meant."""


class WorkerRecord(Record, frozen=True, kw_only=True):
    """One worker: one engine behind one Triton model."""

    collection: ClassVar[str] = "workers"
    role: Role
    state: WorkerState
    model: str
    """The model's name or path as the engine was given it; routers send a request only to workers of their own model."""
    grpc_url: str
    """host:port of Triton's gRPC."""
    triton_model: str
    """The worker's model name on that server."""
    admin_url: str = ""
    event_sources: tuple[EventSource, ...] = ()
    """Empty for a worker that publishes no KV events."""
    block_size: int
    """Tokens per KV block, as its events have them."""
    total_blocks: int
    """KV blocks on the device, over all dp ranks."""
    max_num_seqs: int
    max_num_batched_tokens: int
    loras: tuple[str, ...] = ()
    speculation: str = ""
    """What of its speculative decoding prefill and decode must share; empty without it. Only equal ones are paired."""

    @property
    def placeable(self) -> bool:
        """Whether placement considers it."""
        return self.state is WorkerState.READY


def encode_record(record: WorkerRecord) -> bytes:
    """JSON."""
    return msgspec.json.encode(record)


def decode_record(raw: bytes) -> WorkerRecord:
    """Inverse of `encode_record`; raises msgspec.DecodeError for what is not a record."""
    return msgspec.json.decode(raw, type=WorkerRecord)
