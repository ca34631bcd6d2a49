# SPDX-License-Identifier: Apache-2.0
"""Parts of a fleet as a supervisor sees them: processes that are started, watched, ended and started again at the same ports."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fault_tolerance.scenarios import Which
from servers import Server, engine_of, get_json, get_text, post_json, processes_with, wait_for
from tandem_cli.serve.layout import source_root
from tandem_cli.serve.tritonserver import find_triton, join_backends, server_command, server_environment

START_S = 180.0
EXIT_S = 50.0
"""tritonserver's own exit timeout of 30 s, and what comes after it."""
DRAIN_S = 20.0
_MARK = "FAULT_TEST_PART"


@dataclass
class Part:
    """One process with all below it. Resource handling: `start`, then `end`, which leaves nothing."""

    name: str
    folder: Path
    command: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None
    probe_s: float = 10.0
    """After the death of one of its processes it has so long to end by itself; then its liveness probe would have failed."""
    _mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def prepare(self) -> None:
        """What must be there before the process starts; each time."""

    def environment(self) -> dict[str, str]:
        """Of the process."""
        return {**os.environ, **self.variables, _MARK: self._mark}

    def start(self) -> None:
        """Starts the process; whoever needs it asks it whether it is ready."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.prepare()
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command, env=self.environment(), stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=subprocess.STDOUT, start_new_session=True)

    def find(self, which: Which) -> psutil.Process:
        """One of its processes."""
        assert which is Which.SERVER, f"{self.name} has no {which}"
        assert self.process is not None
        return psutil.Process(self.process.pid)

    def processes(self) -> list[psutil.Process]:
        """All that live."""
        return processes_with(f"{_MARK}={self._mark}")

    def drain(self) -> None:
        """What it has ends, and nothing new comes."""

    def terminate(self) -> None:
        """SIGTERM, and the wait for its end."""
        assert self.process is not None
        self.process.terminate()
        wait_for(self.gone, EXIT_S, f"{self.name} to end")

    def gone(self) -> bool:
        """Whether nothing is left of it."""
        return (self.process is None or self.process.poll() is not None) and not self.processes()

    def bury(self) -> None:
        """Waits until it has ended by itself; what is left after the bound is killed, as a failed liveness probe does."""
        try:
            wait_for(self.gone, self.probe_s, f"{self.name} to end by itself")
        except AssertionError:
            self.end()

    def end(self) -> None:
        """SIGKILL to all of it."""
        for left in self.processes():
            left.kill()
        if self.process is not None:
            self.process.wait(10)
        wait_for(self.gone, 10, f"{self.name} to be gone")


@dataclass
class TritonPart(Part):
    """A tritonserver of its own with one model: the router or a mock worker."""

    model: str = ""
    first_port: int = 0
    write: Callable[[Path], None] = lambda _: None
    """Fills the model repository."""

    def prepare(self) -> None:
        """The repository and the command, once."""
        if self.command:
            return
        install = find_triton()
        self.write(self.folder / "models")
        join_backends(install, source_root() / "backends" / "vllm", self.folder / "backends")
        ports = self.first_port, self.first_port + 1, self.first_port + 2
        command = server_command(install, self.folder / "models", self.folder / "backends", ports, int(START_S))
        self.command = tuple(f"--load-model={self.model}" if word == "--load-model=*" else word for word in command)

    def environment(self) -> dict[str, str]:
        """With Triton's libraries."""
        return server_environment(find_triton(), {**self.variables, _MARK: self._mark})

    def find(self, which: Which) -> psutil.Process:
        """The server or the stub of its model."""
        if which is not Which.STUB:
            return super().find(which)
        lines = ((one, " ".join(one.cmdline())) for one in self.processes())
        return next(one for one, line in lines if "triton_python_backend_stub" in line and f"/{self.model}/" in line)


