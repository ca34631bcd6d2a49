# SPDX-License-Identifier: Apache-2.0
"""Checks before a server starts: each failure is one sentence that says what to do, in milliseconds instead of minutes."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tandem_cli.serve.fleet import Fleet, Hardware
from tandem_protocol.errors import ConfigError
from tandem_worker.ranks import local_ranks

GIB = 1 << 30
ENGINE_BYTES = int(2.5 * GIB)
"""Resident memory of one CPU engine besides weights and KV: stub, EngineCore and worker with torch and vLLM (measured 2.4 GiB)."""
SHM_BYTES = 512 << 20
"""Shared memory of one engine with the `mp` executor: its broadcast buffers, plus Triton's regions (measured 420 MiB)."""
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")
_NVIDIA_SMI_TIMEOUT_S = 20
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@dataclass(frozen=True)
class Port:
    """A port that the server will open, with the option that moves it."""

    number: int
    what: str
    option: str


def detect_hardware() -> Hardware:
    """Cores this process may use, whether they compute in bfloat16, and CUDA GPUs that the driver lists."""
    return Hardware(tuple(sorted(os.sched_getaffinity(0))), _count_gpus(), fast_bf16(Path("/proc/cpuinfo").read_text()))


def fast_bf16(cpuinfo: str) -> bool:
    """Whether the first processor of /proc/cpuinfo names an instruction set for bfloat16; True where it names no flags at all."""
    flags = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    return not flags or bool(_BF16_FLAGS & set(flags.split()))


def _count_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() and device.strip() != "-1"])
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=False)  # noqa: S607
    except subprocess.TimeoutExpired:
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0


def check_ports(ports: Iterable[Port]) -> None:
    """Raises ConfigError for a port that something listens on, or that two parts of this server would share."""
    seen: dict[int, Port] = {}
    for port in ports:
        if port.number in seen:
            raise ConfigError(f"{port.what} and {seen[port.number].what} would share port {port.number}: set {port.option} differently")
        seen[port.number] = port
        if not is_free(port.number):
            raise ConfigError(f"port {port.number} for {port.what} is in use{owner_of(port.number)}: stop that, or set {port.option}")


def is_free(number: int) -> bool:
    """Whether nothing listens on this port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", number))  # noqa: S104 - only to see whether it is taken
        except OSError:
            return False
    return True


def owner_of(number: int) -> str:
    """` by process PID (NAME)` for who listens on this port, or nothing where that can't be seen."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == number and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:
        pass  # another user's process: the port is taken all the same, only its owner stays unnamed
    return ""


def check_model(model: str, files: Sequence[str] = ("config.json",)) -> None:
    """A folder must hold one of `files`, as a model does; a hub id must be cached, or the hub reachable. Raises ConfigError."""
    path = Path(model)
    if path.is_dir():
        if not any((path / file).exists() for file in files):
            raise ConfigError(f"{model} has no {' or '.join(files)}: give the folder of a Hugging Face model")
        return
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ConfigError(f"there is no model folder {model}: give an existing folder, or a hub id like org/name")
    _check_hub(model)


def _check_hub(model: str) -> None:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        snapshot_download(model, local_files_only=True)
    except (LocalEntryNotFoundError, FileNotFoundError):
        pass  # not cached: ask the hub below
    except HFValidationError as exc:
        raise ConfigError(f"{model!r} is neither a folder nor a hub id like org/name: {exc}") from exc
    else:
        return
    try:
        HfApi().model_info(model, timeout=10)
    except RepositoryNotFoundError as exc:
        raise ConfigError(f"the hub has no model {model} (or needs a token for it): check the name, or set HF_TOKEN") from exc
    except Exception as exc:
        raise ConfigError(f"model {model} is not in the local cache and the hub can't be reached: give --model FOLDER") from exc


def check_memory(fleet: Fleet, model: str, kv_space_bytes: int, available_bytes: int | None = None) -> None:
    """Whether host memory holds a CPU fleet: engines, weights and KV space. Raises ConfigError."""
    available = available_memory() if available_bytes is None else available_bytes
    per_engine = ENGINE_BYTES + weights_bytes(Path(model)) + kv_space_bytes
    engines = sum(local_ranks(worker.arguments).count for worker in fleet.workers)
    needed = per_engine * engines
    if needed > available:
        raise ConfigError(
            f"{engines} engines need about {needed / GIB:.1f} GiB of memory and {available / GIB:.1f} GiB are free: "
            f"use --mode agg, a smaller model, or a smaller VLLM_CPU_KVCACHE_SPACE (now {kv_space_bytes / GIB:g} GiB each)"
        )


def check_shared_memory(fleet: Fleet, shm: Path = Path("/dev/shm")) -> None:  # noqa: S108
    """Whether /dev/shm holds the fleet: Docker gives containers 64 MiB. Raises ConfigError."""
    needed, free = SHM_BYTES * len(fleet.workers), shutil.disk_usage(shm).free
    if needed > free:
        raise ConfigError(f"{shm} has {free >> 20} MiB free and the engines need about {needed >> 20} MiB: "
                          "start the container with --shm-size, or mount a memory volume there")


def weights_bytes(folder: Path) -> int:
    """Size of the weight files in a model folder; 0 for a hub id."""
    return sum(path.stat().st_size for pattern in _WEIGHT_FILES for path in folder.glob(pattern)) if folder.is_dir() else 0


def available_memory() -> int:
    """Free memory of the host or of this cgroup, whichever is less, in bytes."""
    host = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(host, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):
        return host  # no cgroup limit
