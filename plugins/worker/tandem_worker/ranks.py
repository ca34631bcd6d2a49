# SPDX-License-Identifier: Apache-2.0
"""Data parallelism: which ranks a worker serves, by its engine arguments. Pure; settled before vLLM is imported.

One worker holds several ranks (`data_parallel_size`), each an EngineCore with a scheduler, a KV cache and an event stream of its own.
Over several hosts each worker serves the ranks of its host (`data_parallel_hybrid_lb`), or one rank each (`data_parallel_rank`, which
vLLM has for mixtures of experts only); or one of them, the leader, serves all, and the others follow it (`headless`). Ranks are numbered
over the whole deployment.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem_protocol.errors import ConfigError

HEADLESS = "headless"


@dataclass(frozen=True)
class LocalRanks:
    """The ranks that one worker runs on its host."""

    first: int = 0
    count: int = 1
    remote: int = 0
    """Of a leader: how many ranks after these its followers run, which it serves, too."""

    def first_port(self, port: int, worker_index: int) -> int:
        """What vLLM is to be told as port of rank 0, to which it adds the rank: so that a host's workers use consecutive ports."""
        return port + worker_index * self.count - self.first

    def ports(self, port: int, worker_index: int) -> range:
        """What the ranks here bind then."""
        first = port + worker_index * self.count
        return range(first, first + self.count)


def local_ranks(arguments: Mapping[str, Any]) -> LocalRanks:
    """Raises ConfigError for what contradicts itself, or would wait for engines that nobody starts."""
    size, local = _positive(arguments, "data_parallel_size") or 1, _positive(arguments, "data_parallel_size_local")
    _refuse_ray(arguments)
    rank, start = _rank(arguments, "data_parallel_rank", size), _rank(arguments, "data_parallel_start_rank", size)
    if arguments.get(HEADLESS):
        return _of_a_follower(arguments, start, local, size)
    if rank is not None:
        return LocalRanks(rank, 1)
    if arguments.get("data_parallel_external_lb"):
        raise ConfigError("data_parallel_external_lb needs data_parallel_rank: which of the ranks this worker is")
    if arguments.get("data_parallel_hybrid_lb") or start is not None:
        return _of_this_host(start or 0, local, size)
    if local is None or local == size:
        return LocalRanks(0, size)
    _need_address(arguments)
    if local > size:
        raise ConfigError(f"data_parallel_size_local {local} is more than data_parallel_size {size}: lower it")
    return LocalRanks(0, local, size - local)


def engine_processes(arguments: Mapping[str, Any]) -> int:
    """Processes on this host that compute: one for each GPU, or each group of cores. Raises ConfigError.

    An engine over several hosts (`nnodes`) has its share here, and the others with its followers.
    """
    tensor, pipeline = (_positive(arguments, f"{kind}_parallel_size") or 1 for kind in ("tensor", "pipeline"))
    hosts, all_hosts = _positive(arguments, "nnodes") or 1, tensor * pipeline * local_ranks(arguments).count
    if all_hosts % hosts:
        raise ConfigError(f"{all_hosts} GPUs (tensor_parallel_size x pipeline_parallel_size) can't be shared equally by nnodes={hosts}")
    return all_hosts // hosts


def check_cores(cores: str, arguments: Mapping[str, Any]) -> None:
    """Whether `TANDEM_CPU_CORES` has a group for each process; vLLM would end in an assertion. Raises ConfigError."""
    groups, wanted = len(cores.split("|")), engine_processes(arguments)
    if cores and cores not in {"auto", "nobind"} and groups != wanted:
        raise ConfigError(f"TANDEM_CPU_CORES={cores!r} names {groups} groups of cores and the engine has {wanted} processes that compute: "
                          "give one group each, with | between, e.g. 0|1")


def _of_a_follower(arguments: Mapping[str, Any], start: int | None, local: int | None, size: int) -> LocalRanks:
    others = {"data_parallel_hybrid_lb": False, "data_parallel_external_lb": False, "data_parallel_rank": None, "nnodes": 1}
    for name, absent in others.items():
        if arguments.get(name) not in (None, absent):
            raise ConfigError(f"{HEADLESS} and {name} exclude each other: a follower's ranks are those from data_parallel_start_rank on")
    if not start or local is None:
        raise ConfigError(f"{HEADLESS} needs data_parallel_size_local and data_parallel_start_rank (above 0, which is the leader's): "
                          "which of the ranks are on this host")
    _need_address(arguments)
    return _of_this_host(start, local, size)


def _need_address(arguments: Mapping[str, Any]) -> None:
    if not arguments.get("data_parallel_address") or not arguments.get("data_parallel_rpc_port"):
        raise ConfigError("a leader and its followers meet at data_parallel_address (the leader's) and data_parallel_rpc_port: give both "
                          "the same two; or give each host endpoints of its own with data_parallel_hybrid_lb")


def _of_this_host(start: int, local: int | None, size: int) -> LocalRanks:
    if local is None:
        raise ConfigError("data_parallel_hybrid_lb needs data_parallel_size_local: how many of the ranks are on this host")
    if start + local > size:
        raise ConfigError(f"ranks {start} to {start + local - 1} are on this host and data_parallel_size is {size}: raise it, "
                          "or lower data_parallel_start_rank or data_parallel_size_local")
    return LocalRanks(start, local)


def _refuse_ray(arguments: Mapping[str, Any]) -> None:
    backend = arguments.get("data_parallel_backend") or "mp"
    if backend != "mp":
        raise ConfigError(f"data_parallel_backend {backend!r}: its processes are not this worker's, who could not end them; leave it out")


def _positive(arguments: Mapping[str, Any], name: str) -> int | None:
    value = arguments.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(f"{name} must be a positive integer, got {value!r}")
    return value


def _rank(arguments: Mapping[str, Any], name: str, size: int) -> int | None:
    value = arguments.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < size):
        raise ConfigError(f"{name} must be a rank below data_parallel_size ({size}), got {value!r}")
    return value
