# SPDX-License-Identifier: Apache-2.0
"""Lets NIXL's progress thread rest on hosts whose engines compute on the CPU.

NIXL's Python API fixes the pause of that thread at 0, so it polls without end. On a GPU host that is a core well spent; a
CPU engine computes on the very core that the thread lives on, and other processes starve (measured with two agents in
one process: 1.8 cores busy when idle, 0.05 with a pause of 1 ms). Between engines it helps only until the first transfer: docs/limits.md.

vLLM calls `rest_transfer_threads` in each process that it starts (entry point group `vllm.general_plugins`).
"""

import os
from typing import Any

CPU_ENGINE_VARIABLE = "TANDEM_CPU_ENGINE"
"""Set by a worker whose engine computes on the CPU and moves KV by NIXL; engine processes inherit it."""
PAUSE_US = 1000
"""The shortest pause that poll(2) can make."""


def rest_transfer_threads() -> None:
    """Gives every NIXL agent of this process a progress thread that pauses; does nothing elsewhere."""
    if not os.environ.get(CPU_ENGINE_VARIABLE):
        return
    os.environ.setdefault("UCX_RCACHE_MAX_UNRELEASED", "1024")  # vLLM sets it too, but only before NIXL's first import
    import nixl._api as api

    api.nixlBind.nixlAgentConfig = _resting(api.nixlBind.nixlAgentConfig)


def _resting(config: Any) -> Any:
    class RestingAgentConfig(config):  # type: ignore[misc]  # a class of the extension module
        """NIXL's configuration, with a pause in place of none."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, PAUSE_US if name == "pthrDelay" and value == 0 else value)

    return RestingAgentConfig
