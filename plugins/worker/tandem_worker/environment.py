# SPDX-License-Identifier: Apache-2.0
"""The environment that vLLM and its processes need, which must be set before vLLM is imported."""

import re
import socket
from pathlib import Path

from tandem_worker.config import WorkerSettings
from tandem_worker.guard import WORKER_TOKEN_VARIABLE
from tandem_worker.parent_death import WORKER_PID_VARIABLE
from tandem_worker.ranks import LocalRanks

LOOPBACK = "127.0.0.1"
OVERRIDABLE = {
    # UCX reads remote GPU memory by CUDA IPC only where it sees NVLink, else by TCP through host memory. Two engines on one
    # GPU of a host with a single GPU fall under "else": measured 399 ms for 11.8 MB there (benchmarks/README.md).
    "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on",
}
"""Variables that a worker sets unless its environment has them already."""


def overridable(settings: WorkerSettings) -> dict[str, str]:
    """OVERRIDABLE, and who this worker is to an object store of KV blocks: the same after a restart, in letters that buckets allow."""
    host = re.sub(r"[^a-z0-9]+", "-", socket.gethostname().lower()).strip("-") or "host"
    return {**OVERRIDABLE, "TANDEM_KVBM_WORKER_ID": f"{host}-{settings.worker_index}"}


def engine_environment(settings: WorkerSettings, *, token: str, stub_pid: int, scratch: Path, ranks: LocalRanks) -> dict[str, str]:
    """Variables to set in the worker's process; its engine processes inherit them."""
    variables = {
        WORKER_TOKEN_VARIABLE: token,
        WORKER_PID_VARIABLE: str(stub_pid),
        # vLLM's ZMQ sockets: in a folder that the guard removes, since a killed process leaves them behind.
        "VLLM_RPC_BASE_PATH": str(scratch),
        "VLLM_NO_USAGE_STATS": "1",
        # What engine processes count by themselves (LMCache's metrics) stays in them, unless this names a folder. This process is
        # not concerned: Prometheus' client, imported already, has made its choice.
        "PROMETHEUS_MULTIPROC_DIR": str(metrics_folder(scratch)),
        # Engine processes must not inherit the stub's threads and locks.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": settings.side_channel_host or reachable_address(),
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(ranks.first_port(settings.side_channel_port, settings.worker_index)),
    }
    if settings.gpus:
        variables["CUDA_VISIBLE_DEVICES"] = settings.gpus
    if settings.cpu_cores:
        variables["VLLM_CPU_OMP_THREADS_BIND"] = settings.cpu_cores
    return variables


def metrics_folder(scratch: Path) -> Path:
    """Where this worker's engine processes keep metrics; of this start alone, since old files would be counted again."""
    return scratch / "metrics"


def reachable_address() -> str:
    """This host's address by its own name if a socket can be bound there, else loopback.

    A container's host name often resolves to an address that other hosts can reach; a laptop's often to nothing at all.
    """
    try:
        address = socket.gethostbyname(socket.gethostname())
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return LOOPBACK
    return address
