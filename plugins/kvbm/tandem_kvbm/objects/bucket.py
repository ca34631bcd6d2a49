# SPDX-License-Identifier: Apache-2.0
"""A bucket, with bounded time. Edge module: the only one that knows boto3.

Every operation takes a deadline and tries again within it, but never sleeps longer than is left of it. The SDK's own retries are off: they
know no deadline. Its checksums are off, too: the footer of a block proves more, and older S3 servers refuse them. Thread-safe.

Raises MissingBlockError, CorruptBlockError (an object of another size) and StoreUnavailableError, nothing else of the network's.
"""

import io
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar

import boto3
import botocore.exceptions
import urllib3.exceptions
from botocore import handlers
from botocore.config import Config

from tandem_kvbm.blob import FOOTER_BYTES, CorruptBlockError
from tandem_kvbm.objects.config import ObjectConfig
from tandem_kvbm.objects.counters import Count, Counters
from tandem_kvbm.objects.deadline import Deadline, DeadlineError
from tandem_kvbm.store import MissingBlockError, StoreUnavailableError
from tandem_protocol.errors import ConfigError

T = TypeVar("T")

_NETWORK: Final = (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, urllib3.exceptions.HTTPError, OSError, DeadlineError)
_MISSING: Final = frozenset({"404", "NoSuchKey", "NotFound"})
_EXISTS: Final = frozenset({"412", "PreconditionFailed", "409", "ConditionalRequestConflict"})
_FINAL_STATUS: Final = frozenset({400, 401, 403, 404, 409, 412, 501})
"""Asking again won't change these."""
_FIRST_DELAY_S: Final = 0.05
_CHUNK_BYTES: Final = 1 << 18
_DELETE_KEYS: Final = 1000
_ABORT_DEADLINE_S: Final = 2.0
_WRITER: Final = "tandem-writer"
"""Metadata of every object: who wrote it, for whoever doesn't know whether its own write arrived."""


