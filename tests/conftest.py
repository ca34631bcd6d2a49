# SPDX-License-Identifier: Apache-2.0
"""The order of the tests: those that need the session's server come last, so that the others have the machine to themselves."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """An option must be known before tests/fault_tolerance is looked at."""
    parser.addoption("--report", type=Path, default=None, metavar="FILE", help="where the fault-tolerance suite's report goes, as JSON")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts by whether a test uses the fixture `server`; otherwise the order stays."""
    items.sort(key=lambda item: "server" in getattr(item, "fixturenames", ()))
