# SPDX-License-Identifier: Apache-2.0
"""A real worker is held to be dumped; the test is the host's agent. Without sleep mode (CPU) it sleeps at level 0."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from calls import Call, connect, text_of
from servers import START_TIMEOUT_S, Server, free_ports, get_json, processes_with, tandem, wait_for

SUCCESS = '{"success": true}'
HELD_S = 240.0
ENDED_S = 60.0
GREEDY = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}


def variables(folder: Path) -> dict[str, str]:
    """The files of one checkpoint."""
    return {
        "DYN_CHECKPOINT_SIGNAL_FILE": f"{folder}/signal", "DYN_READY_FOR_CHECKPOINT_FILE": f"{folder}/ready",
        "DYN_CHECKPOINT_STORAGE_TYPE": "pvc", "DYN_CHECKPOINT_LOCATION": f"{folder}/location",
        "DYN_RESTORE_MARKER_FILE": f"{folder}/restored",
    }


class Launch:
    """A `tandem serve --detach` that waits, as its server does, for the agent."""

    def __init__(self, folder: Path, model: Path, *, held: bool = True) -> None:
        self.folder = folder
        first = free_ports(20)
        self.server = Server(folder / "run", first, first + 1, first + 2)
        ports = ["--http-port", str(first), "--grpc-port", str(first + 1), "--metrics-port", str(first + 2), "--admin-port", str(first + 3),
                 "--kv-event-port", str(first + 8)]
        command = [sys.executable, "-m", "tandem_cli.main", "serve", "--detach", "--mode", "agg", "--routers", "0", "--model", str(model),
                   "--max-model-len", "512", *ports]
        environment = {**os.environ, **variables(folder), "TANDEM_RUN_DIR": str(folder / "run")}
        self._output = (folder / "launcher.log").open("wb")
        self.process = subprocess.Popen(command, env=environment, stdout=self._output, stderr=subprocess.STDOUT)
        if held:
            wait_for(lambda: (folder / "ready").exists() or self.process.poll() is not None, HELD_S, "a held worker")
            assert (folder / "ready").read_text() == "ready", self.said

    @property
    def said(self) -> str:
        """The launcher's words."""
        return (self.folder / "launcher.log").read_text()

    def end(self) -> int:
        """The launcher's exit code."""
        return self.process.wait(ENDED_S)

    def close(self) -> None:
        """Ends what is left."""
        self.process.terminate()
        self.process.wait(ENDED_S)
        tandem(self.folder / "run", "stop", "--http-port", str(self.server.http_port), "--drain-timeout-s", "1")
        self._output.close()


@contextmanager
def launched(folder: Path, model: Path) -> Iterator[Launch]:
    """Held, and ended with the context."""
    launch = Launch(folder, model)
    try:
        yield launch
    finally:
        launch.close()


@pytest.mark.slow
def test_a_held_worker_serves_after_its_restore(tmp_path: Path, tiny_model: Path) -> None:
    """Nobody can reach it before; then it answers, and is known in discovery."""
    with launched(tmp_path, tiny_model) as launch:
        server = launch.server
        records = tmp_path / "run" / str(server.http_port) / "discovery"
        assert not records.exists() or not list(records.iterdir())
        with pytest.raises(OSError, match="refused"):
            get_json(f"{server.http_url}/v2/health/ready")
        (tmp_path / "restored").touch()
        assert launch.process.wait(START_TIMEOUT_S) == 0, launch.said
        assert server.health("vllm")["status"] == "ready"
        assert server.health("vllm")["registration"] == "registered"

        async def answer() -> str:
            async with connect(server.grpc_url) as client:
                return await text_of(client, Call("vllm", "Hello", GREEDY))

        assert asyncio.run(answer())


@pytest.mark.slow
def test_a_dumped_worker_ends_with_success_and_is_not_made_twice(tmp_path: Path, tiny_model: Path) -> None:
    """The launcher returns 0 and nothing is left; the next one sees the checkpoint and starts nothing."""
    with launched(tmp_path, tiny_model) as launch:
        run_id = f"TANDEM_RUN_ID={launch.server.state['run_id']}"
        (tmp_path / "location").mkdir()
        (tmp_path / "location" / "checkpoint.done").write_text(SUCCESS)
        (tmp_path / "signal").write_text(SUCCESS)
        assert launch.end() == 0, launch.said
        assert "the checkpoint was taken" in launch.said
        assert processes_with(run_id) == []
    done = tandem(tmp_path / "run", "serve", "--mode", "agg", "--routers", "0", "--model", str(tiny_model), timeout_s=ENDED_S,
                  **variables(tmp_path))
    assert (done.returncode, done.stdout.strip()) == (0, f"a checkpoint exists in {tmp_path}/location: nothing to do")


@pytest.mark.slow
def test_a_dump_that_fails_ends_the_server_with_its_reason(tmp_path: Path, tiny_model: Path) -> None:
    """Exit code 1 and the agent's sentence; nothing is left."""
    with launched(tmp_path, tiny_model) as launch:
        run_id = f"TANDEM_RUN_ID={launch.server.state['run_id']}"
        (tmp_path / "signal").write_text('{"success": false, "error": "no space left"}')
        assert launch.end() == 1
        assert "the checkpoint failed: no space left" in launch.said
        wait_for(lambda: processes_with(run_id) == [], ENDED_S, "no process left")


@pytest.mark.parametrize(("arguments", "changes", "message"), [
    (["--mode", "agg", "--routers", "0"], {"DYN_RESTORE_MARKER_FILE": ""}, "also needs DYN_RESTORE_MARKER_FILE"),
    (["--mode", "agg", "--routers", "0"], {"DYN_CHECKPOINT_STORAGE_TYPE": "s3"}, "use pvc"),
    ([], {}, "a checkpoint is of one worker alone"),
])
def test_serve_refuses_before_it_starts(tmp_path: Path, arguments: list[str], changes: dict[str, str], message: str) -> None:
    """One sentence, exit code 2."""
    done = tandem(tmp_path, "serve", *arguments, timeout_s=ENDED_S, **{**variables(tmp_path), **changes})
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
    assert message in done.stderr
