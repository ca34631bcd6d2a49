# SPDX-License-Identifier: Apache-2.0
"""NIXL's progress thread rests in CPU engines, and only there."""

import subprocess
import sys

PROGRAM = """
import resource, time
from tandem_worker.transfer_threads import rest_transfer_threads
rest_transfer_threads()
import nixl._api as api
config = api.nixlBind.nixlAgentConfig()
config.pthrDelay = 0
print(config.pthrDelay)
"""


def _delay(**environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip().splitlines()[-1]


def test_a_cpu_engine_gets_a_pause() -> None:
    """NIXL's Python API asks for none, the real configuration object holds 1 ms."""
    assert _delay(TANDEM_CPU_ENGINE="1") == "1000"


def test_elsewhere_nixl_is_left_alone() -> None:
    """On a GPU host the thread may spin."""
    assert _delay() == "0"
