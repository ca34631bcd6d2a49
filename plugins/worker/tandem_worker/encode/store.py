# SPDX-License-Identifier: Apache-2.0
"""A folder of embeddings, shared by the engines of one model on hosts that see it: bounded, checksummed, never half-written.

A file is one embedding, appears by rename, and ends with a checksum over all before it: a torn or spoilt file is a miss and is
removed. Its name is a hash of what was encoded and of the model that encoded it, so no engine takes another model's. Files that
nobody used for a while go, and the least recently used where the folder would grow beyond its bound. Nothing is synced: what a crash
loses is encoded again. Edge module: files. Several processes use a folder at once; one object belongs to one thread.
"""

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import blake3

log = logging.getLogger(__name__)

_MAGIC = b"TANDEMB2"
_LENGTH_BYTES = 4
_CHECKSUM_BYTES = 16
_SUFFIX = ".embedding"
_PARTIAL = ".partial-"
_LOCK_TRIES = 100
_LOCK_PAUSE_S = 0.005


@dataclass(frozen=True)
class Embedding:
    """What an encoder made of one image."""

    dtype: str
    """As torch names it, e.g. `bfloat16`."""
    shape: tuple[int, ...]
    """Tokens first."""
    data: bytes
    """Row by row, in the machine's own byte order."""


@dataclass(frozen=True)
class Bounds:
    """Of one folder."""

    max_bytes: int
    ttl_s: float


class EmbeddingStore:
    """The embeddings that one model's engines share."""

    def __init__(self, folder: Path, model: str, bounds: Bounds, clock: Callable[[], float] = time.time) -> None:
        """`model` stands for everything that an embedding depends on besides the image."""
        self._folder, self._model, self._bounds, self._clock = folder, model, bounds, clock
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def has(self, image_id: str) -> bool:
        """Whether it is there and young enough; counts as a use."""
        path = self._path(image_id)
        try:
            fresh = self._is_fresh(path.stat())
            if fresh:
                self._touch(path)
        except OSError:
            return False
        return fresh

    def get(self, image_id: str) -> Embedding | None:
        """The embedding, checked; None if it is not there. A file that fails its check is removed."""
        path = self._path(image_id)
        try:
            if not self._is_fresh(path.stat()):
                return None
            found = _decode(path.read_bytes(), image_id)
            self._touch(path)
        except ValueError as exc:
            log.warning("embedding.spoilt path=%s: %s", path, exc)
            path.unlink(missing_ok=True)
            return None
        except OSError:
            return None
        return found

    def put(self, image_id: str, embedding: Embedding) -> bool:
        """Stores it, making room; False if it is larger than the whole folder may be, or the folder can't be written."""
        raw = _encode(embedding, image_id)
        if len(raw) > self._bounds.max_bytes:
            log.warning("embedding.too_large bytes=%d: beyond TANDEM_EMBEDDING_MAX_GB", len(raw))
            return False
        partial = self._folder / f"{_PARTIAL}{os.getpid()}-{self._path(image_id).name}"
        try:
            with self._locked():
                self._make_room(len(raw))
                partial.write_bytes(raw)
                os.utime(partial, (self._clock(), self._clock()))
                partial.replace(self._path(image_id))
        except OSError as exc:
            log.warning("embedding.not_stored: %s", exc)
            partial.unlink(missing_ok=True)
            return False
        return True

    def size_bytes(self) -> int:
        """Of all files in the folder, partial ones included."""
        return sum(size for _, size, _ in self._files())

    def _make_room(self, needed: int) -> None:
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for used, size, path in files:
            expired = used + self._bounds.ttl_s < self._clock()
            if expired or total + needed > self._bounds.max_bytes:
                path.unlink(missing_ok=True)
                total -= size

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Last use, size and path of each file; those that go meanwhile are left out."""
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if not entry.name.endswith(_SUFFIX):
                    continue
                try:
                    stat = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                yield stat.st_mtime, stat.st_size, Path(entry.path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer of the folder at a time, so that its bound holds; one that dies leaves no lock behind. Raises OSError if others
        write for too long: an engine's step waits here, and what isn't stored is only encoded again."""
        with (self._folder / ".lock").open("wb") as lock:
            for _ in range(_LOCK_TRIES):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(_LOCK_PAUSE_S)
            else:
                raise TimeoutError(f"others write to {self._folder} for more than {_LOCK_TRIES * _LOCK_PAUSE_S:g} s")
            yield

    def _is_fresh(self, stat: os.stat_result) -> bool:
        return stat.st_mtime + self._bounds.ttl_s >= self._clock()

    def _touch(self, path: Path) -> None:
        os.utime(path, (self._clock(), self._clock()))

    def _path(self, image_id: str) -> Path:
        name = hashlib.blake2b(f"{self._model}\0{image_id}".encode(), digest_size=20).hexdigest()
        return self._folder / f"{name}{_SUFFIX}"


def _encode(embedding: Embedding, image_id: str) -> bytes:
    head = json.dumps({"dtype": embedding.dtype, "shape": embedding.shape, "image": image_id}).encode()
    head = b"".join((_MAGIC, len(head).to_bytes(_LENGTH_BYTES, "little"), head))
    return b"".join((head, embedding.data, _checksum(head, embedding.data)))


def _decode(raw: bytes, image_id: str) -> Embedding:
    """Raises ValueError for anything but the file of this image."""
    body, checksum = memoryview(raw)[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]  # a view, since a copy takes as long as the checksum
    start = len(_MAGIC) + _LENGTH_BYTES
    if not raw.startswith(_MAGIC) or checksum != _checksum(body):
        raise ValueError("the checksum is another one")
    end = start + int.from_bytes(body[len(_MAGIC):start], "little")
    head = json.loads(bytes(body[start:end]))
    if head["image"] != image_id:
        raise ValueError("it is the embedding of another image")
    return Embedding(head["dtype"], tuple(head["shape"]), bytes(body[end:]))


def _checksum(*parts: bytes | memoryview) -> bytes:
    """blake3, since engines wait for it: some ten times as fast as hashlib's on the megabytes of an embedding."""
    digest = blake3.blake3()
    for part in parts:
        digest.update(part)
    return digest.digest(length=_CHECKSUM_BYTES)
