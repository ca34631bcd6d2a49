# SPDX-License-Identifier: Apache-2.0
"""The tree of errors."""

import pytest

from tandem_protocol import errors


@pytest.mark.parametrize(
    ("error", "code"),
    [(errors.ConfigError, "INVALID_ARGUMENT"), (errors.RequestError, "INVALID_ARGUMENT"), (errors.UnavailableError, "UNAVAILABLE"),
     (errors.RequestCancelledError, "CANCELLED"), (errors.EngineError, "INTERNAL"), (errors.TandemError, "INTERNAL")],
)
def test_every_error_has_the_code_that_clients_see(error: type[errors.TandemError], code: str) -> None:
    """Named as in gRPC, so that the edges translate by table."""
    assert error.code == errors.ErrorCode(code)


def test_the_table_above_is_complete() -> None:
    """A new kind of error needs a code and a line in this file."""
    assert {error.__name__ for error in errors.TandemError.__subclasses__()} == {
        "ConfigError", "RequestError", "UnavailableError", "RequestCancelledError", "EngineError",
    }
