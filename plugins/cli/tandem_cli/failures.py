# SPDX-License-Identifier: Apache-2.0
"""From what a server answers to the errors of Tandem.

Triton says what went wrong in one of two ways: a gRPC status, or, on a stream of an older server, nothing but a message.
The status is trusted; the message is matched against the few texts that Triton and the workers are known to send.
"""

import re

import grpc

from tandem_protocol.errors import EngineError, RequestCancelledError, RequestError, TandemError, UnavailableError

_BY_CODE: dict[grpc.StatusCode, type[TandemError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: RequestError,
    grpc.StatusCode.NOT_FOUND: RequestError,
    grpc.StatusCode.ALREADY_EXISTS: RequestError,
    grpc.StatusCode.OUT_OF_RANGE: RequestError,
    grpc.StatusCode.UNIMPLEMENTED: RequestError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: UnavailableError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
}
_BY_MESSAGE: tuple[tuple[re.Pattern[str], type[TandemError]], ...] = (
    (re.compile(r"unknown model|unexpected (inference )?input|unexpected shape|expected .* inputs? but got", re.I), RequestError),
    (re.compile(r"cancell?ed|aborted", re.I), RequestCancelledError),
    (re.compile(r"not ready|unavailable|no available versions|draining|deadline|timed out|timeout", re.I), UnavailableError),
    (re.compile(r"\b(is|are) not (valid|json|utf-8|allowed)|unknown sampling parameter|\bmust (be|hold)\b|is empty:", re.I), RequestError),
)
_NO_CONNECTION = re.compile(r"failed to connect|connection refused|name resolution|DNS", re.I)
_NO_MODEL = re.compile(r"unknown model|no available versions", re.I)


def from_status(code: grpc.StatusCode, details: str, url: str) -> TandemError:
    """The error for a call that ended with a status other than OK."""
    if code is grpc.StatusCode.UNAVAILABLE and _NO_CONNECTION.search(details):
        return UnavailableError(f"no Triton server answers at {url}: start one with `tandem serve`, or give its gRPC address with --url")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnavailableError(f"the server at {url} did not finish in time: look at its load with `tandem status`, or raise --timeout-s")
    error = _BY_CODE.get(code)
    return from_message(details) if error is None else error(_sentence(details) or f"the server at {url} answered {code.name}")


def from_message(message: str) -> TandemError:
    """The error for a message that came without a status; what nothing matches is the engine's fault."""
    for pattern, error in _BY_MESSAGE:
        if pattern.search(message):
            return error(_sentence(message))
    return EngineError(_sentence(message) or "the engine failed without a message: look at the server's log")


def _sentence(message: str) -> str:
    """One line, with the way out where Triton's own text has none."""
    line = " ".join(message.split())
    return f"{line} (`tandem status` lists the models)" if _NO_MODEL.search(line) else line
