# SPDX-License-Identifier: Apache-2.0
"""The report of the fault-tolerance suite, and fleets that serve one scenario after the other as long as they are whole."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fault_tolerance.fleets import Fleet, running
from fault_tolerance.outcomes import Row
from fault_tolerance.report import save, table
from fault_tolerance.scenarios import Engine, Plan
from models import make_lively_model

ROWS = pytest.StashKey[list[Row]]()


class Fleets:
    """At most one fleet at a time."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._stack = ExitStack()
        self._current: Fleet | None = None
        self._model: Path | None = None

    def of(self, plan: Plan) -> Fleet:
        """The last one if it is as the plan says and whole, else a new one."""
        if self._current is None or self._current.plan != plan or not self._current.reusable():
            self.end()
            self._current = self._stack.enter_context(running(plan, self._folders.mktemp("fleet"), self._model_for(plan)))
        return self._current

    def end(self) -> None:
        """Ends the current one."""
        self._current = None
        self._stack.close()

    def _model_for(self, plan: Plan) -> Path | None:
        if plan.engine is Engine.REAL and self._model is None:
            self._model = make_lively_model(self._folders.mktemp("lively") / "model")
        return self._model


@pytest.fixture(scope="module")
def fleets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleets]:
    """Ended at the end."""
    all_of_them = Fleets(tmp_path_factory)
    yield all_of_them
    all_of_them.end()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> list[Row]:
    """Rows for the end of the run."""
    return request.config.stash.setdefault(ROWS, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table, and the file of `--report`."""
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("fault tolerance (seconds)")
    for line in table(rows):
        terminalreporter.write_line(line)
    if (path := config.getoption("--report")) is not None:
        save(rows, path)
