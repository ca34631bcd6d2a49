# SPDX-License-Identifier: Apache-2.0
"""A small process beside each worker that cleans up when the worker or tritonserver dies without a word.

`kill -9` of tritonserver leaves stubs and engine processes, their GPU memory and gigabytes in /dev/shm; `kill -9` of a
stub leaves a tritonserver that never answers for that model again. The guard outlives both, so it can act:

- the stub ended without saying goodbye -> kill the engine, remove its shared memory, end tritonserver, so that a
  supervisor restarts it whole;
- tritonserver died -> kill the stub and the engine, remove the shared memory of all;
- the stub says goodbye (a clean unload) -> nothing is left to do, exit.

It learns of the stub's end through a pipe (end of file), so nothing has to be polled for that. It holds no GPU, imports
neither vLLM nor Triton, and sits in a session of its own, out of reach of signals to the server's group.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tandem_worker.shared_memory import mapped_files, remove_unmapped

GOODBYE = b"goodbye\n"
WORKER_TOKEN_VARIABLE = "TANDEM_WORKER_TOKEN"  # noqa: S105 - a name, not a secret
"""Environment variable with a unique value that every process of one worker inherits; how stragglers are found."""
_LOOK_INTERVAL_S = 2.0
_KILL_WAIT_S = 5.0


@dataclass
class Ward:
    """What one guard watches over, and what it has seen of it so far."""

    server_pid: int
    stub_pid: int
    token: str
    scratch: Path
    server_exit_timeout_s: float
    shm_files: set[Path] = field(default_factory=set)
    seen: set[psutil.Process] = field(default_factory=set)
    """Engine processes; psutil tells one from a later process with its id."""

    def engine_pids(self) -> list[int]:
        """Living processes of this worker other than the stub, found by the token in their environment."""
        wanted = f"{WORKER_TOKEN_VARIABLE}={self.token}".encode()
        return [pid for pid in psutil.pids() if pid not in (os.getpid(), self.stub_pid) and wanted in _environment(pid)]

    def look(self) -> None:
        """Notes the processes and the shared memory they map: once they are dead, nobody can tell whose it was."""
        engine = self.engine_pids()
        self.shm_files |= mapped_files([self.server_pid, self.stub_pid, *engine])
        self.seen = {process for process in self.seen if process.is_running()}
        for pid in engine:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.seen.add(psutil.Process(pid))

    def dying_pids(self) -> list[int]:
        """Processes seen before that are not gone yet: the kernel is killing them, and they no longer show the token."""
        return [process.pid for process in self.seen if process.is_running()]


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def start_guard(ward: Ward) -> "subprocess.Popen[bytes]":
    """Starts a guard for this process; write GOODBYE to its stdin before a clean exit."""
    arguments = [str(ward.server_pid), str(ward.stub_pid), ward.token, str(ward.scratch), str(ward.server_exit_timeout_s)]
    return subprocess.Popen([sys.executable, "-m", "tandem_worker.guard", *arguments], stdin=subprocess.PIPE, start_new_session=True)


def say_goodbye(guard: "subprocess.Popen[bytes]", timeout_s: float) -> None:
    """Ends the guard of a worker that has shut its engine down."""
    with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
        guard.communicate(GOODBYE, timeout=timeout_s)


def watch(ward: Ward) -> None:
    """Watches until the end of the stub or of the server, then cleans up."""
    try:
        server = os.pidfd_open(ward.server_pid)
    except ProcessLookupError:  # died, and was reaped, before the guard was up
        clean_up(ward, server_died=True)
        return
    poll = select.poll()
    poll.register(server, select.POLLIN)
    poll.register(sys.stdin.fileno(), select.POLLIN | select.POLLHUP)
    while not (ready := {fd for fd, _ in poll.poll(_LOOK_INTERVAL_S * 1000)}):
        ward.look()
    if sys.stdin.fileno() in ready and os.read(sys.stdin.fileno(), len(GOODBYE)) == GOODBYE:
        _remove(ward)
        return
    clean_up(ward, server_died=server in ready)


def clean_up(ward: Ward, *, server_died: bool) -> None:
    """Kills what is left of the worker, removes its files, and ends a server that lost its stub."""
    ward.look()
    _say(f"{'tritonserver' if server_died else 'the stub'} died: killing the engine and removing its shared memory")
    if server_died:
        _kill([ward.stub_pid])
    _kill(ward.engine_pids())
    _wait_gone(ward.dying_pids(), _KILL_WAIT_S)  # what they still map would not be removed
    if not server_died:
        _end_server(ward)
    _remove(ward)


def _end_server(ward: Ward) -> None:
    """SIGTERM lets the other models of the server finish; a server that can't unload the dead stub is killed."""
    if _signal(ward.server_pid, signal.SIGTERM):
        _wait_gone([ward.server_pid], ward.server_exit_timeout_s)
        _kill([ward.server_pid])


def _remove(ward: Ward) -> None:
    removed = remove_unmapped(ward.shm_files)
    if removed:
        _say(f"removed {len(removed)} left-over files in /dev/shm")
    shutil.rmtree(ward.scratch, ignore_errors=True)


def _kill(pids: list[int]) -> None:
    killed = [pid for pid in pids if _signal(pid, signal.SIGKILL)]
    _wait_gone(killed, _KILL_WAIT_S)


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _wait_gone(pids: list[int], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _say(message: str) -> None:
    sys.stderr.write(f"tandem guard: {message}\n")
    sys.stderr.flush()


def main(arguments: list[str]) -> None:
    """Entry point: `python -m tandem_worker.guard SERVER_PID STUB_PID TOKEN SCRATCH SERVER_EXIT_TIMEOUT_S`."""
    server_pid, stub_pid, token, scratch, timeout_s = arguments
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # ends by itself, after those it watches
    watch(Ward(int(server_pid), int(stub_pid), token, Path(scratch), float(timeout_s)))


if __name__ == "__main__":
    main(sys.argv[1:])
