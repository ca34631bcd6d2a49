# SPDX-License-Identifier: Apache-2.0
"""One side of the NIXL self-test, a process of its own: `python -m tandem_cli.doctor.nixl_agent owner|reader SIZE_BYTES`.

The owner fills its memory and prints how to reach it; the reader takes that from standard input, pulls the bytes as a decode worker
does, and prints what came. Lines of ours begin with MARK, since NIXL and UCX write to standard output, too.
"""

import base64
import json
import sys
import time
import zlib
from typing import Any

MARK = "TANDEM-NIXL "
ROUNDS = 4
"""The first makes the connection; the best of all is reported."""


def main(role: str, size_bytes: int) -> None:
    """Runs one side."""
    import torch
    from nixl._api import nixl_agent, nixl_agent_config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    agent = nixl_agent(f"doctor-{role}", nixl_agent_config(backends=["UCX"]))
    memory = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    if role == "owner":
        memory.random_(0, 256)
    registered = agent.register_memory([memory])
    if role == "owner":
        _own(agent, registered, memory, device)
    else:
        _read(agent, registered, memory)


def _own(agent: Any, registered: Any, memory: Any, device: str) -> None:
    """Offers the memory until standard input ends."""
    _say({"agent": _text(agent.get_agent_metadata()), "blocks": _text(agent.get_serialized_descs(registered.trim())),
          "checksum": _checksum(memory), "device": device})
    sys.stdin.read()


def _read(agent: Any, registered: Any, memory: Any) -> None:
    """Pulls some times and reports the fastest."""
    offer = json.loads(sys.stdin.readline())
    owner = agent.add_remote_agent(base64.b64decode(offer["agent"]))
    remote = agent.deserialize_descs(base64.b64decode(offer["blocks"]))
    seconds = min(_pull(agent, registered.trim(), remote, owner) for _ in range(ROUNDS))
    _say({"seconds": seconds, "checksum": _checksum(memory)})


def _pull(agent: Any, local: Any, remote: Any, owner: str) -> float:
    handle = agent.initialize_xfer("READ", local, remote, owner)
    started = time.perf_counter()
    state = agent.transfer(handle)
    while state == "PROC":  # whoever started us bounds this
        time.sleep(0)
        state = agent.check_xfer_state(handle)
    elapsed = time.perf_counter() - started
    agent.release_xfer_handle(handle)
    if state != "DONE":
        raise RuntimeError(f"the transfer ended as {state}")
    return elapsed


def _checksum(memory: Any) -> int:
    return zlib.crc32(memory.cpu().numpy())


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _say(what: dict[str, Any]) -> None:
    sys.stdout.write(f"{MARK}{json.dumps(what)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
