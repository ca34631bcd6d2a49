# SPDX-License-Identifier: Apache-2.0
"""Discovery in a folder of one host: one JSON file per worker, no server.

A file's modification time is its worker's sign of life; a file older than the lease, or of a process of this host that
is gone, is not listed. Readers remove what has been dead for long. Watching is polling: a scan of 64 files takes 3.4 ms
(two busy cores) and needs nothing of the file system but names and times. Disk is touched on a thread of its own, so
that a slow one delays no token.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote, unquote

import msgspec

from tandem_protocol.discovery.feed import Feed
from tandem_protocol.discovery.interface import (
    BEATS_PER_LEASE,
    LEASE_TTL_S,
    Counts,
    Discovery,
    R,
    Registration,
    Snapshot,
    check_same_worker,
)
from tandem_protocol.errors import ConfigError, UnavailableError
from tandem_protocol.records import Record
from tandem_protocol.workers import WorkerRecord

log = logging.getLogger(__name__)

POLL_S = 0.2
"""Between two scans: how much later than at once a change is seen."""
_CALL_TIMEOUT_S = 5.0
_SWEEP_AFTER_LEASES = 6
"""Dead files are kept for a minute: whoever looks for the reason still finds them."""
_STAT_BYTES = 1024
"""More than a line of /proc/PID/stat has up to the state."""
_SUFFIX, _PARTIAL = ".json", ".tandem-partial"
T = TypeVar("T")


def open_folder(path: str, kind: type[Record]) -> "FileDiscovery[Any]":
    """The folder of a `file:` URL, for other records than workers a folder in it.

    `file:/a` and `file:///a` are the same. Raises ConfigError for a relative path.
    """
    folder = Path(unquote(path.removeprefix("//")))
    if not folder.is_absolute():
        raise ConfigError(f"TANDEM_DISCOVERY='file:{path}' names no absolute path: write file:/folder")
    return FileDiscovery(folder) if kind is WorkerRecord else FileDiscovery(folder / kind.collection, kind=kind)


class Entry(msgspec.Struct, Generic[R], frozen=True, kw_only=True):
    """What a file holds."""

    record: R
    pid: int
    host: str
    """Where `pid` means something: the host name and the kernel's number of the pid namespace."""


def this_host() -> str:
    """The `host` of entries of this process."""
    with suppress(OSError):
        return f"{socket.gethostname()}/{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def is_running(pid: int) -> bool:
    """Whether the process lives; one that waits for its parent to collect it does not."""
    try:
        # Not pathlib, which takes several times as long, and every scan asks this of every worker.
        file = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True
    try:
        return not os.read(file, _STAT_BYTES).rpartition(b")")[2].lstrip().startswith((b"Z", b"X"))
    except OSError:
        return False  # it ended between the two calls
    finally:
        os.close(file)


class Folder(Generic[R]):
    """The files. Every method blocks on the disk and raises OSError as it comes; calls must not overlap."""

    def __init__(self, path: Path, counts: Counts, lease_s: float = LEASE_TTL_S, now: Callable[[], float] = time.time,
                 kind: type[Record] = WorkerRecord) -> None:
        self.path = path
        self._decoder: msgspec.json.Decoder[Entry[R]] = msgspec.json.Decoder(Entry[kind])  # type: ignore[valid-type]  # known at run time
        self._counts = counts
        self._lease_s = lease_s
        self._now = now
        self._host = this_host()
        self._cache: dict[str, _Cached[R]] = {}

    def write(self, record: R) -> None:
        """Adds or replaces an entry, whole or not at all."""
        self.path.mkdir(parents=True, exist_ok=True)
        target = self._file(record.id)
        partial = target.with_suffix(f".{os.getpid()}{_PARTIAL}")
        partial.write_bytes(msgspec.json.encode(Entry(record=record, pid=os.getpid(), host=self._host)))
        now = self._now()
        os.utime(partial, (now, now))
        partial.replace(target)

    def touch(self, name: str) -> bool:
        """Gives the sign of life; False if the entry is gone."""
        now = self._now()
        try:
            os.utime(self._file(name), (now, now))
        except FileNotFoundError:
            return False
        return True

    def remove(self, name: str) -> None:
        """Removes an entry, if it is there."""
        self._file(name).unlink(missing_ok=True)

    def scan(self) -> tuple[R, ...]:
        """The living workers, ordered by id; sweeps the long dead. A folder that does not exist yet is empty."""
        try:
            with os.scandir(self.path) as found:
                files = {file.name: file.stat() for file in found if file.is_file()}
        except FileNotFoundError:
            files = {}
        self._cache = {name: self._read(name, stat) for name, stat in files.items() if name.endswith(_SUFFIX)}
        entries = [cached.entry for name, cached in self._cache.items() if self._lives(cached.entry, files[name])]
        self._sweep(files)
        return tuple(sorted((entry.record for entry in entries if entry is not None), key=lambda record: record.id))

    def _read(self, name: str, stat: os.stat_result) -> "_Cached[R]":
        version = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        cached = self._cache.get(name)
        if cached is not None and cached.version == version:
            return cached
        try:
            return _Cached(version, self._decoder.decode((self.path / name).read_bytes()))
        except FileNotFoundError:
            return _Cached(version, None)  # left between the two looks
        except msgspec.DecodeError as exc:
            self._counts.bad_records += 1
            log.warning("discovery.bad_record file=%s error=%s: left out, remove it or update whoever wrote it", self.path / name, exc)
            return _Cached(version, None)

    def _lives(self, entry: Entry[R] | None, stat: os.stat_result) -> bool:
        if entry is None or self._now() - stat.st_mtime > self._lease_s:
            return False
        return entry.host != self._host or is_running(entry.pid)

    def _sweep(self, files: dict[str, os.stat_result]) -> None:
        """Removes old entries and half-written ones, and nothing that is not ours. A worker that was only asleep writes its entry again."""
        for name, stat in files.items():
            cached = self._cache.get(name)
            ours = name.endswith(_PARTIAL) or (cached is not None and cached.entry is not None)
            if ours and self._now() - stat.st_mtime > self._lease_s * _SWEEP_AFTER_LEASES:
                with suppress(OSError):  # somebody else was faster, or the folder is not ours to clean
                    (self.path / name).unlink()
                    self._counts.swept += 1

    def _file(self, name: str) -> Path:
        return self.path / f"{quote(name, safe='')}{_SUFFIX}"


