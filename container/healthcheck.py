# SPDX-License-Identifier: Apache-2.0
"""The image's HEALTHCHECK: has what this container runs started, and is it alive? Standard library only, so that it takes milliseconds.

For a worker and a router: tritonserver is ready (all models loaded), and each admin server answers `/live`; a worker that drains or sleeps
on purpose stays healthy. For the other roles: their own `/live`. Exits with 0 or 1, and says what is missing.
"""

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ANSWER_S = 3.0
_CONSOLIDATOR_PORT, _PLANNER_PORT = 8481, 8078
_ANY, _LOOPBACK = "0.0.0.0", "127.0.0.1"  # noqa: S104 - what servers bind is asked over loopback


def main() -> int:
    """Asks everything; 0 if all answer."""
    try:
        role = container_role(Path("/proc"))
        urls = wanted(role, os.environ, newest_state(Path(os.environ.get("TANDEM_RUN_DIR", "/tmp/tandem/run"))))  # noqa: S108 - the image's
    except LookupError as exc:
        sys.stdout.write(f"{exc}\n")
        return 1
    silent = [url for url in urls if not answers(url)]
    sys.stdout.write(f"no answer from {', '.join(silent)}\n" if silent else f"{role}: all {len(urls)} answer\n")
    return 1 if silent else 0


def container_role(proc: Path) -> str:
    """The role that the entry point was given: it is in the environment of what PID 1 started. Raises LookupError."""
    children = (proc / "1" / "task" / "1" / "children").read_text().split()
    for child in children:
        for variable in (proc / child / "environ").read_bytes().split(b"\0"):
            name, _, value = variable.partition(b"=")
            if name == b"TANDEM_CONTAINER_ROLE":
                return value.decode()
    raise LookupError("no role of Tandem runs here")


def newest_state(runs: Path) -> Mapping[str, Any] | None:
    """What `tandem serve` wrote down of its run; None while it has not started tritonserver."""
    states = sorted(runs.glob("*/state.json"), key=lambda path: path.stat().st_mtime)
    return dict(json.loads(states[-1].read_bytes())) if states else None


def wanted(role: str, environment: Mapping[str, str], state: Mapping[str, Any] | None) -> list[str]:
    """The URLs that must answer. Raises LookupError when there is nothing to ask yet."""
    if role in {"consolidator", "planner"}:
        name = f"TANDEM_{role.upper()}"
        index = int(environment.get(f"{name}_WORKER_INDEX") or 0)
        port = int(environment.get(f"{name}_ADMIN_PORT") or (_PLANNER_PORT if role == "planner" else _CONSOLIDATOR_PORT))
        host = _reachable(environment.get(f"{name}_ADMIN_HOST") or _LOOPBACK)
        return [f"http://{host}:{port + index}/live"] if port else []  # 0 is any port: nobody outside of the process knows it
    if state is None:
        raise LookupError("tritonserver has not been started yet")
    admin = [url for url in (*state["admin_urls"].values(), *state["router_urls"]) if not url.endswith(":-1")]
    return [f"http://{_LOOPBACK}:{state['http_port']}/v2/health/ready", *(f"{_reachable(url)}/live" for url in admin)]


def _reachable(address: str) -> str:
    return address.replace(_ANY, _LOOPBACK)


def answers(url: str) -> bool:
    """Whether a URL answers with success in time."""
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_S) as response:  # noqa: S310 - always http to this container
            return bool(response.status < 400)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


if __name__ == "__main__":
    sys.exit(main())
