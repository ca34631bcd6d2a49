# SPDX-License-Identifier: Apache-2.0
"""The order of the tests: those that need the session's server come last, so that the others have the machine to themselves."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts by whether a test uses the fixture `server`; otherwise the order stays."""
    items.sort(key=lambda item: "server" in getattr(item, "fixturenames", ()))
