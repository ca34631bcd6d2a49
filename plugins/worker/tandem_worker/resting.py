# SPDX-License-Identifier: Apache-2.0
"""Lets the waiting processes of a CPU engine rest, since they wait on the very cores that the engine computes on.

Two things spin by default, each a core well spent on a GPU host:

- vLLM's scheduler and its worker process wait for each other in a loop of `sched_yield` that goes idle only after a second
  without messages. With three engines on two cores the loops took more time than the model (perf: 9 of 10 samples).
- NIXL's Python API fixes the pause of its progress thread at 0 (two agents in one process: 1.8 cores busy when idle,
  0.05 with a pause of 1 ms).

vLLM calls `rest_in_cpu_engines` in each process that it starts (entry point group `vllm.general_plugins`).
"""

import os
import time
from typing import Any

CPU_ENGINE_VARIABLE = "TANDEM_CPU_ENGINE"
"""Set by a worker whose engine computes on the CPU; engine processes inherit it. `nixl` where it also moves KV by NIXL."""
PAUSE_US = 1000
"""The shortest pause that poll(2) can make."""
_BUSY_S = 1.0
_BUSY_CHECK_MS = 1
_IDLE_CHECK_MS = 100
"""How long a lost notification may delay a message: 1 ms while messages come, 100 ms for the first one after a pause."""


def rest_in_cpu_engines() -> None:
    """Ends both kinds of spinning in this process; does nothing outside CPU engines."""
    kind = os.environ.get(CPU_ENGINE_VARIABLE)
    if kind:
        _rest_between_messages()
    if kind == "nixl":
        _rest_between_transfers()


def _rest_between_messages() -> None:
    """vLLM's shared-memory queue sleeps on its notification socket at once instead of spinning for a second first.

    Not without a bound, though: a writer that notifies twice in quick succession loses the second notification (its socket
    holds one), which only the spinning made harmless.
    """
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    if getattr(SpinCondition, "rests", False):
        return
    initialise, wait = SpinCondition.__init__, SpinCondition.wait

    def resting(self: Any, is_reader: bool, context: Any, notify_address: str, busy_loop_s: float = 0) -> None:
        initialise(self, is_reader, context, notify_address, busy_loop_s)

    def wait_bounded(self: Any, timeout_ms: int | None = None) -> None:
        bound_ms = _BUSY_CHECK_MS if time.monotonic() - self.last_read < _BUSY_S else _IDLE_CHECK_MS
        wait(self, bound_ms if timeout_ms is None else min(timeout_ms, bound_ms))

    SpinCondition.__init__ = resting
    SpinCondition.wait = wait_bounded
    SpinCondition.rests = True


def _rest_between_transfers() -> None:
    """Gives every NIXL agent of this process a progress thread that pauses."""
    os.environ.setdefault("UCX_RCACHE_MAX_UNRELEASED", "1024")  # vLLM sets it too, but only before NIXL's first import
    import nixl._api as api

    if not getattr(api.nixlBind.nixlAgentConfig, "rests", False):
        api.nixlBind.nixlAgentConfig = _resting(api.nixlBind.nixlAgentConfig)


def _resting(config: Any) -> Any:
    class RestingAgentConfig(config):  # type: ignore[misc]  # a class of the extension module
        """NIXL's configuration, with a pause in place of none."""

        rests = True

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, PAUSE_US if name == "pthrDelay" and value == 0 else value)

    return RestingAgentConfig
