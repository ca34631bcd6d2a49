# SPDX-License-Identifier: Apache-2.0
"""What tests on a GPU measure by the way, in lines at the end of the run: nobody can look at that machine afterwards."""

from collections.abc import Callable

import pytest

Note = Callable[[str], None]
_LINES = pytest.StashKey[list[str]]()


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Note:
    """Takes a line for the summary."""
    return request.config.stash.setdefault(_LINES, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Writes the lines."""
    for line in config.stash.get(_LINES, []):
        terminalreporter.write_line(line)
