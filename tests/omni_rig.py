# SPDX-License-Identifier: Apache-2.0
"""A real tritonserver with one omni worker on a CPU, in vllm-omni's own environment (docs/omni.md)."""

import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from servers import free_ports, get_json, get_text, wait_for
from tandem_cli.serve.fleet import Fleet, WorkerPlan
from tandem_cli.serve.omni_environment import VARIABLE, chosen_folder
from tandem_cli.serve.repository import write_repository
from tandem_cli.serve.tritonserver import find_triton, join_backends, server_command, server_environment
from tandem_protocol.roles import Role

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 600
_MADE_WITHIN_S = 300
_EXIT_TIMEOUT_S = 60
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
"""What stages on few cores need of the environment."""
_ENTRY_POINTS = """[vllm_omni.platform_plugins]
omni_cpu = omni_cpu:platform
[vllm_omni.general_plugins]
omni_cpu_pipelines = omni_cpu:pipelines
"""


@dataclass(frozen=True)
class OmniServer:
    """A running server."""

    grpc_url: str
    admin_url: str
    log_file: Path
    process: "subprocess.Popen[bytes]"

    @property
    def log(self) -> str:
        """So far."""
        return self.log_file.read_text(errors="replace")

    def health(self) -> dict[str, Any]:
        """The body of `/health`."""
        return dict(get_json(f"{self.admin_url}/health"))

    def metrics(self) -> str:
        """The body of `/metrics`."""
        return get_text(f"{self.admin_url}/metrics")


def omni_environment() -> Path:
    """The one of the variable, else the one that build.sh made; or the test is skipped."""
    given = chosen_folder(None)
    if not (Path(given) / "bin" / "activate").is_file():
        pytest.skip(f"vllm-omni's environment is not there: make it with ./build.sh omni-env, or name one in {VARIABLE}")
    return Path(given)


def environment_with_platform(given: Path, folder: Path) -> Path:
    """An environment over the given one in which this checkout and the CPU platform come first. A stub ignores PYTHONPATH."""
    target = folder / "environment"
    subprocess.run([given / "bin" / "python", "-m", "venv", "--without-pip", target], check=True, timeout=_MADE_WITHIN_S)
    [packages] = target.glob("lib/python3.*/site-packages")
    info = packages / "omni_cpu-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: omni-cpu\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(_ENTRY_POINTS)
    [below] = given.glob("lib/python3.*/site-packages")
    first = [*(str(plugin) for plugin in sorted((ROOT / "plugins").iterdir())), str(ROOT / "tests")]
    (packages / "tandem-test.pth").write_text("\n".join([*first, f"import site; site.addsitedir({str(below)!r})"]) + "\n")
    return target


def make_tiny_diffusion(environment: Path, folder: Path) -> Path:
    """A Stable Diffusion of random weights."""
    target = folder / "tiny-diffusion"
    subprocess.run([environment / "bin" / "python", "-m", "omni_cpu.tiny_diffusion", target], check=True, timeout=_MADE_WITHIN_S)
    return target


@contextmanager
def serve_omni(environment: Path, folder: Path, arguments: Mapping[str, Any], more: Mapping[str, str] = MappingProxyType({}),
               ) -> Iterator[OmniServer]:
    """A server with the model `omni`; `arguments` are its model.json's, `more` is added to its environment."""
    first = free_ports(5)
    install = find_triton()
    join_backends(install, ROOT / "backends" / "vllm", folder / "backends")
    worker = WorkerPlan("omni", Role.OMNI, 0, execution_env=str(environment), arguments=dict(arguments))
    write_repository(Fleet((worker,), ()), str(arguments["model"]), ROOT / "model_repository", folder / "models")
    command = server_command(install, folder / "models", folder / "backends", (first, first + 1, first + 2), START_TIMEOUT_S)
    variables = {"DYN_SYSTEM_PORT": str(first + 3), "TANDEM_GRPC_URL": f"127.0.0.1:{first + 1}",
                 "TANDEM_DISCOVERY": f"file:{folder / 'discovery'}", **CPU, **more}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=server_environment(install, variables))
    server = OmniServer(f"127.0.0.1:{first + 1}", f"http://127.0.0.1:{first + 3}", folder / "server.log", process)
    try:
        wait_for(lambda: process.poll() is not None or _is_ready(first), START_TIMEOUT_S, "the server's start")
        assert process.poll() is None, server.log[-4000:]
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_EXIT_TIMEOUT_S)
        finally:
            process.kill()


def _is_ready(http_port: int) -> bool:
    try:
        get_text(f"http://127.0.0.1:{http_port}/v2/health/ready")
    except OSError:
        return False
    return True
