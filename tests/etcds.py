# SPDX-License-Identifier: Apache-2.0
"""A real etcd for tests: on free ports, with its data in a folder of the test's own."""

import os
import shutil
import signal
import subprocess
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from servers import free_ports, wait_for

_START_TIMEOUT_S = 60.0
BINARY = shutil.which("etcd")


@dataclass
class Etcd:
    """One etcd, which can be killed, wiped and started again at the same address."""

    folder: Path
    port: int = field(default_factory=lambda: free_ports(2))
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        """For TANDEM_DISCOVERY."""
        return f"etcd://127.0.0.1:{self.port}/tandem-test"

    def start(self) -> None:
        """Returns when it answers."""
        assert BINARY is not None
        client, peer = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.port + 1}"
        with (self.folder / "etcd.log").open("ab") as log:
            self.process = subprocess.Popen(
                [BINARY, "--name=test", f"--data-dir={self.folder / 'data'}", "--unsafe-no-fsync", f"--listen-client-urls={client}",
                 f"--advertise-client-urls={client}", f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}",
                 f"--initial-cluster=test={peer}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )
        wait_for(self.answers, _START_TIMEOUT_S, f"etcd answers; see {self.folder / 'etcd.log'}")

    def answers(self) -> bool:
        """Whether it is healthy."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as response:
                return b"true" in response.read()
        except OSError:
            return False

    def kill(self, *, wipe: bool = False) -> None:
        """SIGKILL; `wipe` also removes its data."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(10)
            self.process = None
        if wipe:
            shutil.rmtree(self.folder / "data", ignore_errors=True)

    def pause(self) -> None:
        """It holds its connections and answers nothing. Returns when it stands still: a busy machine delivers the signal late."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def resume(self) -> None:
        """Ends `pause`."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)
