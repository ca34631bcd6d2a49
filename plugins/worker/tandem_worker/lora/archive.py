# SPDX-License-Identifier: Apache-2.0
"""Unpacks an adapter's archive without trusting it: only the two files of an adapter come out, under their own names."""

import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from tandem_protocol.errors import RequestError
from tandem_worker.lora.adapter import CONFIG_FILE, WEIGHTS_FILE
from tandem_worker.lora.deadline import Deadline
from tandem_worker.lora.intake import Intake

Entry = tuple[str, Callable[[], IO[bytes]]]
_MOST_ENTRIES = 1000
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, OSError)


def unpack(archive: Path, into: Path, intake: Intake, deadline: Deadline) -> None:
    """Takes the adapter's files out of a tar or zip; they may lie in a folder of it, but both in the same one.

    Raises RequestError for an archive that is broken or too large, or has an entry that is a link or device, or leads out of it.
    """
    try:
        if archive.name.lower().endswith(".zip"):
            with zipfile.ZipFile(archive) as opened:
                _take(_zip_entries(opened), into, intake, deadline)
        else:
            with tarfile.open(archive) as opened_tar:
                _take(_tar_entries(opened_tar), into, intake, deadline)
    except _BROKEN as exc:
        raise RequestError(f"the archive can't be unpacked ({exc}): make it anew with tar or zip") from exc


def _take(entries: Iterator[Entry], into: Path, intake: Intake, deadline: Deadline) -> None:
    folders: dict[str, PurePosixPath] = {}
    for number, (name, opened) in enumerate(entries):
        deadline.check()
        path = PurePosixPath(name)
        if number >= _MOST_ENTRIES:
            raise RequestError(f"the archive has more than {_MOST_ENTRIES} entries: pack the adapter alone")
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise RequestError(f"the archive's entry {name!r} leads out of it: make it from inside the adapter's folder")
        if path.name not in {CONFIG_FILE, WEIGHTS_FILE}:
            continue
        if path.name in folders:
            raise RequestError(f"the archive has {path.name} twice: pack one adapter")
        folders[path.name] = path.parent
        with opened() as stream:
            intake.take(stream, into / path.name, deadline)
    if len(set(folders.values())) > 1:
        raise RequestError("the archive's files lie in different folders: pack one adapter")


def _tar_entries(archive: tarfile.TarFile) -> Iterator[Entry]:
    for member in archive:
        if not (member.isreg() or member.isdir()):
            raise RequestError(f"the archive's entry {member.name!r} is a link or device: pack plain files (tar --dereference)")
        if member.isreg():
            yield member.name, partial(_tar_stream, archive, member)


def _tar_stream(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = archive.extractfile(member)
    assert stream is not None  # so for regular files
    return stream


def _zip_entries(archive: zipfile.ZipFile) -> Iterator[Entry]:
    for member in archive.infolist():
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in {0, stat.S_IFREG, stat.S_IFDIR}:
            raise RequestError(f"the archive's entry {member.filename!r} is a link or device: pack plain files")
        if not member.is_dir():
            yield member.filename, partial(archive.open, member)
