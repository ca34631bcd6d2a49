# SPDX-License-Identifier: Apache-2.0
"""How `tandem serve` ends when nobody told it to."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tandem_cli.serve import command_serve
from tandem_cli.serve.layout import RunFolder, run_folder
from tandem_cli.serve.run_state import RunState
from tandem_protocol.errors import EngineError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """Of a run with a log."""
    monkeypatch.setenv("TANDEM_RUN_DIR", str(tmp_path))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # this process keeps its own
    folder = run_folder(8000)
    folder.log.parent.mkdir(parents=True, exist_ok=True)
    folder.log.write_text("engine.died: in-flight requests get UNAVAILABLE and the server exits\n")
    return folder


def state_of(process: "subprocess.Popen[bytes]") -> RunState:
    """A run whose tritonserver is this process."""
    return RunState("run", process.pid, psutil.Process(process.pid).create_time(), 8000, 8001, 8002, ("vllm",), {})


@pytest.mark.parametrize("code", ["pass", "raise SystemExit(1)", "import os; os.abort()"])
def test_a_server_that_ends_by_itself_is_a_failure(folder: RunFolder, code: str) -> None:
    """With whatever code: tritonserver 2.51 exits with 0 also when its engine died. The end of the log says why."""
    process = subprocess.Popen([sys.executable, "-c", f"input(); {code}"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    state = state_of(process)
    process.communicate(b"\n", timeout=30)
    with pytest.raises(EngineError, match=r"tritonserver ended by itself(?s:.*)engine.died"):
        command_serve._follow(state, folder)
