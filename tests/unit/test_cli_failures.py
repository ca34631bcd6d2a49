# SPDX-License-Identifier: Apache-2.0
"""How the answers of servers become errors."""

import grpc  # type: ignore[import-untyped]  # grpcio ships no types
import pytest

from tandem_cli.failures import from_message, from_status
from tandem_protocol.errors import EngineError, RequestCancelledError, RequestError, TandemError, UnavailableError

URL = "localhost:8001"


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("Request for unknown model: 'x' is not found", RequestError),
        ("unexpected inference input 'a' for model 'b'", RequestError),
        ("sampling_parameters is not JSON (Expecting value): write it so", RequestError),
        ("in ensemble 'disagg', When streaming, `exclude_input_in_output` = False is not allowed.", RequestError),
        ("in ensemble 'disagg', request 'r1' was aborted", RequestCancelledError),
        ("the worker is draining: send the request to another one", UnavailableError),
        ("Request timeout expired", UnavailableError),
        ("CUDA error: an illegal memory access", EngineError),
        ("", EngineError),
    ],
)
def test_message_without_a_status_is_recognised(message: str, error: type[TandemError]) -> None:
    """Older servers send nothing but text; what is unknown is the engine's fault."""
    assert type(from_message(message)) is error


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, RequestError),
        (grpc.StatusCode.NOT_FOUND, RequestError),
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, UnavailableError),
        (grpc.StatusCode.CANCELLED, RequestCancelledError),
        (grpc.StatusCode.INTERNAL, EngineError),
        (grpc.StatusCode.UNKNOWN, EngineError),
    ],
)
def test_status_wins_over_the_message(code: grpc.StatusCode, error: type[TandemError]) -> None:
    """A status is not second-guessed, whatever the text says."""
    assert type(from_status(code, "broken", URL)) is error


def test_message_is_one_line() -> None:
    """Stack traces that come with a message don't break the one sentence on stderr."""
    assert str(from_message("engine died\n  at x\n")) == "engine died at x"


def test_status_without_text_still_says_something() -> None:
    """An empty message is replaced, not printed."""
    assert "INVALID_ARGUMENT" in str(from_status(grpc.StatusCode.INVALID_ARGUMENT, "", URL))
