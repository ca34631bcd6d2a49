# SPDX-License-Identifier: Apache-2.0
"""A bucket in memory that answers as boto3's client does, for tests that ask it thousands of times. Thread-safe.

Only what `tandem_kvbm.objects.bucket` uses. It is held against a real endpoint by the stores' contract, which both pass.
"""

import io
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import botocore.exceptions
import pytest

_PAGE = 1000


class _Stream(io.BytesIO):
    """urllib3's response as far as the bucket reads it."""

    @property
    def length_remaining(self) -> int:
        """Bytes left."""
        return len(self.getbuffer()) - self.tell()

    def release_conn(self) -> None:
        """There is none."""


class _Body:
    """botocore's."""

    def __init__(self, content: bytes) -> None:
        self._raw_stream = _Stream(content)

    def read(self) -> bytes:
        """All of it."""
        return self._raw_stream.read()


class MemoryS3:
    """One bucket, and a client of it. `away` makes every operation fail as an unreachable endpoint does;
    `deaf` loses the answers to uploads, which arrive."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self.away = self.deaf = False
        self._parts: dict[str, dict[int, bytes]] = {}
        self._signed: dict[str, dict[str, str]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def head_bucket(self, Bucket: str) -> None:
        """It is there."""
        with self._reached():
            pass

    def head_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        """Fails with 404."""
        with self._reached():
            self._get(Key, "404")
            return {"Metadata": self.metadata[Key]}

    def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        """Fails with NoSuchKey."""
        with self._reached():
            content = self._get(Key, "NoSuchKey")
        return {"Body": _Body(content), "ContentLength": len(content)}

    def put_object(self, Bucket: str, Key: str, Body: Any, ContentLength: int, Metadata: dict[str, str], IfNoneMatch: str = "") -> None:
        """Whole, or not at all."""
        content = Body.read()
        assert len(content) == ContentLength
        with self._reached():
            self._put(Key, content, Metadata, IfNoneMatch)

    def delete_objects(self, Bucket: str, Delete: dict[str, Any]) -> dict[str, Any]:
        """Those that aren't there are deleted, too."""
        with self._reached():
            for item in Delete["Objects"]:
                self.objects.pop(item["Key"], None)
        return {}

    def list_objects_v2(self, Bucket: str, Prefix: str, ContinuationToken: str = "") -> dict[str, Any]:
        """A page in the order of names."""
        with self._reached():
            names = sorted(name for name in self.objects if name.startswith(Prefix) and name > ContinuationToken)
        page = names[:_PAGE]
        return {"Contents": [{"Key": name} for name in page], "IsTruncated": len(names) > _PAGE,
                "NextContinuationToken": page[-1] if page else ""}

    def create_multipart_upload(self, Bucket: str, Key: str, Metadata: dict[str, str]) -> dict[str, str]:
        """Its number."""
        with self._reached():
            self._parts[name := f"upload-{next(self._numbers)}"] = {}
            self._signed[name] = Metadata
        return {"UploadId": name}

    def upload_part(self, Bucket: str, Key: str, UploadId: str, PartNumber: int, Body: Any, ContentLength: int) -> dict[str, str]:
        """Its tag."""
        content = Body.read()
        assert len(content) == ContentLength
        with self._reached():
            self._parts[UploadId][PartNumber] = content
        return {"ETag": str(PartNumber)}

    def complete_multipart_upload(self, Bucket: str, Key: str, UploadId: str, MultipartUpload: dict[str, Any],
                                  IfNoneMatch: str = "") -> None:  # fmt: skip
        """In the order of the parts."""
        with self._reached():
            content = b"".join(self._parts[UploadId][part["PartNumber"]] for part in MultipartUpload["Parts"])
            self._put(Key, content, self._signed[UploadId], IfNoneMatch)
            del self._parts[UploadId]

    def abort_multipart_upload(self, Bucket: str, Key: str, UploadId: str) -> None:
        """Its parts are gone."""
        with self._reached():
            self._parts.pop(UploadId, None)

    def close(self) -> None:
        """Nothing to close."""

    @contextmanager
    def _reached(self) -> Iterator[None]:
        if self.away:
            raise botocore.exceptions.EndpointConnectionError(endpoint_url="http://memory")
        with self._lock:
            yield

    def _get(self, name: str, code: str) -> bytes:
        if name not in self.objects:
            raise _client_error(404, code)
        return self.objects[name]

    def _put(self, name: str, content: bytes, metadata: dict[str, str], if_none_match: str) -> None:
        if if_none_match and name in self.objects:
            raise _client_error(412, "PreconditionFailed")
        self.objects[name], self.metadata[name] = content, metadata
        if self.deaf:
            raise botocore.exceptions.ReadTimeoutError(endpoint_url="http://memory")


def _client_error(status: int, code: str) -> botocore.exceptions.ClientError:
    return botocore.exceptions.ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "memory")


@pytest.fixture
def memory_s3(monkeypatch: pytest.MonkeyPatch) -> MemoryS3:
    """The bucket that every object store of the test talks to."""
    from tandem_kvbm.objects import bucket

    made = MemoryS3()
    monkeypatch.setattr(bucket, "_client", lambda config, timeout_s: made)
    return made
