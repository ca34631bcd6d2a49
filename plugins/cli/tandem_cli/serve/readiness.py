# SPDX-License-Identifier: Apache-2.0
"""Waits until a starting server answers, showing how far each worker is, and says why when it doesn't."""

import json
import re
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tandem_cli.serve.run_state import RunState
from tandem_protocol.errors import EngineError

_POLL_S = 0.5
_REPORT_EVERY_S = 10.0
_HTTP_TIMEOUT_S = 2.0
_READY = re.compile(r"worker\.ready model=(\S+)")
_FAILED = re.compile(
    r"failed to load '(?P<model>[^']+)' version \d+: \w+(?: \w+)*: "
    r"(?:(?:TritonModelException|ConfigError): )?(?P<reason>(?:\\[^n]|[^\\\n\"])+)"
)
"""Triton writes a message on one line, with quotes and line ends escaped; a Python traceback follows the first line."""
_SIDECAR_FAILED = re.compile(r"^tandem consolidator: (?P<reason>.+)$", re.MULTILINE)
_LOG_TAIL_LINES = 15
_SERVER_GRACE_S = 60.0
"""From the last engine's readiness to the server's own, usually under a second. Triton stops a stub that doesn't beat for a
moment, and then waits for ever for its end, so this is the only sign of it."""


@dataclass
class Progress:
    """Prints a line whenever a worker gets ready, and one every ten seconds."""

    workers: tuple[str, ...]
    started: float
    shown: frozenset[str] = frozenset()
    last: float = 0.0
    complete_at: float | None = None

    def all_ready_for(self) -> float:
        """Seconds since the last worker got ready; 0 while one is not."""
        return 0.0 if self.complete_at is None else time.monotonic() - self.complete_at

    def show(self, log_text: str) -> None:
        """Takes the log so far."""
        ready = frozenset(_READY.findall(log_text)) & frozenset(self.workers)
        elapsed = time.monotonic() - self.started
        if self.workers and len(ready) == len(self.workers) and self.complete_at is None:  # a router alone has the whole start to itself
            self.complete_at = time.monotonic()
        if ready == self.shown and elapsed - self.last < _REPORT_EVERY_S:
            return
        self.shown, self.last = ready, elapsed
        waiting = [name for name in self.workers if name not in ready]
        state = f"starting {', '.join(waiting)}" if waiting else "workers ready, waiting for the server"
        print(f"[{elapsed:4.0f} s] {len(ready)}/{len(self.workers)} engines ready; {state}", file=sys.stderr, flush=True)


def wait_until_ready(state: RunState, log: Path, timeout_s: float) -> None:
    """Returns when every model answers. Raises EngineError with the reason from the log."""
    progress = Progress(tuple(state.admin_urls), time.monotonic())
    deadline = progress.started + timeout_s
    while not is_ready(state):
        text = log.read_text(errors="replace")
        if (reason := load_failure(text)) is not None:
            raise EngineError(reason)
        if not state.is_running():
            raise EngineError(f"tritonserver ended while starting; the end of {log}:\n{tail(text)}")
        if time.monotonic() > deadline:
            raise EngineError(f"not ready after {timeout_s:g} s: see {log}, or give more time with --start-timeout")
        progress.show(text)
        if progress.all_ready_for() > _SERVER_GRACE_S:
            raise EngineError("all engines are ready but tritonserver is not: it gave a worker up while the host was overloaded; "
                              f"start again with fewer engines or less load (log: {log})")
        time.sleep(_POLL_S)


def is_ready(state: RunState) -> bool:
    """Whether the server is ready and every model of the run is."""
    base = f"http://127.0.0.1:{state.http_port}/v2"
    ready = all(_answers(url) for url in [f"{base}/health/ready", *(f"{base}/models/{name}/ready" for name in state.models)])
    return ready and all(_places_all(url, len(state.admin_urls)) for url in state.router_urls)


def _places_all(url: str, workers: int) -> bool:
    """Whether a router has found and checked every worker of the run; those of others don't matter here, so a router alone is ready."""
    if not workers:
        return True
    try:
        with urllib.request.urlopen(f"{url}/fleet", timeout=_HTTP_TIMEOUT_S) as response:  # noqa: S310 - always http to this host
            fleet = json.load(response)
            return bool(fleet["ready"]) and sum(worker["placed"] for worker in fleet["workers"]) >= workers
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=_HTTP_TIMEOUT_S) as response:  # noqa: S310 - always http to this host
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def load_failure(log_text: str) -> str | None:
    """Why a model failed to load or a consolidator to start, from the log; None if none failed."""
    match = _FAILED.search(log_text)
    if match is not None:
        return f"model {match['model']} did not start: {_unescape(match['reason']).strip()}"
    match = _SIDECAR_FAILED.search(log_text)
    return f"a consolidator of KV events did not start: {match['reason']}" if match else None


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def tail(text: str) -> str:
    """The last lines of a log."""
    return "\n".join(text.splitlines()[-_LOG_TAIL_LINES:])
