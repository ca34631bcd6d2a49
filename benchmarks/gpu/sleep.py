# SPDX-License-Identifier: Apache-2.0
"""Sleep and wake on a real GPU: what each level frees, how long it takes, and that the text afterwards is the same.

One server: an aggregated, a prefill and a decode worker on the same GPU, and a router. Every worker in turn sleeps at levels 1 and 2 and
wakes, while requests go through the router to the others. A prefill worker whose blocks nobody pulls refuses to sleep within its bound,
and must serve again. Without a GPU the same is run at level 0, and levels 1 and 2 must be refused with 501. Prints one JSON line;
exits with 1 if a check failed.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import hardware
from benchmarks.errors import BenchmarkError
from benchmarks.targets import HOST, command_flags, tandem_command

from tandem_cli.serve.embedded_model import embedded_model
from tandem_cli.serve.layout import run_folder
from tandem_cli.serve.run_state import RunState, read_state

CALL_TIMEOUT_S = 120.0
SMI_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 90.0
CLEAR_TIMEOUT_S = 60.0
"""Longer than the lease of 30 s on the blocks that the router's probe of a joining prefill worker leaves there."""
ROLLBACK_BOUND_S = 1.0
KV_BYTES = 8 << 30
"""KV cache of each engine on a GPU: given, since three engines that measure the free memory at once measure one another."""
OK, UNAVAILABLE, NOT_IMPLEMENTED = 200, 503, 501
SENTENCE = "The ship sailed on over the wide sea, and nobody aboard knew what the morning would bring. "
BYTES_MOVED = "vllm:nixl_bytes_transferred_sum"


@dataclass(frozen=True)
class Cycle:
    """One worker's sleep at one level, there and back."""

    worker: str
    level: int
    sleep_s: float
    wake_s: float
    used_mib: tuple[int, int, int]
    """Of the GPU, before, asleep and after; zeros without one."""
    freed_mib: int
    refuses_asleep: bool
    same_text: bool
    """As before the first sleep, with empty caches: the aggregated worker's, or that of prefill and decode together."""
    moved_bytes: float
    """By NIXL, for the text afterwards; 0 for an aggregated worker."""

    @property
    def passed(self) -> bool:
        """All that can be judged."""
        moved = self.worker == "vllm" or self.moved_bytes > 0
        return self.refuses_asleep and self.same_text and moved and (self.level == 0 or self.freed_mib > 0)


@dataclass
class Traffic:
    """Requests through the router, one after the other, while a worker sleeps."""

    url: str
    requests: int = 0
    errors: list[str] = field(default_factory=list)

    @contextmanager
    def flowing(self) -> Iterator[None]:
        """From a first answer until the end of the context."""
        stop, answered = threading.Event(), threading.Event()

        def send() -> None:
            while not stop.is_set():
                self.requests += 1
                try:
                    generate(self.url, "router", f"{self.requests}. {SENTENCE}", 8)
                except (BenchmarkError, OSError) as exc:
                    self.errors.append(str(exc))
                answered.set()

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        answered.wait(CALL_TIMEOUT_S)
        try:
            yield
        finally:
            stop.set()
            thread.join(CALL_TIMEOUT_S)


def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Code and JSON body, also of refusals."""
    request = urllib.request.Request(url, data=json.dumps(body).encode(), method="POST")
    try:
        with urllib.request.urlopen(request, timeout=CALL_TIMEOUT_S) as answer:
            return answer.status, dict(json.loads(answer.read()))
    except urllib.error.HTTPError as exc:
        return exc.code, dict(json.loads(exc.read() or b"{}"))


def get(url: str) -> str:
    """The body, also of refusals."""
    try:
        with urllib.request.urlopen(url, timeout=CALL_TIMEOUT_S) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as exc:
        return str(exc.read().decode())


def generate(base: str, model: str, prompt: str, tokens: int) -> str:
    """A greedy answer. Raises BenchmarkError with the server's sentence."""
    sampling = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    body = {"text_input": prompt, "stream": False, "exclude_input_in_output": True, **sampling}
    code, answer = post(f"{base}/v2/models/{model}/generate", body)
    if code != OK or "text_output" not in answer:
        raise BenchmarkError(f"{model} answered {code}: {answer.get('error', answer)}")
    return str(answer["text_output"])


