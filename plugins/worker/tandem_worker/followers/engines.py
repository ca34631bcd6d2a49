# SPDX-License-Identifier: Apache-2.0
"""Engine ranks without a front end, as `vllm serve --headless` starts them. Edge module: imports vLLM."""

from typing import Any

from vllm import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.utils.network_utils import get_tcp_uri
from vllm.v1.engine.utils import CoreEngineProcManager
from vllm.v1.executor import Executor

from tandem_protocol.errors import ConfigError
from tandem_worker.arguments import EngineArguments
from tandem_worker.engine import first_line, typed

_STOP_TIMEOUT_S = 3.0
"""As for a worker's own: an engine has nothing to save."""


class HeadlessEngines:
    """The processes of the ranks here; they ask the leader at `data_parallel_address` for their sockets. Resource handling: `stop`."""

    def __init__(self, arguments: EngineArguments) -> None:
        """Starts them, on the main thread: the kernel ends them with it. Raises ConfigError for arguments that vLLM refuses."""
        try:
            config = AsyncEngineArgs(**typed(arguments)).create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER, headless=True)
        except (ValueError, TypeError, OSError, RuntimeError, AssertionError) as exc:
            raise ConfigError(f"vLLM refuses the engine arguments: {first_line(exc)}") from exc
        parallel = config.parallel_config
        self.config: Any = config
        self._manager = CoreEngineProcManager(
            local_engine_count=parallel.data_parallel_size_local, start_index=parallel.data_parallel_rank, local_start_index=0,
            vllm_config=config, local_client=False, log_stats=True, executor_class=Executor.get_class(config),
            handshake_address=get_tcp_uri(parallel.data_parallel_master_ip, parallel.data_parallel_rpc_port),
        )

    def ended(self) -> str:
        """Which of them ended, and how; empty while all live."""
        return ", ".join(f"{name} with {code}" for name, code in self._manager.finished_procs().items())

    def stop(self) -> None:
        """Ends them within a few seconds."""
        self._manager.shutdown(timeout=_STOP_TIMEOUT_S)
