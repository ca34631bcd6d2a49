# SPDX-License-Identifier: Apache-2.0
"""`python -m tandem_kvbm.consolidator.supervisor PID`: keeps a consolidator running beside the process PID, as long as that lives.

A consolidator that ended is started again, after a pause that doubles with each early end in a row up to a bound, and goes on from
its state file. It ends with its supervisor, and both with PID: neither outlives the run that it belongs to. Only the consolidator's
first word that its settings can't work is final. One thread, and nothing heavy imported: there is one of these per worker.
"""

import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

WATCHED_VARIABLE = "TANDEM_CONSOLIDATOR_WATCHED_PID"
FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 30.0
STEADY_S = 60.0
"""A run of this length makes the next end the first again."""
MISCONFIGURED = 2
"""The exit code that says so."""
_END_S = 15.0
"""How long a consolidator may take to write its state; more than the 10 s that it gives its own thread."""
_log = logging.getLogger(__name__)


def pause_s(ends: int) -> float:
    """How long to wait after so many early ends in a row."""
    return min(FIRST_PAUSE_S * 2.0 ** min(ends - 1, 16), LAST_PAUSE_S)


def supervise(command: Sequence[str], watched_pid: int, *, environment: Mapping[str, str] | None = None,
              clock: Callable[[], float] = time.monotonic) -> int:
    """Runs the command until the watched process is gone or SIGTERM comes; 0 then, 2 if its settings can't work."""
    try:
        watched = os.pidfd_open(watched_pid)
    except ProcessLookupError:
        return 0
    told = _signals()
    try:
        return _keep(command, (watched, told), {**(os.environ if environment is None else environment)}, clock)
    finally:
        os.close(watched)
        os.close(told)


def _signals() -> int:
    """A handle that becomes readable with the first signal to stop."""
    told = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os.eventfd_write(told, 1))
    return told


def _keep(command: Sequence[str], ends: tuple[int, int], environment: dict[str, str], clock: Callable[[], float]) -> int:
    early, runs = 0, 0
    while True:
        began = clock()
        code = _run(command, ends, environment)
        if code is None:
            return 0
        if code == MISCONFIGURED and runs == 0:
            return code
        runs += 1
        early = 1 if clock() - began > STEADY_S else early + 1
        _log.error("consolidator.ended code=%d early_ends=%d: starting it again in %.1f s", code, early, pause_s(early))
        if _wait(ends, pause_s(early)):
            return 0


def _run(command: Sequence[str], ends: tuple[int, int], environment: dict[str, str]) -> int | None:
    """One run of the command: its exit code, or None if it was told to end."""
    child = subprocess.Popen(command, env={**environment, WATCHED_VARIABLE: str(os.getpid())})
    ended = os.pidfd_open(child.pid)
    try:
        if ended in _wait((ended, *ends), None):
            return child.wait()
        child.terminate()
        if not _wait((ended,), _END_S):
            child.kill()
        child.wait()
        return None
    finally:
        os.close(ended)


def _wait(handles: Sequence[int], timeout_s: float | None) -> list[int]:
    """Which of them are ready; none if that took too long."""
    poll = select.poll()
    for handle in handles:
        poll.register(handle, select.POLLIN)
    return [handle for handle, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)]


def main(arguments: Sequence[str]) -> int:
    """Supervises the consolidator that the environment describes."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    return supervise([sys.executable, "-m", "tandem_kvbm.consolidator"], int(arguments[0]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
