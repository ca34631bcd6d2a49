# SPDX-License-Identifier: Apache-2.0
"""What routers of the same workers tell each other of their requests in flight."""

from collections.abc import Callable

import msgspec


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    replica: str
    """The router that placed the request."""
    pool: str
    """Role of the workers that it was placed among: each pool has its own books."""
    ticket: int
    """The request, unique within replica and pool."""


class Add(_Event, frozen=True, kw_only=True, tag=True):
    """A request was placed."""

    worker: str
    dp_rank: int
    keys: bytes
    """Keys of the prompt's full blocks, little-endian u64."""
    isl: int
    """Prompt length in tokens."""
    block_size: int
    prefill_tokens: int
    """Prompt tokens that the worker must still compute; 0 once its prefill is done."""
    expected_output_tokens: int = 0
    """0 for unknown."""
    produced: int = 0
    """Tokens generated so far, for a replica that hears of the request late."""


class PrefillDone(_Event, frozen=True, kw_only=True, tag=True):
    """The prompt is computed."""


class Output(_Event, frozen=True, kw_only=True, tag=True):
    """The request has grown into another block."""

    produced: int
    """Tokens generated so far, all together."""


class Free(_Event, frozen=True, kw_only=True, tag=True):
    """The request is over."""


BookEvent = Add | PrefillDone | Output | Free
Publisher = Callable[[BookEvent], None]

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[BookEvent] = msgspec.msgpack.Decoder(BookEvent)


def encode_event(event: BookEvent) -> bytes:
    """msgpack."""
    return _ENCODER.encode(event)


def decode_event(raw: bytes) -> BookEvent:
    """Inverse of `encode_event`; raises msgspec.DecodeError for what is no event."""
    return _DECODER.decode(raw)


def publish_nothing(_event: BookEvent) -> None:
    """The publisher of a router that has no replicas."""
