# SPDX-License-Identifier: Apache-2.0
"""`python -m tandem_planner` for tests: on a free port, ended at the end."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servers import free_ports, get_json, get_text


@dataclass(frozen=True)
class PlannerProcess:
    """A running planner."""

    process: "subprocess.Popen[bytes]"
    url: str
    log: Path

    def health(self) -> dict[str, Any]:
        """The body of `/health`; nothing while it isn't there."""
        try:
            return dict(get_json(f"{self.url}/health"))
        except OSError:
            return {}

    def metric(self, name: str) -> float:
        """A sample by name and labels; 0 if there is none."""
        lines = get_text(f"{self.url}/metrics").splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name} "))

    def stop(self) -> None:
        """SIGTERM, and a good end."""
        self.process.terminate()
        assert self.process.wait(30) == 0, self.log.read_text()[-3000:]


@contextmanager
def planner(folder: Path, *flags: str, **variables: str) -> Iterator[PlannerProcess]:
    """With its log and state in the folder; killed at the end if it is still there."""
    port, log = free_ports(1), folder / "planner.log"
    command = [sys.executable, "-m", "tandem_planner", "--admin-port", str(port), "--state", str(folder / "planner.state"), *flags]
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **variables})
    try:
        yield PlannerProcess(process, f"http://127.0.0.1:{port}", log)
    finally:
        process.kill()
        process.wait(10)
