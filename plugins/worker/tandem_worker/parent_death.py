# SPDX-License-Identifier: Apache-2.0
"""Ties every engine process to the life of its parent.

vLLM calls `tie_engine_to_parent` in each process that it starts (entry point group `vllm.general_plugins`). Without it
a `kill -9` of tritonserver leaves `VLLM::EngineCore` behind, holding the GPU and deaf to SIGTERM.
"""

import ctypes
import os
import signal

from tandem_worker.stacks import answer_signal

WORKER_PID_VARIABLE = "TANDEM_STUB_PID"
"""Set by a worker to its own process id before its engine starts; engine processes inherit it."""
_PR_SET_PDEATHSIG = 1


def tie_engine_to_parent() -> None:
    """Asks the kernel for SIGKILL when the parent dies, and prints stacks when asked; in engine processes of a Tandem worker only.

    The kernel watches the thread that started the process: engines are started from the stub's main thread, which lives
    as long as the stub.
    """
    worker_pid = os.environ.get(WORKER_PID_VARIABLE)
    if worker_pid is None or int(worker_pid) == os.getpid():
        return
    answer_signal()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        os.kill(os.getpid(), signal.SIGKILL)  # the parent died before the kernel was asked
