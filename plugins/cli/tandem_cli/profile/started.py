# SPDX-License-Identifier: Apache-2.0
"""An engine that is started to be measured: `tandem serve` in a run folder and on ports of its own, ended in any case."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tandem_cli.serve.command_stop import stop_run
from tandem_cli.serve.layout import RUN_VARIABLE, RunFolder
from tandem_cli.serve.run_state import read_state
from tandem_protocol.errors import EngineError, UnavailableError

_HOST = "127.0.0.1"
_FIRST_PORTS = range(20_100, 28_000, 100)
"""Below the ephemeral ports."""
_OFFSETS = {"http-port": 0, "grpc-port": 1, "metrics-port": 2, "admin-port": 10, "kv-event-port": 20, "side-channel-port": 30}
_REPLAY_OFFSET = 1000
_LAUNCHER_MARGIN_S = 120.0
"""For the launcher's own checks, and for ending a server that missed its start."""
_LAUNCHER_END_S = 10.0


@dataclass(frozen=True)
class Engine:
    """Where a started engine answers."""

    url: str
    """gRPC, host:port."""
    admin: str
    model: str = "vllm"


@dataclass(frozen=True)
class Start:
    """What is started."""

    model: str | None
    """Folder or hub id; None: the embedded one."""
    tensor_parallel: int
    arguments: Sequence[str]
    """For `tandem serve`, as they are."""
    timeout_s: int


@contextmanager
def served(start: Start, folder: Path) -> Iterator[Engine]:
    """One aggregated engine; its log and run lie in `folder`. Raises EngineError with the launcher's reason if it doesn't start.

    Resource handling: however the block is left, the server and all its processes are ended.
    """
    first, runs = free_ports(), folder.absolute() / "run"
    run = RunFolder(runs / str(first))
    environment = {name: value for name, value in os.environ.items() if name not in ("TANDEM_DISCOVERY", "TANDEM_GRPC_URL")}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _launch(_command(start, first), {**environment, RUN_VARIABLE: str(runs)}, folder / "serve.log", start.timeout_s)
        state = read_state(run)
        if state is None:
            raise EngineError(f"the server left no state in {run.path}, see {folder / 'serve.log'}")
        yield Engine(f"localhost:{state.grpc_port}", next(iter(state.admin_urls.values())))
    finally:
        stop_run(run)


def _command(start: Start, first: int) -> list[str]:
    model = [] if start.model is None else [f"--model={start.model}"]
    ports = [f"--{name}={first + offset}" for name, offset in _OFFSETS.items()]
    return [sys.executable, "-m", "tandem_cli.main", "serve", "--detach", "--mode=agg", "--routers=0", f"--start-timeout={start.timeout_s}",
            *ports, *model, f"--tensor-parallel-size={start.tensor_parallel}", *start.arguments]


def _launch(command: Sequence[str], environment: dict[str, str], log: Path, timeout_s: float) -> None:
    """The launcher returns when the model answers. Interrupted, it is ended first, so that nothing starts after the clearing up."""
    with log.open("wb") as file:
        launcher = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = launcher.wait(timeout_s + _LAUNCHER_MARGIN_S)
        except subprocess.TimeoutExpired as exc:
            raise EngineError(f"the launcher took more than {timeout_s + _LAUNCHER_MARGIN_S:g} s, see {log}") from exc
        finally:
            launcher.terminate()
            with suppress(subprocess.TimeoutExpired):
                launcher.wait(_LAUNCHER_END_S)
            launcher.kill()
    if code:
        raise EngineError(reason_in(log.read_text(errors="replace")) or f"the launcher ended with {code}, see {log}")


def reason_in(text: str) -> str:
    """The sentence with which `tandem serve` gave up; empty if there is none."""
    begin = text.rfind("tandem: ")
    return text[begin:].removeprefix("tandem: ").split("\n", 1)[0].strip() if begin >= 0 else ""


def free_ports() -> int:
    """The first port of a range of which all that a server uses are free. Raises UnavailableError."""
    ranges = list(_FIRST_PORTS)
    begin = os.getpid() % len(ranges)  # two profilers that begin at the same time look at different ones first
    for first in ranges[begin:] + ranges[:begin]:
        wanted = [first + offset for offset in _OFFSETS.values()]
        with ExitStack() as stack:
            try:
                for port in (*wanted, first + _OFFSETS["kv-event-port"] + _REPLAY_OFFSET):
                    stack.enter_context(socket.socket()).bind((_HOST, port))
            except OSError:
                continue
            return first
    raise UnavailableError(f"no free ports for an engine from {_FIRST_PORTS[0]} to {_FIRST_PORTS[-1]}: end what listens there")
