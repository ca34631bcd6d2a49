# SPDX-License-Identifier: Apache-2.0
"""A tritonserver with a router and worker models that are mock engines: Triton loads, serves and unloads them as it does real ones."""

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from servers import answers, free_ports, get_json, post_json, processes_with, wait_for
from tandem_cli.serve.fleet import Fleet
from tandem_cli.serve.layout import source_root
from tandem_cli.serve.repository import write_repository
from tandem_cli.serve.tritonserver import find_triton, join_backends, server_command, server_environment

START_S = 120.0
_MODEL = '''# SPDX-License-Identifier: Apache-2.0
import locale

locale.setlocale(locale.LC_ALL, "C.UTF-8")

from tandem_worker.mock.triton import TritonPythonModel  # noqa: E402, F401
'''


@dataclass(frozen=True)
class MockServer:
    """A running server."""

    process: "subprocess.Popen[bytes]"
    mark: str
    http_port: int
    admin_port: int
    log: Path
    discovery: str
    worker_metrics: tuple[str, ...]
    """host:port of each worker's metrics, whether it is loaded or not."""

    @property
    def http_url(self) -> str:
        """Base URL of HTTP."""
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """Where clients connect."""
        return f"127.0.0.1:{self.http_port + 1}"

    @property
    def router_metrics(self) -> str:
        """host:port of the router's metrics."""
        return f"127.0.0.1:{self.admin_port}"

    def placed(self) -> list[str]:
        """Triton's names of the workers in placement."""
        return sorted(worker["triton_model"] for worker in self._workers() if worker["placed"])

    def _workers(self) -> list[dict[str, str]]:
        try:
            return list(get_json(f"http://{self.router_metrics}/fleet")["workers"])
        except OSError:
            return []

    def loaded(self) -> list[str]:
        """Worker models that are not wholly unloaded."""
        index = post_json(f"{self.http_url}/v2/repository/index", {})
        return sorted(model["name"] for model in index if model.get("state", "UNAVAILABLE") != "UNAVAILABLE" and model["name"] != "router")

    def processes(self) -> list[psutil.Process]:
        """Every living process of this server."""
        return processes_with(f"TANDEM_RUN_ID={self.mark}")


def write_mock_models(folder: Path, arguments_of: Mapping[str, str]) -> None:
    """Worker models by name, each with its command line of `tandem_worker.mock`."""
    for name, arguments in arguments_of.items():
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1" / "model.py").write_text(_MODEL)
        (folder / name / "config.pbtxt").write_text(
            f'name: "{name}"\nbackend: "python"\nmax_batch_size: 0\n'
            f'instance_group [ {{ kind: KIND_CPU count: 1 }} ]\n'
            f'parameters {{ key: "arguments" value: {{ string_value: "{arguments}" }} }}\n')


@contextmanager
def mock_server(folder: Path, models: int, loaded: tuple[str, ...], tokenizer: Path, arguments: str,
                **settings: str) -> Iterator[MockServer]:
    """`mock_fleet` of models mock_0, mock_1 ... that are all alike."""
    with mock_fleet(folder, {f"mock_{n}": arguments for n in range(models)}, loaded, tokenizer, **settings) as server:
        yield server


@contextmanager
def mock_fleet(folder: Path, arguments_of: Mapping[str, str], loaded: tuple[str, ...], tokenizer: Path,
               **settings: str) -> Iterator[MockServer]:
    """The server with `loaded` of its models in placement, each with its command line; whatever is left of it is killed at the end."""
    first, mark, install, discovery = free_ports(20), f"mock-{os.urandom(4).hex()}", find_triton(), f"file:{folder / 'discovery'}"
    write_repository(Fleet((), (), routers=1), "mock", source_root() / "model_repository", folder / "models")
    write_mock_models(folder / "models", {name: f"{arguments} --discovery {discovery} --admin-port {first + 10 + n}"
                                          for n, (name, arguments) in enumerate(arguments_of.items())})
    join_backends(install, source_root() / "backends" / "vllm", folder / "backends")
    variables = {"TANDEM_DISCOVERY": discovery, "TANDEM_ROUTER_TOKENIZER": str(tokenizer), "TANDEM_ROUTER_ADMIN_PORT": str(first + 3),
                 "TANDEM_GRPC_URL": f"127.0.0.1:{first + 1}", "TANDEM_RUN_ID": mark, **settings}
    command = server_command(install, folder / "models", folder / "backends", (first, first + 1, first + 2), int(START_S))
    command = [word for word in command if word != "--load-model=*"] + [f"--load-model={name}" for name in ("router", *loaded)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=server_environment(install, variables), stdin=subprocess.DEVNULL, stdout=log,
                                   stderr=subprocess.STDOUT, start_new_session=True)
    metrics = tuple(f"127.0.0.1:{first + 10 + n}" for n in range(len(arguments_of)))
    server = MockServer(process, mark, first, first + 3, folder / "log", discovery, metrics)
    try:
        wait_for(lambda: server.placed() == sorted(loaded), START_S, f"the router to place {loaded}")
        wait_for(lambda: answers(first), START_S, "the server to be ready")
        yield server
    finally:
        for left in server.processes():
            left.kill()
        process.wait(10)
