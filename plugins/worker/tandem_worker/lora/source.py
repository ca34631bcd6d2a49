# SPDX-License-Identifier: Apache-2.0
"""Where an adapter comes from: a URI, read and refused before anything is fetched."""

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from tandem_protocol.errors import RequestError

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]*")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


class Kind(StrEnum):
    """How it is fetched."""

    FILE = "file"
    S3 = "s3"
    HUB = "hf"


@dataclass(frozen=True)
class Source:
    """A parsed URI."""

    uri: str
    kind: Kind
    place: str
    """FILE: empty; S3: the bucket; HUB: `org/name`."""
    path: str
    """FILE: an absolute path; S3: a prefix without outer slashes, or an archive's key; HUB: the revision."""

    @property
    def is_archive(self) -> bool:
        """Whether it is one file that has to be unpacked."""
        return self.kind is not Kind.HUB and self.path.lower().endswith(ARCHIVES)


def parse_source(uri: object) -> Source:
    """Reads `file:///folder`, `s3://bucket/prefix`, `hf://org/name[@revision]`; folders or archives. Raises RequestError."""
    if not isinstance(uri, str) or len(uri) > 2048 or "\0" in uri:
        raise RequestError('source.uri must be a text: send {"lora_name": "...", "source": {"uri": "file:///..."}}')
    try:
        parts = urlsplit(uri)
    except ValueError as exc:
        raise RequestError(f"source.uri {uri!r} is no URI ({exc}): use file:///folder, s3://bucket/prefix or hf://org/name") from exc
    if parts.query or parts.fragment:
        raise RequestError(f"source.uri {uri!r} has a query or fragment: give the plain place")
    place, path = unquote(parts.netloc), unquote(parts.path)
    if "\0" in path:
        raise RequestError(f"source.uri {uri!r} has a zero byte")
    if parts.scheme == Kind.FILE:
        return _file(uri, place, path)
    if parts.scheme == Kind.S3:
        return _s3(uri, place, path.strip("/"))
    if parts.scheme == Kind.HUB:
        return _hub(uri, f"{place}{path}")
    raise RequestError(f"source.uri {uri!r}: use file:///folder, s3://bucket/prefix or hf://org/name")


def _file(uri: str, host: str, path: str) -> Source:
    if host not in {"", "localhost"} or not path.startswith("/"):
        raise RequestError(f"source.uri {uri!r}: a file URI has three slashes and an absolute path, file:///models/adapter")
    return Source(uri, Kind.FILE, "", path)


def _s3(uri: str, bucket: str, key: str) -> Source:
    if not _BUCKET.fullmatch(bucket) or not key or ".." in PurePosixPath(key).parts:
        raise RequestError(f"source.uri {uri!r}: use s3://bucket/prefix, with a bucket's name in a-z, 0-9, dot and dash, and no '..'")
    return Source(uri, Kind.S3, bucket, key)


def _hub(uri: str, rest: str) -> Source:
    repo, _, revision = rest.strip("/").partition("@")
    if not _REPO.fullmatch(repo) or (revision and not _REVISION.fullmatch(revision)):
        raise RequestError(f"source.uri {uri!r}: use hf://org/name or hf://org/name@revision")
    return Source(uri, Kind.HUB, repo, revision or "main")


def allowed(path: Path, roots: tuple[Path, ...]) -> Path:
    """The path without links. Raises RequestError where that lies outside the roots, or isn't there."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as exc:
        raise RequestError(f"{path} can't be read ({exc}): give a place that this worker sees") from exc
    if not any(real.is_relative_to(root) for root in roots):
        shown = ", ".join(map(str, roots))
        raise RequestError(f"{path} is outside the folders that adapters may come from ({shown}): name its folder in TANDEM_LORA_ROOTS")
    if not real.exists():
        raise RequestError(f"there is no {path} on this worker's host: give the folder or archive of an adapter")
    return real
