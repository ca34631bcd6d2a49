# SPDX-License-Identifier: Apache-2.0
"""Finds tritonserver, makes it runnable, and builds its command line and environment.

Two kinds are known: the one of NVIDIA's container (/opt/tritonserver), and the one inside the package `nvidia-pytriton`,
which needs its executables marked, the stub of this Python copied, and its libraries on the path (docs/architecture.md).
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tandem_protocol.errors import ConfigError

CONTAINER = Path("/opt/tritonserver")
EXIT_TIMEOUT_S = 30
THREAD_POOL_SIZE = 256
"""Triton's default of 32 stub calls at a time doubles TTFT at 64 concurrent streams."""
_STUB = "triton_python_backend_stub"
_LDD_TIMEOUT_S = 20


@dataclass(frozen=True)
class TritonInstall:
    """One tritonserver."""

    binary: Path
    backends: Path
    library_path: tuple[Path, ...]


def find_triton() -> TritonInstall:
    """The container's tritonserver if there is one, else the package's. Raises ConfigError."""
    if (CONTAINER / "bin" / "tritonserver").exists():
        return TritonInstall(CONTAINER / "bin" / "tritonserver", CONTAINER / "backends", ())
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ConfigError("there is no tritonserver: run in NVIDIA's Triton container, or install the package nvidia-pytriton")
    return _prepare_package(Path(spec.origin).parent / "tritonserver")


def _prepare_package(server: Path) -> TritonInstall:
    """Marks and copies what the wheel ships without its execute bits; harmless when repeated."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    source = server / "python_backend_stubs" / version / _STUB
    if not source.exists():
        raise ConfigError(f"this tritonserver has no Python backend for Python {version}: use Python 3.11 or 3.12")
    target = server / "backends" / "python" / _STUB
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        shutil.copyfile(source, partial)
        partial.chmod(0o755)
        partial.replace(target)
    binary = server / "bin" / "tritonserver"
    if not os.access(binary, os.X_OK):  # in an image it was done by another user, who owns it
        binary.chmod(0o755)
    libraries = (server.parent.parent / "nvidia_pytriton.libs", Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib"))
    _check_stub(target, libraries)
    return TritonInstall(binary, server / "backends", libraries)


def _check_stub(stub: Path, libraries: tuple[Path, ...]) -> None:
    """The stub needs the shared library of exactly this Python; static builds of Python have none."""
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, libraries))}
    ldd = shutil.which("ldd")
    if ldd is None:
        return
    listed = subprocess.run([ldd, str(stub)], capture_output=True, text=True, env=environment, timeout=_LDD_TIMEOUT_S, check=False)
    missing = [line.split()[0] for line in listed.stdout.splitlines() if "not found" in line]
    if missing:
        raise ConfigError(f"Triton's Python stub misses {', '.join(missing)}: install it (Debian: "
                          f"apt-get install libpython{sys.version_info.major}.{sys.version_info.minor}), or use a Python built shared")


def join_backends(install: TritonInstall, drop_in: Path, target: Path) -> None:
    """A folder with Triton's own backends and the drop-in `vllm`, which replaces the container's."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for backend in install.backends.iterdir():
        if backend.name != "vllm":
            (target / backend.name).symlink_to(backend)
    shutil.copytree(drop_in, target / "vllm", ignore=shutil.ignore_patterns("__pycache__"))


def server_command(install: TritonInstall, models: Path, backends: Path, ports: tuple[int, int, int], start_timeout_s: int) -> list[str]:
    """The command line of tritonserver; `ports` are HTTP, gRPC and metrics."""
    http, grpc, metrics = ports
    return [
        str(install.binary),
        f"--model-repository={models}",
        f"--backend-directory={backends}",
        f"--backend-config=python,thread-pool-size={THREAD_POOL_SIZE}",
        f"--backend-config=python,stub-timeout-seconds={start_timeout_s}",  # the default of 30 s is about one engine start
        "--model-control-mode=explicit",
        "--load-model=*",
        f"--http-port={http}",
        f"--grpc-port={grpc}",
        f"--metrics-port={metrics}",
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
    ]


def server_environment(install: TritonInstall, extra: dict[str, str]) -> dict[str, str]:
    """The environment of tritonserver; stubs and engines inherit it."""
    environment = {**os.environ, **extra}
    # The stub finds `python3`, and with it the packages, through PATH.
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', '')}"
    if install.library_path:
        given = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = ":".join([*map(str, install.library_path), *([given] if given else [])])
    return environment
