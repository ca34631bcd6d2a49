# SPDX-License-Identifier: Apache-2.0
"""Data parallelism: which ranks a worker serves, by its engine arguments. Pure; settled before vLLM is imported.

One worker holds several ranks (`data_parallel_size`), each an EngineCore with a scheduler, a KV cache and an event stream of its own.
Over several hosts each worker serves the ranks of its host (`data_parallel_hybrid_lb`), or one rank each (`data_parallel_rank`, which
vLLM has for mixtures of experts only). Ranks are numbered over the whole deployment.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem_protocol.errors import ConfigError

HEADLESS = "headless"
NO_HEADLESS = ("a worker without endpoints is not served: give each host its own with --data-parallel-hybrid-lb, "
               "--data-parallel-size-local and --data-parallel-start-rank, and let the router choose among them")


@dataclass(frozen=True)
class LocalRanks:
    """The ranks that one worker serves."""

    first: int = 0
    count: int = 1

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
    _refuse_foreign(arguments)
    rank, start = _rank(arguments, "data_parallel_rank", size), _rank(arguments, "data_parallel_start_rank", size)
    if rank is not None:
        return LocalRanks(rank, 1)
    if arguments.get("data_parallel_external_lb"):
        raise ConfigError("data_parallel_external_lb needs data_parallel_rank: which of the ranks this worker is")
    if arguments.get("data_parallel_hybrid_lb") or start is not None:
        return _of_this_host(start or 0, local, size)
    if local not in (None, size):
        raise ConfigError(f"data_parallel_size_local {local} of {size} leaves ranks to engines without endpoints: {NO_HEADLESS}")
    return LocalRanks(0, size)


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


def _of_this_host(start: int, local: int | None, size: int) -> LocalRanks:
    if local is None:
        raise ConfigError("data_parallel_hybrid_lb needs data_parallel_size_local: how many of the ranks are on this host")
    if start + local > size:
        raise ConfigError(f"ranks {start} to {start + local - 1} are on this host and data_parallel_size is {size}: raise it, "
                          "or lower data_parallel_start_rank or data_parallel_size_local")
    return LocalRanks(start, local)


def _refuse_foreign(arguments: Mapping[str, Any]) -> None:
    if arguments.get(HEADLESS):
        raise ConfigError(f"{HEADLESS}: {NO_HEADLESS}")
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
