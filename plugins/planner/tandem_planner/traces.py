# SPDX-License-Identifier: Apache-2.0
"""Mooncake-style traces: JSON lines of `timestamp` (ms), `input_length`, `output_length` (tokens) and, optionally, `hash_ids`.

One id per block of 512 prompt tokens; equal ids at the beginning of prompts are equal tokens. Other fields are ignored.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from tandem_protocol.errors import ConfigError

BLOCK_TOKENS = 512
_MAX_FILE_BYTES = 1 << 30


class TraceRequest(msgspec.Struct, frozen=True):
    """One line of a trace."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Annotated[int, msgspec.Meta(ge=1)]
    output_length: Annotated[int, msgspec.Meta(ge=0)]
    hash_ids: list[int] = []


def read_requests(path: Path) -> Iterator[TraceRequest]:
    """A file's requests in its own order, one line at a time. Raises ConfigError, with the line, for what is no trace."""
    decoder = msgspec.json.Decoder(TraceRequest)
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"trace {path} has more than {_MAX_FILE_BYTES >> 20} MiB: cut it into pieces")
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _decoded(decoder, line, f"{path}, line {number}")
    except OSError as exc:
        raise ConfigError(f"the trace can't be read: {exc}") from exc


def _decoded(decoder: msgspec.json.Decoder[TraceRequest], line: bytes, where: str) -> TraceRequest:
    try:
        return decoder.decode(line)
    except msgspec.MsgspecError as exc:
        fields = ", ".join(TraceRequest.__struct_fields__)
        raise ConfigError(f"{where} is no request of a trace ({exc}): give JSON lines of {fields}") from exc
