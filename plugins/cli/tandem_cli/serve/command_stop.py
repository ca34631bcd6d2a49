# SPDX-License-Identifier: Apache-2.0
"""Stops what `tandem serve` started: drain, SIGTERM, and SIGKILL for what is left, each within a bound."""

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil

from tandem_cli.serve.layout import RunFolder, run_folder
from tandem_cli.serve.run_state import RunState, all_runs, processes_of, read_state, remove
from tandem_cli.serve.tritonserver import EXIT_TIMEOUT_S
from tandem_protocol.errors import EngineError
from tandem_worker.shared_memory import mapped_files, remove_unmapped

DRAIN_TIMEOUT_S = 20.0
_ANSWER_MARGIN_S = 15.0
_EXIT_MARGIN_S = 15.0
_LINGER_S = 8.0
"""How long guards may take to clean up before `stop` does it for them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `stop`."""
    parser.add_argument("--http-port", type=int, help="stop only the server on this port (default: all of yours)")
    parser.add_argument("--drain-timeout-s", type=float, default=DRAIN_TIMEOUT_S,
                        help=f"how long requests in flight may finish (default {DRAIN_TIMEOUT_S:g})")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs `tandem stop`; 0 also when nothing ran."""
    folders = all_runs() if args.http_port is None else [run_folder(args.http_port)]
    stopped = [int(folder.path.name) for folder in folders if stop_run(folder, args.drain_timeout_s)]
    if args.json:
        print(json.dumps({"stopped": stopped}))
    else:
        print(f"stopped the server on port {', '.join(map(str, stopped))}" if stopped else "nothing was running")
    return 0


def stop_run(folder: RunFolder, drain_timeout_s: float = 0.0) -> bool:
    """Stops one run and removes its folder; False if there was none. Raises EngineError if something survives."""
    state = read_state(folder)
    if state is None:
        remove(folder)
        return False
    running = state.is_running()
    if running and drain_timeout_s > 0:
        _drain(state, drain_timeout_s)
    shm_files = mapped_files(process.pid for process in processes_of(state.run_id))
    if running:
        _terminate(state)
    _end_stragglers(state.run_id, shm_files)
    remove(folder)
    return running


def _drain(state: RunState, timeout_s: float) -> None:
    """Prefill first: what it has begun still needs its decode worker."""
    prefills = [url for name, url in state.admin_urls.items() if name.startswith("prefill")]
    others = [url for name, url in state.admin_urls.items() if not name.startswith("prefill")]
    for group in (prefills, others):
        if group:
            with ThreadPoolExecutor(len(group)) as pool:
                list(pool.map(lambda url: _drain_worker(url, timeout_s), group))


def _drain_worker(url: str, timeout_s: float) -> None:
    request = urllib.request.Request(f"{url}/engine/drain", data=json.dumps({"timeout_s": timeout_s}).encode(), method="POST")  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=timeout_s + _ANSWER_MARGIN_S) as response:  # noqa: S310 - a worker's own URL
            aborted = json.loads(response.read())["aborted"]
    except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError):
        return  # no admin server, or already gone: SIGTERM drains as well
    if aborted:
        print(f"{aborted} requests were aborted after {timeout_s:g} s", file=sys.stderr)


def _terminate(state: RunState) -> None:
    """SIGTERM, and SIGKILL after Triton's own exit timeout and a margin."""
    with suppress(psutil.NoSuchProcess):
        server = psutil.Process(state.pid)
        server.terminate()
        try:
            server.wait(EXIT_TIMEOUT_S + _EXIT_MARGIN_S)
        except psutil.TimeoutExpired:
            server.kill()


def _end_stragglers(run_id: str, shm_files: Iterable[Path]) -> None:
    """Gives the guards time to clean up, then ends whatever carries this run's id."""
    deadline = time.monotonic() + _LINGER_S
    while (left := processes_of(run_id)) and time.monotonic() < deadline:
        psutil.wait_procs(left, timeout=0.5)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=_LINGER_S)
    remove_unmapped(shm_files)
    survivors = processes_of(run_id)
    if survivors:
        raise EngineError(f"processes {', '.join(str(process.pid) for process in survivors)} can't be ended: look at them with ps")
