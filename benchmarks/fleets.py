# SPDX-License-Identifier: Apache-2.0
"""Starts what the benchmarks of the router need: mock workers in a process, and a tritonserver that serves routers alone.

Both find each other through a discovery folder. Everything started here ends with its context.
"""

import json
import select
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil

from benchmarks.errors import BenchmarkError
from benchmarks.targets import HOST, PROBE_TIMEOUT_S, STOP_TIMEOUT_S, server
from tandem_cli.serve.layout import source_root
from tandem_cli.serve.tritonserver import find_triton, join_backends, server_command, server_environment

START_TIMEOUT_S = 180.0
_POLL_S = 0.1
_STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class RouterModel:
    """A Triton model that is a router: its settings by their names in config.pbtxt, and how many processes serve it."""

    name: str = "router"
    settings: Mapping[str, str] = field(default_factory=dict)
    instances: int = 1


@dataclass(frozen=True)
class MockProcess:
    """Mock workers in one process."""

    pid: int
    grpc_url: str
    models: tuple[str, ...]


@dataclass(frozen=True)
class RouterServer:
    """A tritonserver with routers only."""

    pid: int
    grpc_url: str
    admin_urls: tuple[str, ...]
    """Of every instance of every model."""

    @property
    def stubs(self) -> tuple[int, ...]:
        """The routers' processes."""
        return tuple(child.pid for child in psutil.Process(self.pid).children(recursive=True) if _STUB in " ".join(child.cmdline()))


def discovery_url(folder: Path) -> str:
    """A discovery in a folder of this host."""
    return f"file:{quote(str(folder.absolute()))}"


def free_ports(count: int) -> tuple[int, ...]:
    """Ports that nobody listened on a moment ago."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((HOST, 0))
        return tuple(int(probe.getsockname()[1]) for probe in probes)


@contextmanager
def mock_workers(store: str, arguments: Sequence[str], log: Path) -> Iterator[MockProcess]:
    """`python -m tandem_worker.mock`, registered at the discovery URL. Raises BenchmarkError if it doesn't come up."""
    command = [sys.executable, "-m", "tandem_worker.mock", "--discovery", store, *arguments]
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=output, text=True)
    try:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], START_TIMEOUT_S)[0] or not (line := process.stdout.readline()):
            raise BenchmarkError(f"the mock workers did not start, see {log}")
        ready: dict[str, Any] = json.loads(line)
        yield MockProcess(process.pid, ready["grpc"], tuple(worker["triton_model"] for worker in ready["workers"]))
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        process.kill()
        process.communicate(timeout=STOP_TIMEOUT_S)


@contextmanager
def routers(store: str, models: Sequence[RouterModel], workers: int, folder: Path, settings: Mapping[str, str]) -> Iterator[RouterServer]:
    """A tritonserver with these routers, from when each has `workers` workers in placement. `settings` hold for all of them.

    Raises BenchmarkError.
    """
    install, count = find_triton(), sum(model.instances for model in models)
    http, grpc, metrics = free_ports(3)
    first_admin = _consecutive(count)
    shutil.rmtree(folder, ignore_errors=True)
    for number, model in enumerate(models):
        port = first_admin + sum(before.instances for before in models[:number])
        _write_model(model, {"discovery": store, **settings, "router_admin_port": str(port)}, folder / "models" / model.name)
    join_backends(install, source_root() / "backends" / "vllm", folder / "backends")
    command = server_command(install, folder / "models", folder / "backends", (http, grpc, metrics), int(START_TIMEOUT_S))
    admin = tuple(f"http://{HOST}:{first_admin + i}" for i in range(count))
    log = folder.with_suffix(".log")
    environment, health = _environment(server_environment(install, {})), f"http://{HOST}:{http}/v2/health/ready"
    with server(command, log, health, START_TIMEOUT_S, environment) as process:
        for url in admin:
            _await_placed(url, workers, log)
        yield RouterServer(process.pid, f"{HOST}:{grpc}", admin)


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what the caller set for routers of its own: here the models' parameters decide."""
    theirs = ("DYN_", "TANDEM_ROUTER_", "TANDEM_DISCOVERY")
    return {name: value for name, value in environment.items() if not name.startswith(theirs)}


def _write_model(model: RouterModel, settings: Mapping[str, str], folder: Path) -> None:
    shutil.copytree(source_root() / "model_repository" / "router", folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = (folder / "config.pbtxt").read_text().replace('name: "router"', f'name: "{model.name}"', 1)
    text = text.replace("count: 1", f"count: {model.instances}", 1)
    values = {**settings, **model.settings}
    added = [f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}' for key, value in values.items()]
    (folder / "config.pbtxt").write_text("\n".join([text.rstrip(), *added]) + "\n")


def _await_placed(admin_url: str, workers: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(OSError):
            with urllib.request.urlopen(f"{admin_url}/fleet", timeout=PROBE_TIMEOUT_S) as answer:
                report = json.loads(answer.read())
            if report["ready"] and sum(worker["placed"] for worker in report["workers"]) >= workers:
                return
        time.sleep(_POLL_S)
    raise BenchmarkError(f"the router at {admin_url} did not place {workers} workers within {START_TIMEOUT_S:g} s, see {log}")


def _consecutive(count: int) -> int:
    """The first of `count` ports in a row that are free: a router's instances count up from its admin port."""
    for _ in range(100):
        [first] = free_ports(1)
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind((HOST, port))
            except OSError:
                continue
            return first
    raise BenchmarkError(f"found no {count} free ports in a row")
