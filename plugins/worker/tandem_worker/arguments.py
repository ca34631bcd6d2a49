# SPDX-License-Identifier: Apache-2.0
"""Engine arguments: model.json, completed with Tandem's defaults and checked before the engine starts.

Pure: a dict of AsyncEngineArgs fields in, a completed dict out. What is checked here fails in milliseconds instead of
after half a minute of engine start. Sources of the defaults: Dynamo's vLLM worker, and measurements in docs/architecture.md.
"""

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from tandem_protocol.errors import ConfigError
from tandem_worker.config import REGISTERED_PORTS, WorkerSettings
from tandem_worker.connectors import parse_connectors, transfer_config
from tandem_worker.ranks import HEADLESS, check_cores, local_ranks
from tandem_worker.speculation import check_speculation

GPU_BLOCK_SIZE = 16
CPU_BLOCK_SIZE = 32
REPLAY_PORT_OFFSET = 1000
"""From a KV-event port to its replay socket."""
EngineArguments = dict[str, Any]


@dataclass(frozen=True)
class Platform:
    """What the arguments depend on besides the settings."""

    is_cpu: bool
    known_arguments: frozenset[str]
    speculative_methods: frozenset[str] = frozenset()
    """Empty: any."""


def complete(given: EngineArguments, settings: WorkerSettings, platform: Platform) -> EngineArguments:
    """The engine's arguments: `given` (model.json), then Tandem's defaults for what is not given.

    Raises ConfigError for an unknown argument, a contradiction, or a model that is not named.
    """
    arguments = dict(given)
    if local_ranks(arguments).remote and settings.effective_admin_port < 0:  # it says the fix, where vLLM would wait for ten minutes
        raise ConfigError("a leader of followers needs an admin port, to which they tie themselves: set DYN_SYSTEM_PORT")
    _refuse_unknown(arguments, platform.known_arguments | {HEADLESS})
    arguments.pop(HEADLESS, None)
    if platform.is_cpu:
        check_cores(settings.cpu_cores, arguments)
    check_speculation(arguments, platform.speculative_methods)
    _set_model(arguments, settings)
    _set_transfer(arguments, settings, platform)
    if settings.checkpoint_signal_file and not platform.is_cpu:
        arguments["enable_sleep_mode"] = True  # a dump of a sleeping engine holds no KV cache, and the GPU's memory is free
    _set_defaults(arguments, platform)
    if settings.lora_enabled and arguments.get("enable_lora") is None:
        arguments["enable_lora"] = True
    _check_block_size(arguments["block_size"], platform)
    if arguments.get("kv_events_config") is None:
        arguments["kv_events_config"] = kv_events_config(settings, arguments)
    return arguments


def _refuse_unknown(arguments: EngineArguments, known: Collection[str]) -> None:
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see vLLM's engine arguments"
            raise ConfigError(f"unknown engine argument {name!r} in model.json: {hint}")


def _set_model(arguments: EngineArguments, settings: WorkerSettings) -> None:
    if settings.model:
        arguments["model"] = settings.model
    if not arguments.get("model"):
        raise ConfigError("no model is named: set TANDEM_MODEL, or `model` in model.json")
    names = arguments.get("served_model_name")
    if isinstance(names, list) and len(names) > 1:
        raise ConfigError(f"served_model_name has {len(names)} entries: a worker serves one name, give one")


def _set_transfer(arguments: EngineArguments, settings: WorkerSettings, platform: Platform) -> None:
    role = settings.effective_role
    if arguments.get("kv_transfer_config") is not None:
        if settings.connector is not None:
            raise ConfigError("--connector and kv_transfer_config exclude each other: remove one of them")
        return
    names = parse_connectors(settings.effective_connectors, role)
    arguments["kv_transfer_config"] = transfer_config(names, role)
    if "lmcache" in names and platform.is_cpu:
        raise ConfigError("LMCache moves no KV blocks on CPUs: choose the connector kvbm there")
    if "nixl" in names and arguments.get("tensor_parallel_size", 1) == 1:
        # In one process with the scheduler NIXL's threads fight for the GIL of the engine's hot loop (vllm#29369).
        arguments.setdefault("distributed_executor_backend", "mp")


def _set_defaults(arguments: EngineArguments, platform: Platform) -> None:
    defaults: EngineArguments = {
        "enable_prefix_caching": True,
        "block_size": CPU_BLOCK_SIZE if platform.is_cpu else GPU_BLOCK_SIZE,
        # Triton's request priority works only under this policy; without priorities it is first come, first served.
        "scheduling_policy": "priority",
        "enable_log_requests": False,
        "disable_log_stats": False,
    }
    for name, value in defaults.items():
        if arguments.get(name) is None:
            arguments[name] = value


def _check_block_size(block_size: object, platform: Platform) -> None:
    if not isinstance(block_size, int) or block_size < 1:
        raise ConfigError(f"block_size must be a positive integer, got {block_size!r}")
    if platform.is_cpu and block_size % CPU_BLOCK_SIZE:
        raise ConfigError(f"block_size {block_size} does not work on the CPU: use a multiple of {CPU_BLOCK_SIZE}")


def kv_events_config(settings: WorkerSettings, arguments: EngineArguments) -> dict[str, Any] | None:
    """vLLM's KVEventsConfig as a dict, or None where nobody should route by this worker's blocks.

    vLLM adds the data-parallel rank to the port itself, so the first one of this host is taken off here.
    """
    if not settings.publishes_kv_events or not arguments["enable_prefix_caching"]:
        return None
    ranks = local_ranks(arguments)
    port = ranks.first_port(settings.kv_event_port, settings.worker_index)
    last = ranks.ports(settings.kv_event_port, settings.worker_index)[-1]
    if last > REGISTERED_PORTS[1]:
        raise ConfigError(f"KV-event port {last} is beyond {REGISTERED_PORTS[1]}: lower DYN_VLLM_KV_EVENT_PORT")
    return {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{port}",
        "replay_endpoint": f"tcp://*:{port + REPLAY_PORT_OFFSET}",
    }
