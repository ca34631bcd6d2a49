# SPDX-License-Identifier: Apache-2.0
"""A tritonserver whose only model is the router, in front of mock workers: no engine is started."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from servers import answers, free_ports, get_json, get_text, processes_with, wait_for
from tandem_cli.serve.fleet import Fleet
from tandem_cli.serve.layout import source_root
from tandem_cli.serve.repository import write_repository
from tandem_cli.serve.tritonserver import find_triton, join_backends, server_command, server_environment

START_S = 120.0


@dataclass(frozen=True)
class RouterServer:
    """A running server."""

    process: "subprocess.Popen[bytes]"
    mark: str
    http_port: int
    admin_port: int
    log: Path

    @property
    def grpc_url(self) -> str:
        """Where clients connect."""
        return f"127.0.0.1:{self.http_port + 1}"

    def fleet(self, instance: int = 0) -> dict[str, Any]:
        """What an instance of the router says of its fleet; nothing while it isn't there."""
        try:
            return dict(get_json(f"http://127.0.0.1:{self.admin_port + instance}/fleet"))
        except OSError:
            return {"ready": False, "workers": [], "replicas": []}

    def metrics(self, instance: int = 0) -> str:
        """An instance's metrics."""
        return get_text(f"http://127.0.0.1:{self.admin_port + instance}/metrics")

    def placed(self, instance: int = 0) -> int:
        """Workers in an instance's placement."""
        return sum(worker["placed"] for worker in self.fleet(instance)["workers"])

    def stubs(self) -> list[psutil.Process]:
        """The router's stubs, which Triton starts with the model's path."""
        return [one for one in self.processes() if "triton_python_backend_stub" in (line := " ".join(one.cmdline())) and "/router/" in line]

    def processes(self) -> list[psutil.Process]:
        """Every living process of this server."""
        return processes_with(f"TANDEM_RUN_ID={self.mark}")


@contextmanager
def router_server(folder: Path, store: Path, workers: int, tokenizer: Path, *, instances: int = 1,
                  **settings: str) -> Iterator[RouterServer]:
    """A server whose routers have found so many workers; whatever is left of it is killed at the end."""
    first, mark, install = free_ports(20), f"router-{os.urandom(4).hex()}", find_triton()
    write_repository(Fleet((), (), routers=instances), "mock", source_root() / "model_repository", folder / "models")
    join_backends(install, source_root() / "backends" / "vllm", folder / "backends")
    variables = {"TANDEM_DISCOVERY": f"file:{store}", "TANDEM_ROUTER_TOKENIZER": str(tokenizer), "TANDEM_ROUTER_ADMIN_PORT": str(first + 3),
                 "TANDEM_RUN_ID": mark, **settings}
    with (folder / "log").open("wb") as log:
        command = server_command(install, folder / "models", folder / "backends", (first, first + 1, first + 2), int(START_S))
        process = subprocess.Popen(command, env=server_environment(install, variables), stdin=subprocess.DEVNULL, stdout=log,
                                   stderr=subprocess.STDOUT, start_new_session=True)
    server = RouterServer(process, mark, first, first + 3, folder / "log")
    try:
        for instance in range(instances):
            wait_for(lambda instance=instance: server.placed(instance) == workers and server.fleet(instance)["ready"], START_S,  # type: ignore[misc]
                     f"instance {instance} to place {workers} workers")
        wait_for(lambda: answers(first), START_S, "the server to be ready")
        yield server
    finally:
        for left in server.processes():
            left.kill()
        process.wait(10)
