# SPDX-License-Identifier: Apache-2.0
"""What has been measured so far, a line per point, so that a profile that was cut short goes on where it was.

The first line says what is measured; a journal of something else is refused.
"""

from pathlib import Path

import msgspec

from tandem_planner.profiler.grid import DecodePoint, PrefillPoint
from tandem_planner.profiler.measuring import DecodeResult, PrefillResult
from tandem_protocol.errors import ConfigError

NAME = "journal.jsonl"


class Subject(msgspec.Struct, frozen=True):
    """What a journal is about."""

    url: str
    model: str
    gpus: int
    repeats: int
    seed: int


class _PrefillLine(msgspec.Struct, frozen=True, tag="prefill"):
    point: PrefillPoint
    result: PrefillResult


class _DecodeLine(msgspec.Struct, frozen=True, tag="decode"):
    point: DecodePoint
    result: DecodeResult


class Journal:
    """Points and their results. One process at a time."""

    def __init__(self, folder: Path, subject: Subject) -> None:
        """Opens or begins the folder's journal. Raises ConfigError for one of another subject."""
        self._path = folder / NAME
        self.prefill: dict[PrefillPoint, PrefillResult] = {}
        self.decode: dict[DecodePoint, DecodeResult] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            self._read(subject)
        else:
            self._append(subject)

    def add_prefill(self, point: PrefillPoint, result: PrefillResult) -> None:
        """Notes a point at once."""
        self._append(_PrefillLine(point, result))
        self.prefill[point] = result

    def add_decode(self, point: DecodePoint, result: DecodeResult) -> None:
        """Notes a point at once."""
        self._append(_DecodeLine(point, result))
        self.decode[point] = result

    def _append(self, line: msgspec.Struct) -> None:
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")

    def _read(self, subject: Subject) -> None:
        first, *lines = self._path.read_bytes().split(b"\n")
        try:
            found = msgspec.json.decode(first, type=Subject)
            for line in filter(None, lines[:-1]):  # what follows the last newline is a line that was cut short
                self._take(msgspec.json.decode(line, type=_PrefillLine | _DecodeLine))
        except msgspec.DecodeError as exc:
            raise ConfigError(f"{self._path} can't be read ({exc}): delete it to measure anew") from exc
        if found != subject:
            raise ConfigError(f"{self._path} is of {found}, not of {subject}: choose another --out, or delete it to measure anew")
        if lines and lines[-1]:
            self._path.write_bytes(b"\n".join([first, *lines[:-1], b""]))

    def _take(self, line: _PrefillLine | _DecodeLine) -> None:
        if isinstance(line, _PrefillLine):
            self.prefill[line.point] = line.result
        else:
            self.decode[line.point] = line.result
