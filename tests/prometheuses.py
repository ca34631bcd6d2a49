# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus for tests: on a free port, with its data in a folder of the test's own, scraping what it is told."""

import json
import shutil
import signal
import subprocess
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from servers import free_ports, get_json, get_text, wait_for

_START_TIMEOUT_S = 60.0
BINARY, TOOL = shutil.which("prometheus"), shutil.which("promtool")


@dataclass
class RealPrometheus:
    """One server, which can be killed and started again at the same address, and whose targets may change."""

    folder: Path
    targets: tuple[str, ...] = ()
    """host:port of what has `/metrics`."""
    scrape_s: float = 0.5
    port: int = field(default_factory=lambda: free_ports(1))
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        """For PROMETHEUS_ENDPOINT."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def _targets_file(self) -> Path:
        return self.folder / "targets.json"

    def start(self) -> None:
        """Returns when it answers."""
        assert BINARY is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "prometheus.yml"
        config.write_text(json.dumps({  # YAML that is JSON
            "global": {"scrape_interval": f"{round(self.scrape_s * 1000)}ms", "scrape_timeout": f"{round(self.scrape_s * 1000)}ms"},
            "scrape_configs": [{"job_name": "tandem", "file_sd_configs": [{"files": [str(self._targets_file)], "refresh_interval": "1s"}]}],
        }))
        self.scrape(*self.targets)
        with (self.folder / "prometheus.log").open("ab") as log:
            self.process = subprocess.Popen(
                [BINARY, f"--config.file={config}", f"--storage.tsdb.path={self.folder / 'data'}",
                 f"--web.listen-address=127.0.0.1:{self.port}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )
        wait_for(self.answers, _START_TIMEOUT_S, f"Prometheus answers; see {self.folder / 'prometheus.log'}")

    def scrape(self, *targets: str) -> None:
        """What it scrapes from now on; it sees the change at once."""
        self.targets = targets
        partial = self._targets_file.with_suffix(".partial")
        partial.write_text(json.dumps([{"targets": list(targets)}]))
        partial.replace(self._targets_file)

    def answers(self) -> bool:
        """Whether it is ready."""
        try:
            return "Ready" in get_text(f"{self.url}/-/ready")
        except OSError:
            return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        """An instant query."""
        return list(get_json(f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}")["data"]["result"])

    def kill(self) -> None:
        """SIGKILL; repeating it does nothing."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(10)
            self.process = None