class Bucket:
    """One bucket. `close` once, by whoever made it."""

    def __init__(self, config: ObjectConfig, socket_timeout_s: float, counters: Counters, clock: Callable[[], float]) -> None:
        self._config, self._counters, self._clock = config, counters, clock
        self._name = config.bucket_name
        self._closing = threading.Event()
        self._client = _client(config, socket_timeout_s)
        self._conditional = True
        self._signature = {_WRITER: config.worker_id}

    def deadline(self, seconds: float) -> Deadline:
        """A deadline on this bucket's clock."""
        return Deadline(seconds, self._clock)

    def check(self, deadline: Deadline) -> None:
        """Whether the bucket can be used. Raises ConfigError with the fix, or StoreUnavailableError if it doesn't answer."""
        try:
            self._client.head_bucket(Bucket=self._name)
        except botocore.exceptions.ClientError as exc:
            if _status(exc) in (403, 404, 400, 301):
                raise ConfigError(_advice(self._name, _status(exc))) from exc
            raise StoreUnavailableError(str(exc)) from exc
        except botocore.exceptions.NoCredentialsError as exc:
            raise ConfigError("no S3 credentials: set DYN_KVBM_OBJECT_ACCESS_KEY and _SECRET_KEY, or give the pod a role") from exc
        except _NETWORK as exc:
            raise StoreUnavailableError(str(exc)) from exc
        deadline.check()

    def head(self, name: str, deadline: Deadline) -> bool:
        """Whether the object is there."""
        try:
            self._try(deadline, lambda: self._client.head_object(Bucket=self._name, Key=name))
        except MissingBlockError:
            return False
        return True

    def is_own(self, name: str, deadline: Deadline) -> bool:
        """Whether the object is there and this worker wrote it."""
        try:
            answer = self._try(deadline, lambda: self._client.head_object(Bucket=self._name, Key=name))
        except MissingBlockError:
            return False
        return bool(answer.get("Metadata", {}).get(_WRITER) == self._config.worker_id)

    def get(self, name: str, into: memoryview, deadline: Deadline) -> bytes:
        """Fills `into` with the block; returns the footer."""

        def attempt() -> bytes:
            response = self._client.get_object(Bucket=self._name, Key=name)
            stream = response["Body"]._raw_stream  # noqa: SLF001 - it alone has read1, after each of which one can look at the clock
            try:
                return _receive(stream, response["ContentLength"], into, deadline)
            finally:
                stream.close() if stream.length_remaining else stream.release_conn()

        return self._try(deadline, attempt)

    def get_all(self, name: str, deadline: Deadline) -> bytes:
        """A small object of ours, whole."""
        return bytes(self._try(deadline, lambda: self._client.get_object(Bucket=self._name, Key=name)["Body"].read()))

    def put(self, name: str, body: bytes, deadline: Deadline, *, only_new: bool) -> bool:
        """Uploads; False if `only_new` and the object is there already. It is there whole or not at all."""
        if len(body) > self._config.multipart_bytes:
            return self._put_parts(name, memoryview(body), deadline, only_new)
        return self._conditionally(only_new, deadline, lambda condition: self._client.put_object(
            Bucket=self._name, Key=name, Body=_Body(body, deadline), ContentLength=len(body), Metadata=self._signature, **condition))

    def delete(self, names: Sequence[str], deadline: Deadline) -> list[str]:
        """Removes; returns those that are still there because the bucket refused."""
        refused: list[str] = []
        for first in range(0, len(names), _DELETE_KEYS):
            listed = {"Objects": [{"Key": name} for name in names[first : first + _DELETE_KEYS]], "Quiet": True}
            answer = self._try(deadline, partial(self._client.delete_objects, Bucket=self._name, Delete=listed))
            refused += [error["Key"] for error in answer.get("Errors", ())]
        return refused

    def names(self, prefix: str, pages: int, deadline: Deadline) -> Iterator[list[str]]:
        """Names under a prefix, a page of up to 1,000 at a time, at most `pages`."""
        token: dict[str, str] = {}
        for _ in range(pages):
            self._counters.add(Count.LISTINGS)
            page = self._try(deadline, partial(self._client.list_objects_v2, Bucket=self._name, Prefix=prefix, **token))
            yield [item["Key"] for item in page.get("Contents", ())]
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def close(self) -> None:
        """Ends waits between attempts and the connections."""
        self._closing.set()
        self._client.close()

    def _put_parts(self, name: str, body: memoryview, deadline: Deadline, only_new: bool) -> bool:
        started = self._try(deadline, lambda: self._client.create_multipart_upload(Bucket=self._name, Key=name, Metadata=self._signature))
        upload = {"Bucket": self._name, "Key": name, "UploadId": started["UploadId"]}
        try:
            parts = self._send_parts(upload, body, deadline)
            stored = self._conditionally(only_new, deadline, lambda condition: self._client.complete_multipart_upload(
                **upload, MultipartUpload={"Parts": parts}, **condition))
        except BaseException:
            self._abort(upload)
            raise
        if not stored:
            self._abort(upload)
        return stored

    def _send_parts(self, upload: dict[str, str], body: memoryview, deadline: Deadline) -> list[dict[str, Any]]:
        size = self._config.part_bytes
        # A remainder too small to matter rides in the last part; S3 lets only the last one be small.
        count = max(1, len(body) // size)
        bounds = [*range(0, count * size, size), len(body)]
        return [self._send_part(upload, number + 1, bytes(body[bounds[number] : bounds[number + 1]]), deadline) for number in range(count)]

    def _send_part(self, upload: dict[str, str], number: int, part: bytes, deadline: Deadline) -> dict[str, Any]:
        self._counters.add(Count.PARTS)
        answer = self._try(deadline, lambda: self._client.upload_part(
            **upload, PartNumber=number, Body=_Body(part, deadline), ContentLength=len(part)))
        return {"ETag": answer["ETag"], "PartNumber": number}

    def _abort(self, upload: dict[str, str]) -> None:
        """Parts of an upload cost money until somebody removes them."""
        try:
            with suppress(MissingBlockError):
                self._try(self.deadline(_ABORT_DEADLINE_S), lambda: self._client.abort_multipart_upload(**upload))
        except StoreUnavailableError:
            self._counters.add(Count.ABORT_FAILURES)

    def _conditionally(self, only_new: bool, deadline: Deadline, send: Callable[[dict[str, str]], Any]) -> bool:
        """Sends with If-None-Match, unless this server doesn't know it. False if the object was there before."""
        sent = 0

        def attempt() -> None:
            nonlocal sent
            sent += 1
            send({"IfNoneMatch": "*"} if only_new and self._conditional else {})

        try:
            self._try(deadline, attempt)
        except _ExistsError:
            return sent > 1  # then it's our own earlier attempt that arrived after all
        except _NotImplementedByServerError:
            self._conditional = False
            self._try(deadline, attempt)
        return True

    def _try(self, deadline: Deadline, attempt: Callable[[], T]) -> T:
        """The attempt's result, after as many attempts as the deadline and the configuration allow."""
        for number in range(self._config.attempts):
            try:
                deadline.check()
                return attempt()
            except _NETWORK as exc:
                _raise_if_final(exc)
                delay_s = _FIRST_DELAY_S * 2**number * (0.5 + random.random() / 2)  # noqa: S311 - it spreads retries, nothing more
                last = number + 1 == self._config.attempts
                if last or delay_s >= deadline.left_s() or self._closing.wait(delay_s):
                    raise StoreUnavailableError(f"{type(exc).__name__}: {exc}") from exc
                self._counters.add(Count.RETRIES)
        raise AssertionError("unreachable")


class _ExistsError(Exception):
    """The object is there already."""


class _NotImplementedByServerError(StoreUnavailableError):
    """The server doesn't know a header."""


class _Body(io.BytesIO):
    """What is sent in pieces of 16 KiB: a server that takes them ever so slowly meets the deadline between two."""

    def __init__(self, content: bytes, deadline: Deadline) -> None:
        super().__init__(content)
        self._deadline = deadline

    def read(self, size: int | None = -1) -> bytes:
        """Raises DeadlineError when the time is over."""
        self._deadline.check()
        return super().read(size)


def _client(config: ObjectConfig, socket_timeout_s: float) -> Any:
    settings = Config(
        connect_timeout=config.connect_timeout_s, read_timeout=socket_timeout_s, max_pool_connections=config.connections,
        retries={"total_max_attempts": 1}, tcp_keepalive=True, request_checksum_calculation="when_required",
        response_checksum_validation="when_required", s3={"addressing_style": "path" if config.endpoint else "auto"},
    )
    client = boto3.session.Session().client(
        "s3", endpoint_url=config.endpoint or None, region_name=config.region or None, aws_access_key_id=config.access_key or None,
        aws_secret_access_key=config.secret_key or None, aws_session_token=config.session_token or None,
        verify=config.ca_bundle or None, config=settings,
    )
    # Else every upload waits for the server's "100 Continue", a round trip more, or a second where a server doesn't know it.
    client.meta.events.unregister("before-call.s3", handlers.add_expect_header)
    return client


def _receive(stream: Any, size: int, into: memoryview, deadline: Deadline) -> bytes:
    if size != into.nbytes + FOOTER_BYTES:
        raise CorruptBlockError(f"object of {size} bytes, expected {into.nbytes + FOOTER_BYTES}")
    filled, footer = 0, b""
    while filled + len(footer) < size:
        deadline.check()
        left = into.nbytes - filled
        chunk = stream.read1(min(_CHUNK_BYTES, left) if left else FOOTER_BYTES - len(footer))
        if not chunk:
            raise urllib3.exceptions.ProtocolError("the body ended early")
        if left:
            into[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        else:
            footer += chunk
    return footer


def _status(exc: botocore.exceptions.ClientError) -> int:
    return int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _raise_if_final(exc: BaseException) -> None:
    """Translates what no further attempt can change."""
    if not isinstance(exc, botocore.exceptions.ClientError):
        return
    code = str(exc.response.get("Error", {}).get("Code", ""))
    if code in _MISSING:
        raise MissingBlockError(str(exc)) from exc
    if code in _EXISTS:
        raise _ExistsError(str(exc)) from exc
    if _status(exc) == 501 or code == "NotImplemented":
        raise _NotImplementedByServerError(str(exc)) from exc
    if _status(exc) in _FINAL_STATUS:
        raise StoreUnavailableError(str(exc)) from exc


def _advice(bucket: str, status: int) -> str:
    if status == 403:
        return f"no permission for bucket {bucket!r}: the keys need s3:ListBucket, GetObject, PutObject and DeleteObject"
    if status == 404:
        return f"there is no bucket {bucket!r}: create it, or set DYN_KVBM_OBJECT_BUCKET"
    return f"bucket {bucket!r} was refused with HTTP {status}: check DYN_KVBM_OBJECT_REGION and DYN_KVBM_OBJECT_ENDPOINT"
