# SPDX-License-Identifier: Apache-2.0
"""From a source to a checked copy of an adapter. Blocking; runs on threads of its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tandem_protocol.errors import RequestError, UnavailableError
from tandem_worker.lora.adapter import CONFIG_FILE, WEIGHTS_FILE
from tandem_worker.lora.archive import unpack
from tandem_worker.lora.checks import Fit, check_folder
from tandem_worker.lora.deadline import Deadline
from tandem_worker.lora.intake import Intake
from tandem_worker.lora.source import Kind, Source, allowed
from tandem_worker.lora.store import Copy, CopyStore

_FILES = (CONFIG_FILE, WEIGHTS_FILE)


class Bucket(Protocol):
    """S3, as `s3.S3Files` has it."""

    def fetch(self, bucket: str, keys: dict[str, Path], intake: Intake, deadline: Deadline) -> None:
        """Key -> new file."""


class Hub(Protocol):
    """A hub, as `hub.HubFiles` has it."""

    def fetch(self, repo: str, revision: str, files: dict[str, Path], intake: Intake, deadline: Deadline) -> None:
        """Name -> new file."""


@dataclass(frozen=True)
class Fetcher:
    """Fetches, checks and copies adapters. Thread-safe. `roots` are without links."""

    store: CopyStore
    roots: tuple[Path, ...]
    max_bytes: int
    fit: Fit
    bucket: Bucket
    hub: Hub

    def fetch(self, source: Source, deadline: Deadline) -> Copy:
        """The copy, to be given back with `store.release`. Raises RequestError or UnavailableError; then nothing is left behind."""
        try:
            with self.store.staging() as staging:
                folder = staging / "adapter"
                folder.mkdir()
                self._fill(folder, staging, source, deadline)
                check_folder(folder, self.fit)
                return self.store.install(folder, deadline)
        except OSError as exc:
            raise UnavailableError(f"the adapter can't be copied ({exc}): look at DYN_LORA_PATH") from exc

    def release(self, copy: Copy) -> None:
        """Gives a copy back."""
        self.store.release(copy)

    def _fill(self, folder: Path, staging: Path, source: Source, deadline: Deadline) -> None:
        intake = Intake(self.max_bytes)
        if not source.is_archive:
            self._fill_files(folder, source, intake, deadline)
            return
        archive = staging / f"archive{_suffix(source.path)}"
        if source.kind is Kind.S3:
            self.bucket.fetch(source.place, {source.path: archive}, Intake(self.max_bytes), deadline)
        else:
            self._copy(Path(source.path), archive, Intake(self.max_bytes), deadline)
        unpack(archive, folder, intake, deadline)

    def _fill_files(self, folder: Path, source: Source, intake: Intake, deadline: Deadline) -> None:
        if source.kind is Kind.S3:
            self.bucket.fetch(source.place, {f"{source.path}/{name}": folder / name for name in _FILES}, intake, deadline)
        elif source.kind is Kind.HUB:
            self.hub.fetch(source.place, source.path, {name: folder / name for name in _FILES}, intake, deadline)
        else:
            for name in _FILES:
                self._copy(Path(source.path) / name, folder / name, intake, deadline)

    def _copy(self, path: Path, target: Path, intake: Intake, deadline: Deadline) -> None:
        real = allowed(path, self.roots)
        if not real.is_file():
            raise RequestError(f"{path} is no plain file: give the folder or archive of an adapter")
        try:
            stream = real.open("rb")
        except OSError as exc:
            raise RequestError(f"{path} can't be read ({exc.strerror}): the server's user needs permission") from exc
        with stream:
            intake.take(stream, target, deadline)


def _suffix(path: str) -> str:
    return ".zip" if path.lower().endswith(".zip") else ".tar"
