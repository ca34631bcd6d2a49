# SPDX-License-Identifier: Apache-2.0
"""A small process beside a Triton stub that acts when the stub or tritonserver dies without a word.

Triton 2.51 doesn't restart a stub that died: its model fails until the server restarts, and only a supervisor can do that. The
guard outlives both, so it can act: a stub that ended without saying goodbye ends its server; a server that died takes the stub with
it. It learns of the stub's end through a pipe, so nothing is polled for that, and sits in a session of its own, out of reach of
signals to the server's group. `python -m tandem_protocol.guard` is all that the router needs; the worker's guard adds its engine.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from enum import Enum, auto

import psutil

GOODBYE = b"goodbye\n"
_LOOK_INTERVAL_S = 2.0
_KILL_WAIT_S = 5.0
_STEP_S = 0.05


class End(Enum):
    """What ended a guard's watch."""

    GOODBYE = auto()
    """A clean unload."""
    STUB = auto()
    SERVER = auto()


def start_guard(server_pid: int, stub_pid: int, server_exit_timeout_s: float) -> "subprocess.Popen[bytes]":
    """Starts a guard for this process; `say_goodbye` before a clean exit."""
    return spawn("tandem_protocol.guard", str(server_pid), str(stub_pid), str(server_exit_timeout_s))


def spawn(module: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """Runs a guard's module; its end of the pipe closes with this process, however that ends."""
    return subprocess.Popen([sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, start_new_session=True)


def say_goodbye(guard: "subprocess.Popen[bytes]", timeout_s: float) -> None:
    """Ends a guard whose process has nothing left to clean up; one that doesn't answer, being stopped or stuck, is killed."""
    with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):  # the second of one that can't even be killed
        try:
            guard.communicate(GOODBYE, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            guard.kill()
            guard.wait(_KILL_WAIT_S)


def await_end(server_pid: int, look: Callable[[], None] = lambda: None) -> End:
    """Waits for the end of the server, or of whoever holds the other end of stdin; calls `look` every two seconds."""
    try:
        server = os.pidfd_open(server_pid)
    except ProcessLookupError:  # died, and was reaped, before the guard was up
        return End.SERVER
    poll = select.poll()
    poll.register(server, select.POLLIN)
    poll.register(sys.stdin.fileno(), select.POLLIN | select.POLLHUP)
    while not (ready := {fd for fd, _ in poll.poll(_LOOK_INTERVAL_S * 1000)}):
        try_to(look)
    if sys.stdin.fileno() in ready and os.read(sys.stdin.fileno(), len(GOODBYE)) == GOODBYE:
        return End.GOODBYE
    return End.SERVER if server in ready else End.STUB


def try_to(look: Callable[[], None]) -> None:
    """A look that fails is said, and no end of the guard, on whom others' lives depend."""
    try:
        look()
    except Exception as exc:
        say(f"it failed to look at the processes, and goes on: {exc!r}")


def end_server(pid: int, timeout_s: float) -> None:
    """SIGTERM lets the other models of the server finish; a server that can't unload the dead stub is killed."""
    if _signal(pid, signal.SIGTERM):
        wait_gone([pid], timeout_s)
        kill([pid])


def kill(pids: Sequence[int]) -> None:
    """SIGKILL; waits until they are gone, for 5 s at most."""
    wait_gone([pid for pid in pids if _signal(pid, signal.SIGKILL)], _KILL_WAIT_S)


def wait_gone(pids: Sequence[int], timeout_s: float = _KILL_WAIT_S) -> None:
    """Until none lives any more, or the time is over."""
    deadline = time.monotonic() + timeout_s
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(_STEP_S)


def say(message: str) -> None:
    """To stderr, which is the server's log."""
    sys.stderr.write(f"tandem guard: {message}\n")
    sys.stderr.flush()


def ignore_signals() -> None:
    """A guard ends by itself, after those it watches."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def main(arguments: Sequence[str]) -> None:
    """Entry point: `python -m tandem_protocol.guard SERVER_PID STUB_PID SERVER_EXIT_TIMEOUT_S`."""
    server_pid, stub_pid, timeout_s = int(arguments[0]), int(arguments[1]), float(arguments[2])
    ignore_signals()
    match await_end(server_pid):
        case End.STUB:
            say("the stub died: ending tritonserver, so that a supervisor restarts it")
            end_server(server_pid, timeout_s)
        case End.SERVER:
            say("tritonserver died: killing the stub")
            kill([stub_pid])
        case End.GOODBYE:
            return


if __name__ == "__main__":
    main(sys.argv[1:])
