# SPDX-License-Identifier: Apache-2.0
"""Aggregated engines that register in a discovery, for benchmarks of the router. On a CPU each has its share of the cores."""

import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.errors import BenchmarkError
from benchmarks.targets import HOST, STOP_TIMEOUT_S, command_flags, tandem_command
from tandem_cli.serve.layout import run_folder
from tandem_cli.serve.run_state import read_state

START_TIMEOUT_S = 600.0
_FIRST_PORTS = range(18100, 28000, 100)
_OFFSETS = {"http-port": 0, "grpc-port": 1, "metrics-port": 2, "admin-port": 10, "kv-event-port": 20}
"""From the first port; an engine's admin and event ports are offset by its index, below 10."""
MAX_WORKERS = 10


@contextmanager
def engine_workers(store: str, model: str, workers: int, arguments: Mapping[str, object], folder: Path) -> Iterator[tuple[str, ...]]:
    """One server with so many aggregated engines, registered at the discovery URL; yields their admin URLs. Raises BenchmarkError.

    Its run lives in the folder, so that a `tandem stop` elsewhere doesn't end it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ["TANDEM_RUN_DIR"] = str(folder.absolute())
    first, log = _free_range(), folder / "launcher.log"
    ports = [f"--{name}={first + offset}" for name, offset in _OFFSETS.items()]
    serve = ["serve", "--detach", "--mode=agg", f"--workers={workers}", "--routers=0", f"--discovery={store}",
             f"--grpc-url={HOST}:{first + _OFFSETS['grpc-port']}", f"--model={model}", f"--start-timeout={START_TIMEOUT_S:.0f}"]
    try:
        tandem_command([*serve, *ports, *command_flags(arguments)], log, START_TIMEOUT_S + STOP_TIMEOUT_S)
        state = read_state(run_folder(first))
        if state is None:
            raise BenchmarkError(f"the server of the engines left no state, see {log}")
        yield tuple(state.admin_urls.values())
    finally:
        tandem_command(["stop", f"--http-port={first}", "--drain-timeout-s=1"], log, STOP_TIMEOUT_S, check=False)


def _free_range() -> int:
    """The first port of a range of which all that a server may use are free; KV events must lie below the ephemeral ports."""
    for first in _FIRST_PORTS:
        wanted = [first + offset + index for offset in _OFFSETS.values() for index in range(MAX_WORKERS if offset >= MAX_WORKERS else 1)]
        with ExitStack() as stack:
            try:
                for port in (*wanted, *(port + 1000 for port in wanted)):  # replay sockets of the events lie 1000 higher
                    stack.enter_context(socket.socket()).bind((HOST, port))
            except OSError:
                continue
            return first
    raise BenchmarkError("found no free range of ports for the engines")
