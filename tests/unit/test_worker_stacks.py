# SPDX-License-Identifier: Apache-2.0
"""Stacks and processor time of real child processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fakes import WAIT_S
from servers import wait_for
from tandem_worker import stacks

LISTENING = """
import threading
from tandem_worker.stacks import answer_signal
def waits_for_ever():
    answer_signal()
    print("ready", flush=True)
    threading.Event().wait()
waits_for_ever()
"""
DEAF = "import signal\nprint('ready', flush=True)\nsignal.pause()"
BUSY = "print('ready', flush=True)\nwhile True: pass"


@contextmanager
def child(code: str, log: Path) -> Iterator[psutil.Process]:
    """A child that has said that it is ready; killed at the end."""
    with log.open("wb") as errors:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=errors)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.communicate(timeout=WAIT_S)


def sentence(pid: int) -> str:
    """What the dump says of this child; other tests may have children, too."""
    return next(line for line in stacks.dump_stacks() if line.startswith(f"pid={pid} "))


def test_a_listening_process_prints_the_stack_of_every_thread(tmp_path: Path) -> None:
    """While it waits in the kernel."""
    log = tmp_path / "log"
    with child(LISTENING, log) as process:
        assert sentence(process.pid).endswith("stacks above or below")
        wait_for(lambda: "waits_for_ever" in log.read_text(), WAIT_S, "the child's stack")
        assert process.is_running()


def test_a_process_that_does_not_listen_is_left_alive(tmp_path: Path) -> None:
    """The signal would end it."""
    with child(DEAF, tmp_path / "log") as process:
        assert sentence(process.pid).endswith("it prints no stacks")
        assert process.is_running()


def test_a_stopped_process_is_named_as_such(tmp_path: Path) -> None:
    """It can't print anything now, but its state tells the cause."""
    log = tmp_path / "log"
    with child(LISTENING, log) as process:
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: process.status() == psutil.STATUS_STOPPED, WAIT_S, "stopped")
        assert "state=stopped" in sentence(process.pid)
        assert "somebody stopped it" in sentence(process.pid)
        process.send_signal(signal.SIGCONT)
        wait_for(lambda: "waits_for_ever" in log.read_text(), WAIT_S, "the stack, once continued")


def test_processor_time_of_the_engine(tmp_path: Path) -> None:
    """It grows while a child computes; a GPU engine's own processes don't count."""
    with child(BUSY, tmp_path / "log"):
        before = stacks.engine_cpu_s(is_cpu=True)
        wait_for(lambda: stacks.engine_cpu_s(is_cpu=True) > before + 0.2, WAIT_S, "a fifth of a second of computation")


def test_processor_time_of_one_rank(tmp_path: Path) -> None:
    """Its neighbour's computation is not its own; a rank without a process has none. vLLM's titles tell them apart."""
    titled = "import setproctitle\nsetproctitle.setproctitle('VLLM::EngineCore_DP{}')\n"
    with child(titled.format(1) + BUSY, tmp_path / "busy"), child(titled.format(11) + DEAF, tmp_path / "idle"):
        wait_for(lambda: stacks.engine_cpu_s(1) > 0.2, WAIT_S, "a fifth of a second of rank 1")
        before, total = stacks.engine_cpu_s(11), stacks.engine_cpu_s()
        wait_for(lambda: stacks.engine_cpu_s() > total + 0.2, WAIT_S, "another one")
        assert stacks.engine_cpu_s(11) == before
        assert stacks.engine_cpu_s(0) == 0.0


def test_the_guard_is_no_engine_process() -> None:
    """It is awake every two seconds, whatever the engine does."""
    command = [sys.executable, "-c", DEAF, "tandem_worker.guard"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as guard:
        assert guard.stdout is not None
        assert guard.stdout.readline() == b"ready\n"
        assert guard.pid not in [process.pid for process in stacks._engine_processes()]
        guard.kill()


@pytest.mark.parametrize("pid", [os.getpid(), 2**22 + 1])
def test_who_catches_a_signal(pid: int) -> None:
    """This process doesn't, and one that is not there neither."""
    assert not stacks.catches(pid, signal.SIGUSR2)
