# SPDX-License-Identifier: Apache-2.0
"""`tandem serve --headless`: of which worker, what its process is given, and how its start ends. Without an engine."""

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tandem_cli.serve.fleet import WorkerPlan
from tandem_cli.serve.headless import follower_options, start_follower, wait_until_tied
from tandem_cli.serve.layout import RunFolder
from tandem_cli.serve.options import ServeOptions, add_arguments, parse_options
from tandem_cli.serve.run_state import RunState, read_state
from tandem_protocol.errors import ConfigError, EngineError
from tandem_protocol.roles import Role


def options(*arguments: str) -> ServeOptions:
    """As parsed."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    parsed, rest = parser.parse_known_args(["--model", "m", *arguments])
    parsed.passthrough = rest
    return parse_options(parsed)


@pytest.mark.parametrize("arguments", [["--mode", "agg"], ["--is-prefill-worker"], ["--is-decode-worker"]])
def test_ranks_of_one_worker_and_no_router(arguments: list[str]) -> None:
    """Whatever its role."""
    assert follower_options(options(*arguments)).counts.routers == 0


@pytest.mark.parametrize("arguments", [[], ["--mode", "disagg"], ["--mode", "agg", "--workers", "2"],
                                       ["--is-prefill-worker", "--prefill", "2"]])
def test_which_worker_must_be_said(arguments: list[str]) -> None:
    """A leader has one engine."""
    with pytest.raises(ConfigError, match="--headless runs ranks of one worker: say of which with --mode agg"):
        follower_options(options(*arguments))


def state(pid: int, admin_url: str) -> RunState:
    """Of a follower."""
    return RunState("id", pid, 0.0, 1, 2, 3, (), {"follower": admin_url})


@pytest.fixture
def admin() -> Iterator[str]:
    """A follower's admin server that says that its leader holds it."""

    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Not in the tests' output."""

    server = HTTPServer(("127.0.0.1", 0), Healthy)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_it_is_ready_when_its_leader_holds_it(admin: str, tmp_path: Path) -> None:
    """As its own admin server says."""
    wait_until_tied(state(0, admin), tmp_path / "log", 5.0)


def test_a_follower_that_ends_while_it_starts(tmp_path: Path) -> None:
    """The end of its log says why."""
    (tmp_path / "log").write_text("tandem follower: the leader refuses this follower\n")
    with pytest.raises(EngineError, match=r"ended while starting; .*\ntandem follower: the leader refuses this follower"):
        wait_until_tied(state(0, "http://127.0.0.1:9"), tmp_path / "log", 5.0)


def test_its_process_gets_arguments_and_place(tmp_path: Path) -> None:
    """In files; wrong ones end it with 2, and the run can be found to be stopped."""
    folder = RunFolder(tmp_path / "8000")
    folder.path.mkdir()
    plan = WorkerPlan("vllm", Role.AGGREGATED, 0, cores="0", arguments={"headless": True, "data_parallel_size": 2})
    written, process = start_follower(plan, "http://127.0.0.1:9", options("--mode", "agg"), folder, dict(os.environ), "run-1")
    assert process.wait(60) == 2
    assert "tandem follower: headless needs data_parallel_size_local and data_parallel_start_rank" in folder.log.read_text()
    assert read_state(folder) == written
    assert written.run_id == "run-1"
    assert json.loads((folder.path / "follower" / "parameters.json").read_text()) == {"role": "aggregated", "worker_index": "0",
                                                                                       "cpu_cores": "0"}


def test_a_worker_with_endpoints_is_no_follower(tmp_path: Path) -> None:
    """It would take rank 0 from its leader."""
    (tmp_path / "model.json").write_text("{}")
    (tmp_path / "parameters.json").write_text("{}")
    done = subprocess.run([sys.executable, "-m", "tandem_worker.followers", str(tmp_path)], capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 2
    assert "has no headless: a worker with endpoints is a Triton model" in done.stderr
