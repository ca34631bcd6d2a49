# SPDX-License-Identifier: Apache-2.0
"""Builds vLLM's AsyncLLM from completed engine arguments. Edge module: imports vLLM, which takes seconds."""

import dataclasses
from typing import Any, get_args

from vllm import AsyncEngineArgs
from vllm.config import ECTransferConfig, KVEventsConfig, KVTransferConfig
from vllm.config.speculative import SpeculativeMethod
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

from tandem_protocol.errors import ConfigError
from tandem_worker.arguments import EngineArguments, Platform
from tandem_worker.load import EngineLoads
from tandem_worker.sleep_terms import Abilities


def detect_platform() -> Platform:
    """The platform as vLLM sees it, with the engine arguments that this vLLM knows."""
    known = frozenset(field.name for field in dataclasses.fields(AsyncEngineArgs) if field.init)
    return Platform(is_cpu=current_platform.is_cpu(), known_arguments=known, speculative_methods=frozenset(get_args(SpeculativeMethod)))


def build_engine(arguments: EngineArguments, loads: EngineLoads) -> AsyncLLM:
    """Starts an engine; blocks for as long as that takes. Raises ConfigError for arguments that vLLM refuses."""
    try:
        engine_args = AsyncEngineArgs(**typed(arguments))
        config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    except (ValueError, TypeError, OSError, RuntimeError) as exc:
        raise ConfigError(f"vLLM refuses the engine arguments: {first_line(exc)}") from exc
    _refuse_lonely_ranks(config)
    return AsyncLLM.from_vllm_config(config, usage_context=UsageContext.OPENAI_API_SERVER, stat_loggers=[_load_logger(loads)],
                                     enable_log_requests=False, disable_log_stats=False)


def _refuse_lonely_ranks(config: Any) -> None:
    """vLLM refuses one rank of a dense model per host where it is asked for by its number, and dies of an assertion where it is not."""
    if config.parallel_config.data_parallel_external_lb and not config.model_config.is_moe:
        raise ConfigError("vLLM has no single data-parallel rank of a dense model per host: give this host several "
                          "(data_parallel_size_local), or start a worker without data_parallel_* here, which routers take as well")


def sleep_abilities(engine: AsyncLLM) -> Abilities:
    """What an engine can do, as it was started."""
    refusal = ""
    if not current_platform.is_sleep_mode_available():
        refusal = f"the platform {current_platform.device_name} has no sleep mode: use level 0, which pauses and keeps all memory"
    elif not engine.vllm_config.model_config.enable_sleep_mode:
        refusal = "this worker was started without --enable-sleep-mode: add it to its engine arguments"
    return Abilities(refusal, discardable=engine.vllm_config.lora_config is None)


def typed(arguments: EngineArguments) -> dict[str, Any]:
    """model.json holds plain JSON; vLLM wants its own classes for nested configuration."""
    given = dict(arguments)
    for name, cls in (("kv_transfer_config", KVTransferConfig), ("kv_events_config", KVEventsConfig),
                      ("ec_transfer_config", ECTransferConfig)):
        if isinstance(given.get(name), dict):
            given[name] = cls(**given[name])
    return given


def first_line(exc: Exception) -> str:
    """What vLLM has to say, without its traceback."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(exc).__name__


def _load_logger(loads: EngineLoads) -> Any:
    class LoadLogger(StatLoggerBase):  # type: ignore[misc]  # vLLM's classes are Any here
        """Feeds EngineLoads; vLLM builds one per data-parallel rank."""

        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            del vllm_config
            self._load = loads.of(engine_index)

        def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:
            del mm_cache_stats, engine_idx
            if iteration_stats is None:
                self._load.record(scheduler_stats, 0)
                return
            begun, computed = len(iteration_stats.time_to_first_tokens_iter), iteration_stats.prompt_token_stats.computed
            self._load.record(scheduler_stats, iteration_stats.num_generation_tokens, begun, computed)

        def log_engine_initialized(self) -> None:
            """Nothing to say: the worker reports readiness itself."""

    return LoadLogger
