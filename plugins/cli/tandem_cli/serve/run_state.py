# SPDX-License-Identifier: Apache-2.0
"""What `serve` leaves for `stop` and `status`: one small file per running server, and how to find all its processes.

Every process of a run inherits TANDEM_RUN_ID, so that also those are found whose parents died.
"""

import shutil
from pathlib import Path

import msgspec
import psutil

from tandem_cli.serve.layout import RunFolder, runs_folder
from tandem_protocol.errors import ConfigError

RUN_ID_VARIABLE = "TANDEM_RUN_ID"


class RunState(msgspec.Struct, frozen=True):
    """One server that was started."""

    run_id: str
    pid: int
    started: float
    """Creation time of the process, which tells it from a later one with the same id."""
    http_port: int
    grpc_port: int
    metrics_port: int
    models: tuple[str, ...]
    admin_urls: dict[str, str]
    """Worker name -> URL of its admin server."""
    router_urls: tuple[str, ...] = ()
    """Admin servers of the router's instances."""

    def is_running(self) -> bool:
        """Whether the very process that was started still runs."""
        try:
            process = psutil.Process(self.pid)
            return bool(abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False


def write_state(folder: RunFolder, state: RunState) -> None:
    """Stores the state of a run."""
    folder.state.write_bytes(msgspec.json.encode(state))


def read_state(folder: RunFolder) -> RunState | None:
    """The state of a run; None if there is none. Raises ConfigError for a file that is not ours."""
    try:
        return msgspec.json.decode(folder.state.read_bytes(), type=RunState)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as exc:
        raise ConfigError(f"{folder.state} can't be read ({exc}): end its server by hand and remove {folder.path}") from exc


def all_runs() -> list[RunFolder]:
    """Folders of all runs of this user."""
    return [RunFolder(path) for path in sorted(runs_folder().glob("*")) if path.is_dir()]


def remove(folder: RunFolder) -> None:
    """Removes a run's folder; its log stays beside it."""
    shutil.rmtree(folder.path, ignore_errors=True)


def processes_of(run_id: str) -> list[psutil.Process]:
    """Living processes of a run, whoever their parent is now."""
    wanted = f"{RUN_ID_VARIABLE}={run_id}".encode()
    return [process for process in psutil.process_iter() if wanted in _environment(process.pid) and _lives(process)]


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