def used_mib() -> int:
    """Memory in use on the first GPU, by everybody; 0 without one."""
    binary = shutil.which("nvidia-smi")
    if binary is None:
        return 0
    command = [binary, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=False)
    return int(listed.stdout.split()[0]) if listed.returncode == 0 and listed.stdout.split() else 0


class Bench:
    """The cycles over one running server."""

    def __init__(self, state: RunState) -> None:
        self._admin = state.admin_urls
        self.base = f"http://{HOST}:{state.http_port}"
        self.traffic = Traffic(self.base)
        self._wanted = {path: self._text(path) for path in ("vllm", "disagg")}

    def cycle(self, worker: str, level: int) -> Cycle:
        """Sleep, a refusal, wake, and the text again."""
        before, moved = used_mib(), self._moved()
        with self.traffic.flowing():
            sleep_s = self._transition(worker, "sleep", {"level": level})
            asleep, refuses = used_mib(), self._refuses(worker)
            wake_s = self._transition(worker, "wake_up", {})
        after = used_mib()
        path = "vllm" if worker == "vllm" else "disagg"
        same = self._text(path) == self._wanted[path]
        return Cycle(worker, level, sleep_s, wake_s, (before, asleep, after), before - asleep, refuses, same,
                     self._moved() - moved if path == "disagg" else 0.0)

    def rollback(self, level: int) -> dict[str, Any]:
        """A prefill worker with blocks that nobody pulls: it does not fall asleep within the bound, and serves again; later it does."""
        post(f"{self.base}/v2/models/prefill/infer", {"id": "orphan", "inputs": [
            {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": [SENTENCE * 40]}]})
        code, answer = post(f"{self._admin['prefill']}/engine/sleep", {"level": level, "blocks_timeout_s": ROLLBACK_BOUND_S})
        status = json.loads(get(f"{self._admin['prefill']}/health"))["status"]
        generate(self.base, "disagg", SENTENCE, 1)
        later_s = self._transition("prefill", "sleep", {"level": level})
        self._transition("prefill", "wake_up", {})
        same = self._text("disagg") == self._wanted["disagg"]
        passed = code == UNAVAILABLE and status == "ready" and same
        return {"passed": passed, "code": code, "message": answer.get("message"), "status_after": status, "same_text": same,
                "later_sleep_s": later_s}

    def unsupported(self) -> list[int]:
        """The codes of levels that this platform has not."""
        return [post(f"{self._admin['vllm']}/engine/sleep", {"level": level})[0] for level in (1, 2)]

    def _transition(self, worker: str, kind: str, body: dict[str, Any]) -> float:
        started = time.monotonic()
        code, answer = post(f"{self._admin[worker]}/engine/{kind}", body)
        if code != OK:
            raise BenchmarkError(f"{kind} of {worker} with {body} answered {code}: {answer}")
        return round(time.monotonic() - started, 3)

    def _refuses(self, worker: str) -> bool:
        """Asked directly, as only who does not know of its sleep asks."""
        try:
            generate(self.base, "disagg" if worker == "prefill" else worker, SENTENCE, 1)
        except BenchmarkError as exc:
            return "asleep" in str(exc)
        return False

    def _text(self, path: str) -> list[str]:
        """Of the same prompts, with cold caches, then others, so that the next run finds its blocks elsewhere in memory."""
        self._clear(("vllm",) if path == "vllm" else ("prefill", "decode"))
        texts = [generate(self.base, path, f"Chapter {i}. {SENTENCE * 12}", 32) for i in range(4)]
        for i in range(3):
            generate(self.base, path, f"Letter {i}: {SENTENCE[::-1] * 10}", 1)
        return texts

    def _clear(self, workers: tuple[str, ...]) -> None:
        """Blocks are given back a moment after they were pulled."""
        for worker in workers:
            deadline = time.monotonic() + CLEAR_TIMEOUT_S
            while (answer := post(f"{self._admin[worker]}/clear_kv_blocks", {}))[0] != OK:
                if answer[0] != UNAVAILABLE or time.monotonic() > deadline:
                    raise BenchmarkError(f"clear_kv_blocks of {worker} answered {answer}")
                time.sleep(0.2)

    def _moved(self) -> float:
        lines = get(f"{self._admin['decode']}/metrics").splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(BYTES_MOVED))


def measure(bench: Bench, levels: tuple[int, ...]) -> dict[str, Any]:
    """All cycles; one that fails ends the run, since the state of the server is not known then, and is told."""
    cycles: list[Cycle] = []
    report: dict[str, Any] = {}
    try:
        if levels == (0,):
            report["unsupported_codes"] = bench.unsupported()
        for worker in ("vllm", "decode", "prefill"):
            for level in levels:
                cycles.append(bench.cycle(worker, level))
                print(f"{cycles[-1]}", file=sys.stderr, flush=True)
        report["rollback"] = bench.rollback(levels[0])
    except (BenchmarkError, OSError) as exc:
        report["error"] = str(exc)
    traffic = bench.traffic
    passed = (
        "error" not in report and all(cycle.passed for cycle in cycles) and report["rollback"]["passed"] and not traffic.errors
        and report.get("unsupported_codes", [NOT_IMPLEMENTED]) in ([NOT_IMPLEMENTED], [NOT_IMPLEMENTED] * 2)
    )
    return {"passed": passed, "cycles": [asdict(cycle) for cycle in cycles], **report,
            "router": {"requests": traffic.requests, "failed": len(traffic.errors), "errors": traffic.errors[:5]}}


@contextmanager
def served(args: argparse.Namespace, *, gpu: bool) -> Iterator[RunState]:
    """The server, stopped at the end. Raises BenchmarkError."""
    log = args.log_dir / "launcher.log"
    own = {"enable_sleep_mode": True, "kv_cache_memory_bytes": KV_BYTES} if gpu else {}
    ports = {"http-port": 0, "grpc-port": 1, "metrics-port": 2, "admin-port": 10, "kv-event-port": 20, "side-channel-port": 30,
             "router-admin-port": 40}
    flags = [f"--{name}={args.port + offset}" for name, offset in ports.items()]
    engine = command_flags({"max_model_len": 2048, "max_num_seqs": 32, **own})
    try:
        serve = ["serve", "--detach", "--mode=both", f"--model={args.model}", f"--start-timeout={args.start_timeout}"]
        tandem_command([*serve, *flags, *engine], log, args.start_timeout + 60)
        state = read_state(run_folder(args.port))
        assert state is not None, "the launcher said that it runs"
        yield state
    finally:
        tandem_command(["stop", f"--http-port={args.port}", "--drain-timeout-s=1"], log, STOP_TIMEOUT_S, check=False)
        with suppress(FileNotFoundError):
            shutil.copyfile(run_folder(args.port).log, args.log_dir / "server.log")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder of the model (default: the embedded SmolLM2-135M-Instruct)")
    parser.add_argument("--log-dir", type=Path, default=Path("/tmp/tandem-sleep"), help="(default: %(default)s)")
    parser.add_argument("--port", type=int, default=18400, help="first port (default: %(default)s)")
    parser.add_argument("--start-timeout", type=int, default=180, help="seconds (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="accepted: the report is one JSON line anyway")
    args = parser.parse_args()
    args.model = args.model or str(embedded_model())
    args.log_dir.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a time limit must not leave the server behind
    machine = hardware.detect()
    gpu = bool(machine.gpus)
    report: dict[str, Any] = {"benchmark": "sleep", "hardware": machine.describe(), "versions": hardware.versions(), "model": args.model,
                              "kv_mib_per_engine": KV_BYTES >> 20 if gpu else None, "used_mib_at_start": used_mib()}
    started = time.monotonic()
    try:
        with served(args, gpu=gpu) as state:
            report["start_s"] = round(time.monotonic() - started, 1)
            report.update(measure(Bench(state), (1, 2) if gpu else (0,)))
    except (BenchmarkError, OSError) as exc:
        report.update(passed=False, error=str(exc))
    report["used_mib_at_end"] = used_mib()
    print(json.dumps(report), flush=True)
    return 0 if report.get("passed") else 1


if __name__ == "__main__":
    sys.exit(main())
