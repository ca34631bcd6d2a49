# SPDX-License-Identifier: Apache-2.0
"""A small process beside each worker that cleans up when the worker or tritonserver dies without a word.

`kill -9` of tritonserver leaves stubs and engine processes, their GPU memory and gigabytes in /dev/shm; `kill -9` of a
stub leaves a tritonserver that never answers for that model again. The guard outlives both, so it can act:

- the stub ended without saying goodbye -> kill the engine, remove its shared memory, end tritonserver, so that a
  supervisor restarts it whole;
- tritonserver died -> kill the stub and the engine, remove the shared memory of all;
- the stub says goodbye (a clean unload) -> nothing is left to do, exit.

How it learns of an end, and ends a server, is in `tandem_protocol.guard`. It holds no GPU and imports neither vLLM nor Triton.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tandem_protocol import guard
from tandem_protocol.guard import End
from tandem_worker.shared_memory import mapped_files, remove_unmapped

WORKER_TOKEN_VARIABLE = "TANDEM_WORKER_TOKEN"  # noqa: S105 - a name, not a secret
"""Environment variable with a unique value that every process of one worker inherits; how stragglers are found."""


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


def _tracks_resources(pid: int) -> bool:
    """Whether it is Python's own tracker of shared memory. It ends by itself after those that it serves, and removes what they leave
    then, also files so new that no look has seen them."""
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def start_guard(ward: Ward) -> "subprocess.Popen[bytes]":
    """Starts a guard for this process; `say_goodbye` before a clean exit."""
    arguments = (str(ward.server_pid), str(ward.stub_pid), ward.token, str(ward.scratch), str(ward.server_exit_timeout_s))
    return guard.spawn("tandem_worker.guard", *arguments)


def watch(ward: Ward) -> None:
    """Watches until the end of the stub or of the server, then cleans up."""
    end = guard.await_end(ward.server_pid, ward.look)
    if end is End.GOODBYE:
        _remove(ward)
    else:
        clean_up(ward, server_died=end is End.SERVER)


def clean_up(ward: Ward, *, server_died: bool) -> None:
    """Kills what is left of the worker, removes its files, and ends a server that lost its stub."""
    guard.try_to(ward.look)
    guard.say(f"{'tritonserver' if server_died else 'the stub'} died: killing the engine and removing its shared memory")
    if server_died:
        guard.kill([ward.stub_pid])
    guard.kill([pid for pid in ward.engine_pids() if not _tracks_resources(pid)])
    guard.wait_gone(ward.dying_pids())  # what they still map would not be removed
    guard.kill(ward.engine_pids())
    if not server_died:
        guard.end_server(ward.server_pid, ward.server_exit_timeout_s)
    _remove(ward)


def _remove(ward: Ward) -> None:
    removed = remove_unmapped(ward.shm_files)
    if removed:
        guard.say(f"removed {len(removed)} left-over files in /dev/shm")
    shutil.rmtree(ward.scratch, ignore_errors=True)


def main(arguments: list[str]) -> None:
    """Entry point: `python -m tandem_worker.guard SERVER_PID STUB_PID TOKEN SCRATCH SERVER_EXIT_TIMEOUT_S`."""
    server_pid, stub_pid, token, scratch, timeout_s = arguments
    guard.ignore_signals()
    watch(Ward(int(server_pid), int(stub_pid), token, Path(scratch), float(timeout_s)))


if __name__ == "__main__":
    main(sys.argv[1:])