@dataclass(frozen=True)
class _Cached(Generic[R]):
    """A file that was read: heartbeats change its time, so it is read again once per beat at most."""

    version: tuple[int, int, int]
    entry: Entry[R] | None


class FileDiscovery(Discovery[R]):
    """A folder, watched by polling."""

    def __init__(self, path: Path, lease_s: float = LEASE_TTL_S, poll_s: float = POLL_S, now: Callable[[], float] = time.time,
                 kind: type[Record] = WorkerRecord) -> None:
        super().__init__()
        self.path = path
        self._folder: Folder[R] = Folder(path, self.counts, lease_s, now, kind)
        self._lease_s = lease_s
        self._poll_s = poll_s
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="tandem-discovery")
        self._feed: Feed[R] = Feed()
        self._poller: asyncio.Task[None] | None = None
        self._registrations: list[FileRegistration[R]] = []

    async def register(self, record: R) -> Registration[R]:
        """Writes the file; a task of this loop keeps it alive from then on."""
        await self.on_disk(lambda: self._folder.write(record))
        self.counts.registrations += 1
        registration = FileRegistration(self, self._folder, record, self._lease_s / BEATS_PER_LEASE)
        self._registrations.append(registration)
        return registration

    def watch(self) -> AsyncGenerator[Snapshot[R], None]:
        """Every scan that differs."""
        if self._poller is None:
            self._poller = asyncio.create_task(self._poll())
        return self._feed.follow()

    async def list(self) -> tuple[R, ...]:
        """One scan."""
        return await self.on_disk(self._folder.scan)

    async def close(self) -> None:
        """Ends the polling and removes the own files."""
        for registration in self._registrations:
            await registration.close()
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.wait([self._poller], timeout=_CALL_TIMEOUT_S)
        self._feed.close()
        self._disk.shutdown(wait=False, cancel_futures=True)

    async def look(self) -> None:
        """One turn of the polling."""
        try:
            self._feed.publish(Snapshot(records=await self.list()))
        except UnavailableError as exc:
            self._keep_view(exc)

    async def on_disk(self, call: Callable[[], T]) -> T:
        """Runs a call of the folder on the disk's thread. Raises UnavailableError if it fails or takes too long."""
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                return await asyncio.get_running_loop().run_in_executor(self._disk, call)
        except (OSError, TimeoutError) as exc:
            raise UnavailableError(f"the discovery folder {self.path} can't be used ({exc or 'timeout'}): check it") from exc

    async def _poll(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(self._poll_s)

    def _keep_view(self, exc: UnavailableError) -> None:
        last = self._feed.latest
        if last is None or last.current:
            self.counts.losses += 1
            log.warning("discovery.lost error=%s: keeping the last view", exc)
        self._feed.publish(Snapshot(records=last.records if last else (), current=False))


class FileRegistration(Registration[R]):
    """One file and the task that touches it."""

    def __init__(self, discovery: FileDiscovery[R], folder: Folder[R], record: R, beat_s: float) -> None:
        self._discovery = discovery
        self._folder = folder
        self._record = record
        self._beat_s = beat_s
        self._held = True
        self._task: asyncio.Task[None] | None = asyncio.create_task(self._beat_for_ever())

    @property
    def record(self) -> R:
        """As last asked for."""
        return self._record

    @property
    def held(self) -> bool:
        """Whether the last write or touch succeeded."""
        return self._held

    async def update(self, record: R) -> None:
        """Replaces the file; a failure is repaired by a later beat."""
        check_same_worker(self._record, record)
        self._record = record
        if self._task is not None:
            await self._try(self._write)

    async def close(self) -> None:
        """Removes the file."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait([task], timeout=_CALL_TIMEOUT_S)
        with suppress(UnavailableError):
            await self._discovery.on_disk(lambda: self._folder.remove(self._record.id))
        self._held = False

    async def beat(self) -> None:
        """One sign of life; writes the file again if it is gone or its last write failed."""
        await self._try(self._touch if self._held else self._rewrite)

    async def _beat_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._beat_s)
            await self.beat()

    async def _try(self, step: Callable[[], None]) -> None:
        try:
            await self._discovery.on_disk(step)
        except UnavailableError as exc:
            if self._held:
                self._discovery.counts.losses += 1
                log.warning("discovery.lost worker=%s error=%s", self._record.id, exc)
            self._held = False
        else:
            self._held = True

    def _touch(self) -> None:
        if not self._folder.touch(self._record.id):
            self._rewrite()

    def _rewrite(self) -> None:
        self._write()
        self._discovery.counts.re_registrations += 1
        log.info("discovery.registered_again worker=%s", self._record.id)

    def _write(self) -> None:
        self._folder.write(self._record)
