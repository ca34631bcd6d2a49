# SPDX-License-Identifier: Apache-2.0
"""The NIXL self-test: two processes, one transfer, checksums on both sides, and UCX's own word on how the bytes went."""

import json
import os
import re
import subprocess
import sys
import threading
from typing import Any

from tandem_cli.doctor.facts import NixlFacts
from tandem_cli.doctor.nixl_agent import MARK
from tandem_worker.environment import OVERRIDABLE

SIZE_BYTES = 64 << 20
TIMEOUT_S = 120.0
"""Two processes import torch and NIXL at the same time; on two busy cores that took 30 s."""
_ROW = re.compile(r"\|\s*\S+\.\.inf\s*\|\s*([^|]+?)\s*\|\s*([^|]+?)\s*\|")
_READ = "remote memory read by ucp_get"


def run_transfer(timeout_s: float = TIMEOUT_S, size_bytes: int = SIZE_BYTES) -> NixlFacts:
    """Moves bytes between two processes; never raises and ends within its time."""
    environment = {**OVERRIDABLE, **os.environ, "UCX_PROTO_INFO": "y"}
    command = [sys.executable, "-m", "tandem_cli.doctor.nixl_agent"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([*command, "owner", str(size_bytes)], env=environment, **pipes) as owner:
        watchdog = threading.Timer(timeout_s, owner.kill)  # a read of its output can't be bounded in another way
        watchdog.start()
        try:
            offer, said = _offer(owner)
            if not offer:
                return NixlFacts(error=_reason(said))
            reader = subprocess.run([*command, "reader", str(size_bytes)], env=environment, input=json.dumps(offer) + "\n", text=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s, check=False)
            return conclude(offer, reader.stdout, size_bytes)
        except subprocess.TimeoutExpired:
            return NixlFacts(error=f"no answer within {timeout_s:g} s")
        finally:
            watchdog.cancel()
            owner.kill()


def _offer(owner: "subprocess.Popen[str]") -> tuple[dict[str, Any], str]:
    """What the owner offers, or nothing; and what it printed before."""
    said = ""
    for line in owner.stdout or ():
        if line.startswith(MARK):
            return dict(json.loads(line.removeprefix(MARK))), said
        said += line
    return {}, said


def conclude(offer: dict[str, Any], said: str, size_bytes: int) -> NixlFacts:
    """From what both sides said to facts."""
    answer = next((line for line in said.splitlines() if line.startswith(MARK)), None)
    if answer is None:
        return NixlFacts(error=_reason(said))
    result = json.loads(answer.removeprefix(MARK))
    how, transport = transport_of(said)
    return NixlFacts(device=offer["device"], transport=transport, how=how, size_bytes=size_bytes, seconds=result["seconds"],
                     intact=result["checksum"] == offer["checksum"])


def transport_of(said: str) -> tuple[str, str]:
    """How and by what UCX read large remote memory, from the tables that it prints (UCX_PROTO_INFO); empty if it printed none."""
    inside, found = False, ("", "")
    for line in said.splitlines():
        if " by ucp_" in line:
            inside = _READ in line
        if inside and (row := _ROW.search(line)):
            found = (row[1], row[2])
    return found


def _reason(said: str) -> str:
    """The last line that isn't one of UCX's tables."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and "|" not in line and "+--" not in line]
    return lines[-1] if lines else "the process ended without a word"