@dataclass
class RouterPart(TritonPart):
    """A router."""

    url: str = ""
    admin: str = ""

    def fleet(self) -> dict[str, Any]:
        """What it says of itself; nothing while it isn't there."""
        try:
            return dict(get_json(f"{self.admin}/fleet"))
        except OSError:
            return {"ready": False, "workers": [], "active": 0}

    def placed(self) -> int:
        """Workers that it places on."""
        fleet = self.fleet()
        return sum(worker["placed"] for worker in fleet["workers"]) if fleet["ready"] else -1

    def ready(self) -> bool:
        """Whether Triton says so, too."""
        try:
            get_text(f"http://127.0.0.1:{self.first_port}/v2/models/router/ready")
        except OSError:
            return False
        return bool(self.fleet()["ready"])

    def drain(self) -> None:
        """Its load balancer sends nothing more; what it has ends."""
        wait_for(lambda: self.fleet()["active"] == 0, DRAIN_S, f"{self.name} to be idle")


@dataclass
class MockWorkerPart(TritonPart):
    """A mock engine in a tritonserver."""

    admin: str = ""

    def drain(self) -> None:
        """By its admin port."""
        drain_mock(self.admin)


@dataclass
class MockProcessPart(Part):
    """A mock engine as a process."""

    admin: str = ""

    def drain(self) -> None:
        """By its admin port."""
        drain_mock(self.admin)


def drain_mock(admin: str) -> None:
    """Until it has nothing more, handed-over blocks included."""
    held = ("vllm:num_requests_running", "vllm:num_requests_waiting", "tandem_mock_held_handoffs")
    post_json(f"{admin}/engine/drain?worker=0", {})

    def busy() -> float:
        lines = get_text(f"{admin}/metrics").splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(held))

    wait_for(lambda: busy() == 0, DRAIN_S, "the mock to be idle")


@dataclass
class RealPart(Part):
    """A real engine under `tandem serve`, which ends with an error when its server fails."""

    first_port: int = 0
    model: str = "vllm"
    probe_s: float = EXIT_S

    @property
    def server(self) -> Server:
        """To ask it."""
        return Server(self.folder / "run", self.first_port, self.first_port + 1, self.first_port + 2)

    def find(self, which: Which) -> psutil.Process:
        """One of them; the server is tritonserver, not its launcher."""
        server = self.server
        if which is Which.SERVER:
            return psutil.Process(server.pid)
        if which is Which.CONSOLIDATOR:
            return next(one for one in server.processes() if "tandem_kvbm.consolidator" in one.cmdline())
        engine = engine_of(server)
        return engine if which is Which.ENGINE else engine.parent()

    def drain(self) -> None:
        """By its admin port, which answers when all has ended."""
        post_json(f"{self.server.admin_url(self.model)}/engine/drain", {"timeout_s": DRAIN_S})

    def end(self) -> None:
        """Also what carries only the launcher's run id."""
        run = f"TANDEM_RUN_ID={self.server.state['run_id']}" if (self.folder / "run" / str(self.first_port) / "state.json").exists() else ""
        super().end()
        for left in processes_with(run) if run else ():
            left.kill()


@dataclass
class Kept(Part):
    """Something that other test code starts, ends and starts again: etcd or Prometheus."""

    thing: Any = None

    def start(self) -> None:
        """Returns when it answers."""
        self.thing.start()
        self.process = self.thing.process

    def processes(self) -> list[psutil.Process]:
        """Itself."""
        return [] if self.process is None or self.process.poll() is not None else [psutil.Process(self.process.pid)]


def python(*arguments: str) -> tuple[str, ...]:
    """A command in this environment."""
    return (sys.executable, *arguments)


def stop(process: psutil.Process) -> None:
    """SIGSTOP."""
    process.send_signal(signal.SIGSTOP)


def go_on(process: psutil.Process) -> None:
    """SIGCONT."""
    process.send_signal(signal.SIGCONT)
