# SPDX-License-Identifier: Apache-2.0
"""The guard of a stub that has no engine, on real processes: a dummy server, and a dummy stub that starts the guard."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from fakes import WAIT_S
from tandem_protocol import guard as guards

IDLE = "import signal; print('up', flush=True); signal.pause()"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {IDLE}"
STUB = """
import os, signal, sys
from tandem_protocol.guard import say_goodbye, start_guard
guard = start_guard(int(sys.argv[1]), os.getpid(), float(sys.argv[2]))
print("up", flush=True)
sys.stdin.readline()
say_goodbye(guard, 30.0)
print(guard.returncode, flush=True)
signal.pause()
"""


@contextmanager
def python(code: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that has said that it is up; killed in the end, if it still lives."""
    with subprocess.Popen([sys.executable, "-c", code, *arguments], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert line_of(process) == "up\n"
            yield process
        finally:
            process.kill()


def line_of(process: "subprocess.Popen[str]") -> str:
    """The next line that the process prints."""
    assert process.stdout is not None
    return process.stdout.readline()


@dataclass
class Scene:
    """A server with one stub and its guard."""

    server: "subprocess.Popen[str]"
    stub: "subprocess.Popen[str]"


@pytest.fixture
def scene() -> Iterator[Scene]:
    """Everything up and running."""
    with python(IDLE) as server, python(STUB, str(server.pid), "30") as stub:
        yield Scene(server, stub)


def test_the_death_of_the_stub_ends_the_server(scene: Scene) -> None:
    """Politely first, so that other models can finish."""
    scene.stub.kill()
    assert scene.server.wait(WAIT_S) == -signal.SIGTERM


def test_a_server_that_does_not_end_is_killed() -> None:
    """A dead stub can keep tritonserver from unloading for ever."""
    with python(DEAF) as server, python(STUB, str(server.pid), "0.1") as stub:
        stub.kill()
        assert server.wait(WAIT_S) == -signal.SIGKILL


def test_the_death_of_the_server_ends_the_stub(scene: Scene) -> None:
    """It would wait for requests that can't come."""
    scene.server.kill()
    scene.server.wait(WAIT_S)
    assert scene.stub.wait(WAIT_S) == -signal.SIGKILL


def test_nothing_is_killed_after_a_goodbye(scene: Scene) -> None:
    """A clean unload: the guard ends, with success."""
    assert scene.stub.stdin is not None
    scene.stub.stdin.write("\n")
    scene.stub.stdin.flush()
    assert line_of(scene.stub) == "0\n"
    assert scene.stub.poll() is scene.server.poll() is None


def test_a_guard_that_does_not_answer_goodbye_is_killed() -> None:
    """A stopped one would stay for ever."""
    guard = guards.start_guard(os.getpid(), os.getpid(), 1.0)
    guard.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, guard.pid, os.WSTOPPED | os.WNOWAIT)
    guards.say_goodbye(guard, 0.05)
    assert guard.returncode == -signal.SIGKILL


def test_a_look_that_fails_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    """And the guard goes on."""

    def look() -> None:
        raise PermissionError("/proc/1/maps")

    guards.try_to(look)
    assert "tandem guard: it failed to look at the processes, and goes on: PermissionError" in capfd.readouterr().err
