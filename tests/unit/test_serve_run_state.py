# SPDX-License-Identifier: Apache-2.0
"""What `serve` leaves for `stop` and `status`."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import msgspec
import psutil
import pytest

from tandem_cli.serve.layout import RunFolder, run_folder
from tandem_cli.serve.run_state import RUN_ID_VARIABLE, RunState, all_runs, processes_of, read_state, remove, write_state
from tandem_protocol.errors import ConfigError

OWN_PID = os.getpid()
STATE = RunState("run", OWN_PID, psutil.Process(OWN_PID).create_time(), 8000, 8001, 8002, ("vllm",), {"vllm": "http://127.0.0.1:8081"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The folder of a run, among no others."""
    monkeypatch.setenv("TANDEM_RUN_DIR", str(tmp_path))
    folder = run_folder(8000)
    folder.path.mkdir()
    return folder


def test_a_state_survives_the_disk(folder: RunFolder) -> None:
    """Every field of it."""
    write_state(folder, STATE)
    assert read_state(folder) == STATE


def test_no_file_means_no_run(folder: RunFolder) -> None:
    """Not an error."""
    assert read_state(folder) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff"])
def test_a_file_that_is_not_ours_is_refused(folder: RunFolder, content: bytes) -> None:
    """Nobody's processes are killed on a guess."""
    folder.state.write_bytes(content)
    with pytest.raises(ConfigError, match=r"state\.json can't be read .*: end its server by hand and remove"):
        read_state(folder)


def test_the_process_that_was_started_runs() -> None:
    """This very one."""
    assert STATE.is_running()


def test_a_later_process_with_the_same_id_does_not_count() -> None:
    """Ids are used again."""
    assert not msgspec.structs.replace(STATE, started=STATE.started - 100).is_running()


def test_a_process_that_ended_does_not_run() -> None:
    """Neither as a zombie nor afterwards."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        state = msgspec.structs.replace(STATE, pid=process.pid, started=psutil.Process(process.pid).create_time())
        assert state.is_running()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not state.is_running()
    assert not state.is_running()


def test_runs_are_listed_by_folder(folder: RunFolder) -> None:
    """The logs beside them are no runs."""
    folder.log.touch()
    run_folder(9000).path.mkdir()
    assert all_runs() == [folder, run_folder(9000)]


def test_the_log_outlives_the_folder(folder: RunFolder) -> None:
    """It is read when something went wrong."""
    write_state(folder, STATE)
    folder.log.touch()
    remove(folder)
    assert not folder.path.exists()
    assert folder.log.exists()


def test_processes_are_found_by_the_runs_id() -> None:
    """Whoever their parent is."""
    run_id = uuid.uuid4().hex
    command = [sys.executable, "-c", "print('up', flush=True); input()"]
    with subprocess.Popen(command, env={**os.environ, RUN_ID_VARIABLE: run_id}, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert [found.pid for found in processes_of(run_id)] == [process.pid]
        process.kill()
    assert processes_of(run_id) == []
