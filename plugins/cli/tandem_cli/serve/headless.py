# SPDX-License-Identifier: Apache-2.0
"""`tandem serve --headless`: ranks for a leader on another host, without a tritonserver; `stop` ends them like a server."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import psutil

from tandem_cli.serve.fleet import Mode, WorkerPlan
from tandem_cli.serve.layout import RunFolder
from tandem_cli.serve.options import ServeOptions
from tandem_cli.serve.readiness import tail
from tandem_cli.serve.run_state import RunState, write_state
from tandem_protocol.errors import ConfigError, EngineError

FOLLOWER = "follower"
_POLL_S = 0.5
_HTTP_TIMEOUT_S = 2.0


def follower_options(options: ServeOptions) -> ServeOptions:
    """Those of one worker without routers. Raises ConfigError where they would be several."""
    counts = replace(options.counts, routers=0)
    only_one = options.mode is Mode.AGG and counts.aggregated == 1 if options.only is None else counts.prefill == counts.decode == 1
    if not only_one:
        raise ConfigError("--headless runs ranks of one worker: say of which with --mode agg, --is-prefill-worker or --is-decode-worker")
    return replace(options, counts=counts)


def start_follower(worker: WorkerPlan, admin_url: str, options: ServeOptions, folder: RunFolder, environment: dict[str, str],
                   run_id: str) -> "tuple[RunState, subprocess.Popen[bytes]]":
    """Starts the process; `environment` is all that it gets."""
    _write(folder.path / FOLLOWER, worker)
    with folder.log.open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "tandem_worker.followers", str(folder.path / FOLLOWER)], env=environment,
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    state = RunState(run_id, process.pid, psutil.Process(process.pid).create_time(), options.http_port, options.grpc_port,
                     options.metrics_port, models=(), admin_urls={FOLLOWER: admin_url})
    write_state(folder, state)
    print(f"starting ranks of {options.model} (log: {folder.log})", file=sys.stderr, flush=True)
    return state, process


def _write(folder: Path, worker: WorkerPlan) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {"role": worker.role.value, "worker_index": str(worker.index), "gpus": worker.gpus, "cpu_cores": worker.cores}
    (folder / "model.json").write_text(json.dumps(worker.arguments, indent=2) + "\n")
    (folder / "parameters.json").write_text(json.dumps({name: value for name, value in parameters.items() if value}) + "\n")


def wait_until_tied(state: RunState, log: Path, timeout_s: float) -> None:
    """Returns when its leader holds it. Raises EngineError when it ends before, or takes longer."""
    deadline = time.monotonic() + timeout_s
    while not _follows(state.admin_urls[FOLLOWER]):
        if not state.is_running():
            raise EngineError(f"the follower ended while starting; the end of {log}:\n{tail(log.read_text(errors='replace'))}")
        if time.monotonic() > deadline:
            raise EngineError(f"no leader after {timeout_s:g} s: see {log}, or give more time with --start-timeout")
        time.sleep(_POLL_S)


def _follows(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=_HTTP_TIMEOUT_S) as response:  # noqa: S310 - this host's own admin server
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
