# SPDX-License-Identifier: Apache-2.0
"""The waiting processes of CPU engines rest, and only those."""

import subprocess
import sys

import pytest

NIXL = """
from tandem_worker.resting import rest_in_cpu_engines
rest_in_cpu_engines(); rest_in_cpu_engines()
import nixl._api as api
config = api.nixlBind.nixlAgentConfig()
config.pthrDelay = 0
print(config.pthrDelay)
"""
QUEUE = """
import locale; locale.setlocale(locale.LC_ALL, "C.UTF-8")
import zmq
from tandem_worker.resting import rest_in_cpu_engines
rest_in_cpu_engines(); rest_in_cpu_engines()
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
condition = SpinCondition(True, zmq.Context(), "inproc://x")
condition.wait()  # nobody notifies: this must end all the same
print(condition.busy_loop_s)
"""


def _run(program: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(("engine", "pause_us"), [({"TANDEM_CPU_ENGINE": "nixl"}, "1000"), ({"TANDEM_CPU_ENGINE": "1"}, "0"), ({}, "0")])
def test_nixl_pauses_in_cpu_engines_that_use_it(engine: dict[str, str], pause_us: str) -> None:
    """NIXL's Python API asks for no pause, the real configuration object holds 1 ms."""
    assert _run(NIXL, **engine) == pause_us


@pytest.mark.parametrize(("engine", "spins_s"), [({"TANDEM_CPU_ENGINE": "1"}, "0"), ({}, "1")])
def test_vllms_queue_sleeps_in_cpu_engines(engine: dict[str, str], spins_s: str) -> None:
    """On a GPU host it may spin for its second. A lost notification holds nobody up."""
    assert _run(QUEUE, **engine) == spins_s
