# SPDX-License-Identifier: Apache-2.0
"""Every error that Tandem raises on purpose.

TandemError
├── ConfigError             a setting is wrong or contradicts another: the operator mends it; a command exits with 2
├── RequestError            the request is wrong: the client mends it              (INVALID_ARGUMENT, HTTP 400)
├── UnavailableError        not now: draining, queue full, deadline, engine dead   (UNAVAILABLE, HTTP 503)
├── RequestCancelledError   the client went away or asked to abort                 (CANCELLED, HTTP 499)
└── EngineError             the engine failed on a valid request                   (INTERNAL, HTTP 500)

A message is one sentence that names the fix. Edge modules translate `code` into Triton's or HTTP's own codes and
raise `from` the original.
"""

from enum import StrEnum
from typing import ClassVar


class ErrorCode(StrEnum):
    """Canonical status codes, named as in gRPC."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAVAILABLE = "UNAVAILABLE"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"


class TandemError(Exception):
    """Root of the tree; `code` is what a client sees."""

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL


class ConfigError(TandemError):
    """A setting is unknown, malformed or contradicts another."""

    code = ErrorCode.INVALID_ARGUMENT


class RequestError(TandemError):
    """The request can't be served as it stands."""

    code = ErrorCode.INVALID_ARGUMENT


class UnavailableError(TandemError):
    """The request is fine, but this worker can't take or finish it now; another worker or a later retry may."""

    code = ErrorCode.UNAVAILABLE


class RequestCancelledError(TandemError):
    """The client went away, or somebody aborted the request by its id."""

    code = ErrorCode.CANCELLED


class EngineError(TandemError):
    """The engine failed on a request that it had accepted."""

    code = ErrorCode.INTERNAL
