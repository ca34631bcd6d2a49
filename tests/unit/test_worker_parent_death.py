# SPDX-License-Identifier: Apache-2.0
"""Engine processes die with their parent, on real processes."""

import os
import subprocess
import sys

import psutil
import pytest

from fakes import WAIT_S
from tandem_worker.parent_death import WORKER_PID_VARIABLE

CHILD = """
import ctypes, signal
from tandem_worker.parent_death import tie_engine_to_parent
tie_engine_to_parent()
asked = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(asked))  # PR_GET_PDEATHSIG
print(asked.value, flush=True)
signal.pause()
"""
PARENT = """
import os, signal, subprocess, sys
os.environ[sys.argv[1]] = str(os.getpid())
child = subprocess.Popen([sys.executable, "-c", sys.argv[2]])
print(child.pid, flush=True)
signal.pause()
"""


def signal_asked_for(environment: dict[str, str]) -> int:
    """What a process with these variables gets when its parent dies; 0 is nothing."""
    with subprocess.Popen([sys.executable, "-c", CHILD], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        asked = int(child.stdout.readline())
        child.kill()
    return asked


def test_a_child_dies_with_its_parent() -> None:
    """`kill -9` of the stub leaves no engine behind."""
    command = [sys.executable, "-c", PARENT, WORKER_PID_VARIABLE, CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert parent.stdout.readline() == "9\n"
        parent.kill()
    child.wait(WAIT_S)


def test_processes_outside_a_worker_are_left_alone() -> None:
    """vLLM calls every plugin, also in servers that are not Tandem's."""
    assert signal_asked_for({}) == 0


def test_the_worker_itself_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parent is tritonserver, whose end it must outlive long enough to drain."""
    calls: list[str] = []
    monkeypatch.setenv(WORKER_PID_VARIABLE, str(os.getpid()))
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: calls.append("prctl"))
    from tandem_worker.parent_death import tie_engine_to_parent

    tie_engine_to_parent()
    assert calls == []
