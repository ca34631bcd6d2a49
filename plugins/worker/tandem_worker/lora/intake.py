# SPDX-License-Identifier: Apache-2.0
"""How many bytes an adapter may bring, all its files together."""

from collections.abc import Iterable
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Protocol

from tandem_protocol.errors import RequestError, UnavailableError
from tandem_worker.lora.deadline import Deadline

_CHUNK = 1 << 20


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""


class Intake:
    """Writes what arrives, up to a bound. For one load; one thread."""

    def __init__(self, max_bytes: int) -> None:
        self._left, self._max = max_bytes, max_bytes

    def take(self, stream: Readable, target: Path, deadline: Deadline) -> None:
        """Writes the stream into a new file. Raises RequestError beyond the bound, UnavailableError out of time or space."""
        self.take_chunks(iter(partial(stream.read, _CHUNK), b""), target, deadline)

    def take_chunks(self, chunks: Iterable[bytes], target: Path, deadline: Deadline) -> None:
        """As `take`."""
        with target.open("xb", buffering=0) as file:
            for chunk in chunks:
                deadline.check()
                self._left -= len(chunk)
                if self._left < 0:
                    raise RequestError(f"the adapter has more than {self._max / 1e9:g} GB: raise TANDEM_LORA_MAX_GB if it is meant to")
                _write(file, memoryview(chunk), target.parent)


def _write(file: FileIO, chunk: memoryview, folder: Path) -> None:
    try:
        while chunk:
            chunk = chunk[file.write(chunk) :]
    except OSError as exc:
        raise UnavailableError(f"{folder} can't take the adapter ({exc.strerror}): make room, or set DYN_LORA_PATH") from exc
