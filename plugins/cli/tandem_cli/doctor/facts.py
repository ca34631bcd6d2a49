# SPDX-License-Identifier: Apache-2.0
"""What `tandem doctor` knows of a host. An `error` is a sentence on why something could not be found out."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tandem_cli.serve.omni_environment import OmniEnvironment


@dataclass(frozen=True)
class HostFacts:
    """Operating system, processor architecture, Python, usable cores, memory in bytes, free bytes in /dev/shm (None: no such mount)."""

    system: str
    machine: str
    python: tuple[int, int]
    cores: int
    memory_bytes: int
    shm_free_bytes: int | None


@dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi."""

    name: str
    driver: str
    memory_mib: int
    used_mib: int


@dataclass(frozen=True)
class GpuFacts:
    """The GPUs; `error` where nvidia-smi is there but fails. Neither without an NVIDIA driver."""

    gpus: tuple[Gpu, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class LimitFacts:
    """Soft limits of this shell; None is unlimited."""

    open_files: int | None
    locked_bytes: int | None


@dataclass(frozen=True)
class BusyPort:
    """A port that a server with default settings would open, and what listens there."""

    number: int
    what: str
    owner: str


@dataclass(frozen=True)
class TritonFacts:
    """tritonserver and the stub that runs our models; `linked` are the libpythons that the stub needs, `missing` libraries not found."""

    binary: str = ""
    version: str = ""
    linked: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class NixlFacts:
    """A transfer from one process's memory into another's. `transport` is UCX's own word, e.g. `cma/memory` or `tcp/lo`."""

    device: str = ""
    transport: str = ""
    how: str = ""
    size_bytes: int = 0
    seconds: float = 0.0
    intact: bool = False
    error: str = ""
    skipped: bool = False


@dataclass(frozen=True)
class ServiceFacts:
    """A service that was asked for; an empty `url` was not."""

    url: str = ""
    says: str = ""
    error: str = ""


@dataclass(frozen=True)
class ModelFacts:
    """A model's files; `problems` are sentences."""

    path: str
    weights_bytes: int = 0
    problems: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class OmniFacts:
    """vllm-omni's environment, and whether somebody named it: then it is meant to serve here."""

    found: OmniEnvironment = field(default_factory=OmniEnvironment)
    named: bool = False


@dataclass(frozen=True)
class Facts:
    """Everything that the checks look at."""

    host: HostFacts
    gpu: GpuFacts
    limits: LimitFacts
    busy_ports: tuple[BusyPort, ...]
    triton: TritonFacts
    packages: Mapping[str, str] = field(default_factory=dict)
    """Installed versions by distribution name; what is not installed is left out."""
    nixl: NixlFacts = NixlFacts(skipped=True)
    discovery: ServiceFacts = ServiceFacts()
    prometheus: ServiceFacts = ServiceFacts()
    model: ModelFacts = ModelFacts("")
    omni: OmniFacts = OmniFacts()
