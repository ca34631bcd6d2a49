# SPDX-License-Identifier: Apache-2.0
"""What ends is started again, what can't work is not, and nothing outlives the process that it was started beside."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem_kvbm.consolidator.supervisor import FIRST_PAUSE_S, LAST_PAUSE_S, MISCONFIGURED, pause_s, supervise

_WAIT_S = 60
_SUPERVISE = """
import sys
from tandem_kvbm.consolidator.supervisor import supervise
sys.exit(supervise([sys.executable, "-c", sys.argv[1], sys.argv[2]], int(sys.argv[3])))
"""
_RUNS = """
import os, signal, sys
with open(sys.argv[1], "w") as marks:
    marks.write(f"{os.getpid():>8}{os.environ['TANDEM_CONSOLIDATOR_WATCHED_PID']:>8}")
"""
_RESTS = "\nsignal.pause()"


class _Scene:
    """A watched process, a supervisor beside it, and a pipe into which each run of the supervised program writes who it is."""

    def __init__(self, folder: Path) -> None:
        self.marks = folder / "marks"
        os.mkfifo(self.marks)
        self._reader = os.open(self.marks, os.O_RDWR)
        self.watched = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
        self.supervisor: subprocess.Popen[bytes] | None = None

    def start(self, program: str) -> "subprocess.Popen[bytes]":
        arguments = [_RUNS + program, str(self.marks), str(self.watched.pid)]
        self.supervisor = subprocess.Popen([sys.executable, "-c", _SUPERVISE, *arguments])
        return self.supervisor

    def run(self) -> tuple[int, int]:
        """Process id of the next run, and whom it watches. Fails after a minute."""
        assert select.select([self._reader], [], [], _WAIT_S)[0], "no run of the program"
        child, watches = os.read(self._reader, 16).split()
        return int(child), int(watches)

    def end(self) -> None:
        self.watched.kill()
        self.watched.communicate()
        if self.supervisor is not None:
            self.supervisor.wait(_WAIT_S)
        os.close(self._reader)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[_Scene]:
    made = _Scene(tmp_path)
    yield made
    made.end()


def _is_ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], _WAIT_S)[0])


def test_pauses_double_up_to_a_bound() -> None:
    """However often it ends."""
    assert [pause_s(ends) for ends in (1, 2, 3)] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pause_s(7) == pause_s(10_000) == LAST_PAUSE_S


def test_what_was_killed_is_started_again(scene: _Scene) -> None:
    """And watches its supervisor."""
    supervisor = scene.start(_RESTS)
    first, watches = scene.run()
    assert watches == supervisor.pid
    os.kill(first, signal.SIGKILL)
    second, _ = scene.run()
    assert second != first


def test_what_cannot_work_is_not_started_again(scene: _Scene) -> None:
    """Its exit code is passed on."""
    assert scene.start(f"\nsys.exit({MISCONFIGURED})").wait(_WAIT_S) == MISCONFIGURED


def test_a_port_that_was_taken_in_between_is_no_reason_to_give_up(scene: _Scene, tmp_path: Path) -> None:
    """Settings that have worked once are right."""
    scene.start(f"""
once = {str(tmp_path / "once")!r}
if os.path.exists(once):
    sys.exit({MISCONFIGURED})
open(once, "w").close()
os._exit(9)""")
    assert len({scene.run()[0] for _ in range(3)}) == 3


@pytest.mark.parametrize("how", ["watched", "signal"])
def test_nothing_outlives_the_watched_process(scene: _Scene, how: str) -> None:
    """Neither the supervisor nor what it runs; a signal ends both, too."""
    supervisor = scene.start(_RESTS)
    child = os.pidfd_open(scene.run()[0])
    if how == "signal":
        supervisor.send_signal(signal.SIGTERM)
    else:
        scene.watched.kill()
    assert supervisor.wait(_WAIT_S) == 0
    assert _is_ended(child)
    os.close(child)


def test_a_supervisor_of_a_process_that_is_gone_does_nothing() -> None:
    """The run has ended before it began."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(_WAIT_S)
    assert supervise(["/does/not/exist"], gone.pid) == 0
