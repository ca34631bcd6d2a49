# SPDX-License-Identifier: Apache-2.0
"""Real servers for tests: started by `tandem serve`, on free ports, in a run folder of the tests' own."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

START_TIMEOUT_S = 600
_WAIT_STEP_S = 0.05


@dataclass(frozen=True)
class Server:
    """A running server."""

    run_dir: Path
    http_port: int
    grpc_port: int
    metrics_port: int

    @property
    def grpc_url(self) -> str:
        """Where the gRPC clients connect."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        """Base URL of HTTP."""
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def state(self) -> dict[str, Any]:
        """What the launcher wrote down of this run."""
        return dict(json.loads((self.run_dir / str(self.http_port) / "state.json").read_bytes()))

    @property
    def pid(self) -> int:
        """The process id of tritonserver."""
        return int(self.state["pid"])

    @property
    def log(self) -> str:
        """The server's log so far; empty if the launcher refused to start it."""
        path = self.run_dir / f"{self.http_port}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def admin_url(self, worker: str) -> str:
        """The admin server of a worker."""
        return str(self.state["admin_urls"][worker])

    def health(self, worker: str) -> dict[str, Any]:
        """The body of a worker's `/health`."""
        return dict(get_json(f"{self.admin_url(worker)}/health"))

    def metric(self, worker: str, name: str) -> float:
        """The sum of a metric's samples on a worker's `/metrics`; 0 if it has none yet."""
        lines = get_text(f"{self.admin_url(worker)}/metrics").splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    def processes(self) -> list[psutil.Process]:
        """Every living process of this run, whoever its parent is."""
        return processes_with(f"TANDEM_RUN_ID={self.state['run_id']}")


def engine_of(server: Server) -> psutil.Process:
    """The EngineCore process of a server with one worker, found below its stub: vLLM renames it, which can blur its environment."""
    stubs = [process for process in server.processes() if "triton_python_backend_stub" in command_of(process)]
    return next(child for stub in stubs for child in stub.children() if "EngineCor" in f"{child.name()} {command_of(child)}")


def command_of(process: psutil.Process) -> str:
    """A process's command line; empty for one that ended, be it not reaped yet, like a killed guard's."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # of which ZombieProcess is one
        return ""


def processes_with(variable: str) -> list[psutil.Process]:
    """Living processes with this NAME=VALUE in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if variable.encode() in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                found.append(process)
        except OSError:
            continue
    return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def get_text(url: str) -> str:
    """GET, also for answers with an error status."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return str(response.read().decode())
    except urllib.error.HTTPError as exc:
        return str(exc.read().decode())


def answers(port: int) -> bool:
    """Whether a tritonserver answers on its HTTP port, be it ready or not."""
    try:
        get_text(f"http://127.0.0.1:{port}/v2/health/ready")
    except OSError:
        return False
    return True


def get_json(url: str) -> Any:
    """GET of JSON."""
    return json.loads(get_text(url))


def post_json(url: str, body: dict[str, Any]) -> Any:
    """POST of JSON; the answer, also for error statuses."""
    request = urllib.request.Request(url, data=json.dumps(body).encode(), method="POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as exc:
        return json.loads(exc.read())


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Waits until the condition holds; returns how long that took. Fails the test after `timeout_s`."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout_s:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(_WAIT_STEP_S)
    return time.monotonic() - started


def free_ports(count: int) -> int:
    """The first of `count` free consecutive ports, below the ephemeral range; free are those for KV-event replay 1000 above, too."""
    for first in range(21000 + os.getpid() % 97 * 40, 30000, 20):
        if all(_is_free(first + above + i) for i in range(count) for above in (0, 1000)):
            return first
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def tandem(run_dir: Path, *arguments: str, timeout_s: float = START_TIMEOUT_S, cores: str = "",
           **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs the `tandem` command, on these cores if any are given."""
    variables = {**os.environ, "TANDEM_RUN_DIR": str(run_dir), **environment}
    confined = ["taskset", "-c", cores] if cores else []
    return subprocess.run([*confined, sys.executable, "-m", "tandem_cli.main", *arguments], env=variables, capture_output=True, text=True,
                          timeout=timeout_s, check=False)


@contextmanager
def serve(run_dir: Path, *arguments: str, cores: str = "", **environment: str) -> Iterator[Server]:
    """A server, on these cores if any are given, stopped at the end."""
    first = free_ports(20)
    server = Server(run_dir, first, first + 1, first + 2)
    variables = {"DYN_SYSTEM_PORT": str(first + 3), "DYN_VLLM_KV_EVENT_PORT": str(first + 8),
                 "VLLM_NIXL_SIDE_CHANNEL_PORT": str(first + 12), "TANDEM_ROUTER_ADMIN_PORT": str(first + 16),
                 "TANDEM_CONSOLIDATOR_PORT": str(first + 18), "TANDEM_CONSOLIDATOR_ADMIN_PORT": "0"}
    ports = ["--http-port", str(first), "--grpc-port", str(first + 1), "--metrics-port", str(first + 2)]
    started = tandem(run_dir, "serve", "--detach", *ports, *arguments, cores=cores, **{**variables, **environment})
    try:
        assert started.returncode == 0, f"{started.stderr}\n{server.log[-3000:]}"
        yield server
    finally:
        stopped = tandem(run_dir, "stop", "--http-port", str(first), "--drain-timeout-s", "1")
        assert stopped.returncode == 0, stopped.stderr
