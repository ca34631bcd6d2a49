# SPDX-License-Identifier: Apache-2.0
"""Objects of a bucket into files, in bounded time. Edge module: the worker's only one that knows boto3.

The SDK's own retries are off: they know no deadline. Credentials come by the SDK's chain (environment, shared files, roles).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import urllib3.exceptions
from botocore.config import Config

from tandem_protocol.errors import RequestError, UnavailableError
from tandem_worker.lora.deadline import Deadline
from tandem_worker.lora.intake import Intake

_NETWORK = (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, urllib3.exceptions.HTTPError, OSError)
_ATTEMPTS = 3
_FIRST_DELAY_S = 0.2
_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 10.0
"""Of one read; a whole file has the load's deadline."""
_CHUNK = 1 << 18


@dataclass(frozen=True)
class S3Place:
    """Where buckets are."""

    endpoint: str
    """URL; empty for AWS."""
    region: str
    allow_http: bool


class S3Files:
    """Downloads; makes a client for each load, so that new credentials are seen. Thread-safe."""

    def __init__(self, place: S3Place) -> None:
        self._place = place

    def fetch(self, bucket: str, keys: dict[str, Path], intake: Intake, deadline: Deadline) -> None:
        """Object -> new file, for each key. Raises RequestError for what is missing or forbidden, UnavailableError if S3 doesn't answer."""
        client = self._client(deadline)
        try:
            for key, target in keys.items():
                self._fetch_one(client, bucket, key, target, intake, deadline)
        finally:
            client.close()

    def _fetch_one(self, client: Any, bucket: str, key: str, target: Path, intake: Intake, deadline: Deadline) -> None:
        body = self._open(client, bucket, key, deadline)
        try:
            intake.take_chunks(_chunks(body), target, deadline)
        except _NETWORK as exc:
            raise UnavailableError(f"s3://{bucket}/{key} broke off ({exc}): retry later") from exc
        finally:
            body.close()

    def _open(self, client: Any, bucket: str, key: str, deadline: Deadline) -> Any:
        for attempt in range(_ATTEMPTS):
            deadline.check()
            try:
                return client.get_object(Bucket=bucket, Key=key)["Body"]
            except _NETWORK as exc:
                _raise_if_final(exc, bucket, key)
                if attempt + 1 == _ATTEMPTS:
                    raise UnavailableError(f"s3://{bucket}/{key} can't be reached ({exc}): check AWS_ENDPOINT, or retry later") from exc
                deadline.pause(_FIRST_DELAY_S * 2**attempt)
        raise AssertionError("unreachable")

    def _client(self, deadline: Deadline) -> Any:
        place = self._place
        if place.endpoint.startswith("http://") and not place.allow_http:
            raise RequestError(f"AWS_ENDPOINT {place.endpoint} is not encrypted: use https, or set AWS_ALLOW_HTTP=true")
        config = Config(
            connect_timeout=_CONNECT_TIMEOUT_S, read_timeout=max(0.1, min(_READ_TIMEOUT_S, deadline.left_s())),
            retries={"total_max_attempts": 1}, response_checksum_validation="when_required",
            s3={"addressing_style": "path" if place.endpoint else "auto"},
        )
        try:
            return boto3.session.Session().client("s3", endpoint_url=place.endpoint or None, region_name=place.region, config=config)
        except (botocore.exceptions.BotoCoreError, ValueError) as exc:
            raise RequestError(f"no S3 client can be made ({exc}): check AWS_ENDPOINT and AWS_REGION") from exc


def _chunks(body: Any) -> Iterator[bytes]:
    """Pieces as they arrive: after each one can look at the clock. Raises where the body ends before its length."""
    stream = body._raw_stream  # noqa: SLF001 - it alone has read1
    while chunk := stream.read1(_CHUNK):
        yield chunk
    if stream.length_remaining:
        raise urllib3.exceptions.ProtocolError(f"{stream.length_remaining} bytes are missing")


def _raise_if_final(exc: BaseException, bucket: str, key: str) -> None:
    """Translates what no further attempt can change."""
    if isinstance(exc, botocore.exceptions.NoCredentialsError):
        raise RequestError("no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the pod a role") from exc
    if not isinstance(exc, botocore.exceptions.ClientError):
        return
    status = int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if status == 404:
        raise RequestError(f"there is no s3://{bucket}/{key}: check the bucket and the prefix") from exc
    if status in {400, 401, 403}:
        raise RequestError(f"s3://{bucket}/{key} was refused with HTTP {status}: the keys need s3:GetObject there") from exc
