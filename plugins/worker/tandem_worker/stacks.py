# SPDX-License-Identifier: Apache-2.0
"""What an engine's processes are doing: their processor time, their state, and the stacks of their threads.

vLLM calls `answer_signal`, through our plugin, in each process that it starts; SIGUSR2 then makes it print all its stacks to
tritonserver's log, whatever its threads are waiting for. `kill -USR2 PID` does so by hand.
"""

import faulthandler
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil

DUMP_SIGNAL = signal.SIGUSR2
_STDERR = 2
_ENGINE_PREFIX = "VLLM::"
"""How vLLM names its processes."""
_CORE = "EngineCore_DP"
"""And the root of a data-parallel rank's, with the rank's number behind it."""
_GUARD = "tandem_worker.guard"


def answer_signal() -> None:
    """From now on this process prints its stacks on DUMP_SIGNAL. The handler is C: it also works while the interpreter is stuck."""
    faulthandler.register(DUMP_SIGNAL, file=_STDERR, all_threads=True, chain=False)


def engine_cpu_s(dp_rank: int | None = None, *, is_cpu: bool = True) -> float:
    """Seconds of processor time that this worker's engine has used, or one rank of it, with those of its finished children.

    Where the model computes on a GPU, the engine's own processes don't count: they spin while they wait.
    """
    return sum(_cpu_s(process, own=is_cpu) for process in _engine_processes(dp_rank))


def dump_stacks() -> list[str]:
    """Prints this process's stacks, asks the engine's processes for theirs; a sentence for each engine process."""
    faulthandler.dump_traceback(file=_STDERR, all_threads=True)
    return [_ask(process) for process in _engine_processes()]


def _engine_processes(dp_rank: int | None = None) -> Iterator[psutil.Process]:
    """Every descendant of this process but the guard; of a rank, those from its EngineCore on, none if that is gone."""
    for process in _family(dp_rank):
        try:
            if _GUARD not in process.cmdline():
                yield process
        except psutil.NoSuchProcess:
            continue


def _family(dp_rank: int | None) -> list[psutil.Process]:
    if dp_rank is None:
        return list(psutil.Process().children(recursive=True))
    cores = [process for process in psutil.Process().children() if _is_core(process, dp_rank)]
    return [process for core in cores for process in (core, *core.children(recursive=True))]


def _is_core(process: psutil.Process, dp_rank: int) -> bool:
    """By its title, which vLLM writes over the command; the kernel's own name of a process has 15 letters only."""
    try:
        return f"{_ENGINE_PREFIX}{_CORE}{dp_rank}" in " ".join(process.cmdline()).split()
    except psutil.NoSuchProcess:
        return False


def _cpu_s(process: psutil.Process, *, own: bool) -> float:
    try:
        times = process.cpu_times()
        own = own or not process.name().startswith(_ENGINE_PREFIX)
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.children_user + times.children_system + (times.user + times.system if own else 0.0))


def _ask(process: psutil.Process) -> str:
    """Only a process that listens is signalled: the signal ends any other."""
    try:
        what = f"pid={process.pid} name={process.name()} state={process.status()} kernel={_wait_channel(process.pid)}"
        if process.status() == psutil.STATUS_STOPPED:
            return f"{what}: somebody stopped it, it prints its stacks when it is continued (kill -CONT)" if _send(process.pid) else what
        return f"{what}: stacks above or below" if _send(process.pid) else f"{what}: it prints no stacks"
    except psutil.NoSuchProcess:
        return f"pid={process.pid}: it ended meanwhile"


def _send(pid: int) -> bool:
    if not catches(pid, DUMP_SIGNAL):
        return False
    os.kill(pid, DUMP_SIGNAL)
    return True


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for this signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(caught >> (number - 1) & 1)


def _wait_channel(pid: int) -> str:
    """The kernel function that its main thread waits in; `?` where the kernel doesn't tell."""
    try:
        return Path(f"/proc/{pid}/wchan").read_text() or "?"
    except OSError:
        return "?"
