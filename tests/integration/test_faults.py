# SPDX-License-Identifier: Apache-2.0
"""Every process of a fleet is stopped (SIGSTOP), killed (SIGKILL) and made to fail (an exception that nobody expects; SIGABRT where there
is no Python): streams end whole, elsewhere if need be, new requests are served, the fault is seen within its bound, nothing is left.

The fleet: a real worker with tiers and a consolidator, a mock worker of the same model, and a router in this process. Where no engine
matters, mock workers alone.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from etcds import BINARY, Etcd
from models import make_tiny_model
from router_server import RouterServer, router_server
from routers import LocalRouter, Mocks, Recorder, mocks, router
from servers import Server, command_of, engine_of, free_ports, processes_with, serve, tandem, wait_for
from spoils.spoils import FOLDER_VARIABLE
from tandem_cli.serve.layout import source_root
from tandem_protocol.discovery import LEASE_TTL_S
from tandem_worker.shared_memory import mapped_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SPOILS = Path(__file__).resolve().parents[1] / "spoils"
HANG_S, NEXT_TOKEN_S, FIRST_TOKEN_S = 6.0, 3.0, 10.0
SEEN_S, GONE_S, BACK_S = HANG_S + 10.0, 45.0, 60.0
STREAMS, TOKENS = 6, 600
MATE = ("--block-size", "32", "--speedup", "0.5")
ROUTING = {"TANDEM_ROUTER_NEXT_TOKEN_TIMEOUT_S": f"{NEXT_TOKEN_S:g}", "TANDEM_ROUTER_FIRST_TOKEN_TIMEOUT_S": f"{FIRST_TOKEN_S:g}",
           "TANDEM_ROUTER_DOWN_S": "1"}


def prompt(seed: int) -> list[int]:
    """Token ids, all different from the first block on."""
    return [(seed * 7919 + i * 31) % 30000 + 1 for i in range(70)]


def tokens_of(sent: Recorder) -> int:
    """So many the client got; raises the error that ended its stream."""
    assert sent.text is not None
    return sum(int(arrays["num_output_tokens"][0]) for arrays in sent.responses if "num_output_tokens" in arrays)


@dataclass
class Scene:
    """A worker to break, and what goes on around it."""

    server: Server
    local: LocalRouter
    spoils: Path
    _seed: int = 0
    spoiled: list[Path] = field(default_factory=list)

    def send(self, count: int, max_tokens: int) -> list[Recorder]:
        """Streams of new prompts."""
        self._seed += count
        return [self.local.send(prompt(self._seed + i), max_tokens=max_tokens, returns=("num_output_tokens",)) for i in range(count)]

    def begun(self) -> list[Recorder]:
        """Streams, all past their first token, and some of them on the worker."""
        sent = self.send(STREAMS, TOKENS)
        wait_for(lambda: all(one.responses or one.error for one in sent), BACK_S, "every stream to have begun")
        assert self.server.health("vllm")["active"] > 0
        return sent

    def stub(self) -> psutil.Process:
        """Triton's Python process with the engine's client."""
        return engine_of(self.server).parent()

    def of_module(self, module: str) -> psutil.Process:
        """A Python process by the module that it runs."""
        return next(process for process in self.server.processes() if module in command_of(process).split())

    def spoil(self, place: str) -> None:
        """From now on it raises there."""
        self.spoiled.append(self.spoils / place)
        self.spoiled[-1].touch()

    def mend(self) -> None:
        """It no longer raises."""
        while self.spoiled:
            self.spoiled.pop().unlink()

    def live(self) -> bool:
        """Whether the worker says that it lives; a server that is gone doesn't."""
        try:
            with urllib.request.urlopen(f"{self.server.admin_url('vllm')}/live", timeout=2) as answer:
                return int(answer.status) == 200
        except OSError:
            return False


def _root(folder: Path) -> Path:
    """The shipped models, with one more line in front of each model.py."""
    for name in ("model_repository", "backends"):
        shutil.copytree(source_root() / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for model in folder.glob("model_repository/*/1/model.py"):
        model.write_text(f"import sys\nsys.path.insert(0, {str(SPOILS)!r})\nimport spoils\nspoils.install()\n{model.read_text()}")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Starts and steps fast."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@contextmanager
def scene_of(folder: Path, model: Path) -> Iterator[Scene]:
    """Two workers in placement; ends with the check that nothing of the real one is left."""
    store, spoils = folder / "discovery", folder / "spoils"
    spoils.mkdir()
    arguments = ["--mode", "agg", "--routers", "0", "--model", str(model), "--max-model-len", "2048", "--connector", "kvbm",
                 "--cpu-cache-gb", "0.05"]
    variables = {"TANDEM_DISCOVERY": f"file:{store}", "TANDEM_ROOT": str(_root(folder / "root")), "PYTHONPATH": str(SPOILS),
                 FOLDER_VARIABLE: str(spoils), "TANDEM_HANG_TIMEOUT_S": f"{HANG_S:g}", "TANDEM_SERVER_EXIT_TIMEOUT_S": "10"}
    with serve(folder / "run", *arguments, **variables) as server:
        run_id, mapped = f"TANDEM_RUN_ID={server.state['run_id']}", mapped_files(process.pid for process in server.processes())
        with mocks(store, *MATE, "--model", str(model)), router(store, 2, model, **ROUTING) as local:
            yield Scene(server, local, spoils)
    wait_for(lambda: not processes_with(run_id), GONE_S, "no process left")
    assert [path for path in mapped if path.exists()] == []


@pytest.fixture(scope="module")
def sturdy(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Scene]:
    """For faults that the worker survives."""
    with scene_of(tmp_path_factory.mktemp("sturdy"), model) as running:
        yield running


def _server(scene: Scene) -> psutil.Process:
    return psutil.Process(scene.server.pid)


def _engine(scene: Scene) -> psutil.Process:
    return engine_of(scene.server)


def _guard(scene: Scene) -> psutil.Process:
    return scene.of_module("tandem_worker.guard")


def _consolidator(scene: Scene) -> psutil.Process:
    return scene.of_module("tandem_kvbm.consolidator")


@dataclass(frozen=True)
class Stop:
    """A process stands still for a while, and then goes on."""

    victim: Callable[[Scene], psutil.Process]
    for_s: float


STOPS = {
    "tritonserver": Stop(_server, NEXT_TOKEN_S + 4),
    "EngineCore, in time": Stop(_engine, HANG_S / 2),
    "guard": Stop(_guard, 3),
    "consolidator": Stop(_consolidator, 3),
}


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
def test_a_process_that_is_stopped_and_goes_on(sturdy: Scene, stop: Stop) -> None:
    """Its streams are whole, elsewhere if it takes long; requests are served meanwhile; then it is as before."""
    sent, victim = sturdy.begun(), stop.victim(sturdy)
    victim.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        meanwhile = sturdy.send(2, 20)
        wait_for(lambda: time.monotonic() - stopped > stop.for_s, BACK_S, "the end of the pause")
    finally:
        victim.send_signal(signal.SIGCONT)
    assert [tokens_of(one) for one in (*meanwhile, *sent)] == [20, 20] + [TOKENS] * STREAMS
    wait_for(lambda: len(sturdy.local.placed()) == 2, BACK_S, "both workers in placement")
    wait_for(lambda: sturdy.live(), BACK_S, "a live worker")
    assert [tokens_of(one) for one in sturdy.begun()] == [TOKENS] * STREAMS


@dataclass(frozen=True)
class Failure:
    """An exception in a process that survives it."""

    place: str
    says: str
    to_client: str = ""
    """What requests get that run into it; empty if none does."""


FAILURES = {
    "stub of the worker, in a request": Failure("worker_request", "request.failed", "spoiled by a test: worker_request"),
    "guard": Failure("guard_look", "it failed to look at the processes, and goes on"),
    "consolidator": Failure("consolidator_turn", "consolidator.round_failed: it goes on"),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_an_exception_that_nobody_expects(sturdy: Scene, failure: Failure) -> None:
    """At most the requests that run into it fail, at once and with its text; those in flight go on, and so does all else afterwards."""
    sent, before = sturdy.begun(), len(sturdy.server.log)
    sturdy.spoil(failure.place)
    try:
        struck = sturdy.send(4, 20)
        wait_for(lambda: failure.says in sturdy.server.log[before:], SEEN_S, failure.says)
        errors = [str(one.wait().error) for one in struck if one.wait().error]
        assert all(failure.to_client in error for error in errors)
        assert bool(errors) is bool(failure.to_client)
    finally:
        sturdy.mend()
    assert [tokens_of(one) for one in sent] == [TOKENS] * STREAMS
    assert [tokens_of(one) for one in sturdy.begun()] == [TOKENS] * STREAMS
    assert sturdy.live()


def test_a_stub_that_stands_still_for_longer_than_its_lease(tmp_path: Path, model: Path) -> None:
    """Streams end whole on the other worker, the router forgets it. When it goes on it serves again, unless tritonserver 2.51 has given
    up a message that it then reads, and crashes: then the guard ends all of it."""
    with scene_of(tmp_path, model) as scene:
        run_id, sent, stub = f"TANDEM_RUN_ID={scene.server.state['run_id']}", scene.begun(), scene.stub()
        stub.send_signal(signal.SIGSTOP)
        try:
            assert [tokens_of(one) for one in (*scene.send(2, 20), *sent)] == [20, 20] + [TOKENS] * STREAMS
            assert not scene.live()
            wait_for(lambda: len(scene.local.placed()) == 1, LEASE_TTL_S + SEEN_S, "one worker in placement")
            assert tokens_of(scene.send(1, 20)[0]) == 20
        finally:
            stub.send_signal(signal.SIGCONT)
        wait_for(lambda: len(scene.local.placed()) == 2 or not processes_with(run_id), BACK_S, "its return, or its end")
        assert [tokens_of(one) for one in scene.send(4, 20)] == [20] * 4


def test_a_killed_consolidator_is_started_again(sturdy: Scene) -> None:
    """By its supervisor; no stream notices."""
    sent, victim = sturdy.begun(), _consolidator(sturdy)
    victim.kill()
    assert [tokens_of(one) for one in sent] == [TOKENS] * STREAMS
    wait_for(lambda: any("tandem_kvbm.consolidator" in command_of(one).split() for one in sturdy.server.processes()), BACK_S, "another one")
    assert _consolidator(sturdy).pid != victim.pid


def test_without_its_guard_a_worker_serves_and_its_engine_ends_with_it(tmp_path: Path, model: Path) -> None:
    """The kernel ends the engine with the stub. Nobody ends tritonserver then, but whoever stops the run."""
    with scene_of(tmp_path, model) as scene:
        _guard(scene).kill()
        assert [tokens_of(one) for one in scene.begun()] == [TOKENS] * STREAMS
        sent, stub = scene.begun(), scene.stub()
        engine = stub.children(recursive=True)
        stub.kill()
        wait_for(lambda: not any(process.is_running() for process in engine), GONE_S, "the end of the engine")
        assert [tokens_of(one) for one in (*sent, *scene.send(2, 20))] == [TOKENS] * STREAMS + [20, 20]


DEADLY: dict[str, Callable[[Scene], Any]] = {
    "tritonserver killed": lambda scene: _server(scene).kill(),
    "tritonserver aborted": lambda scene: _server(scene).send_signal(signal.SIGABRT),
    "stub killed": lambda scene: scene.stub().kill(),
    "stub, exception in the engine's client": lambda scene: scene.spoil("engine_client"),
    "EngineCore killed": lambda scene: _engine(scene).kill(),
    "EngineCore stopped": lambda scene: _engine(scene).send_signal(signal.SIGSTOP),
    "EngineCore, exception in a step": lambda scene: scene.spoil("engine_step"),
}


@pytest.mark.parametrize("fault", DEADLY.values(), ids=DEADLY)
def test_a_fault_that_ends_the_worker(tmp_path: Path, model: Path, fault: Callable[[Scene], Any]) -> None:
    """Seen within the bound; every stream is whole on the other worker; the server ends with all that is its own."""
    with scene_of(tmp_path, model) as scene:
        run_id, sent = f"TANDEM_RUN_ID={scene.server.state['run_id']}", scene.begun()
        fault(scene)
        wait_for(lambda: not scene.live(), SEEN_S, "the worker to be seen as dead")
        assert [tokens_of(one) for one in sent] == [TOKENS] * STREAMS
        assert [tokens_of(one) for one in scene.send(2, 20)] == [20, 20]
        wait_for(lambda: len(scene.local.placed()) == 1, LEASE_TTL_S + SEEN_S, "one worker in placement")
        wait_for(lambda: not processes_with(run_id), GONE_S, "no process left")


@pytest.mark.parametrize("what", ["engine", "router"])
def test_serve_exits_with_an_error_when_its_server_fails(tmp_path: Path, model: Path, what: str) -> None:
    """In the foreground, where a supervisor sees the exit code, which tritonserver itself leaves at 0."""
    first = free_ports(20)
    ports = ["--http-port", str(first), "--grpc-port", str(first + 1), "--metrics-port", str(first + 2), "--admin-port", str(first + 3),
             "--kv-event-port", str(first + 8), "--router-admin-port", str(first + 16)]
    only = ["--routers", "0"] if what == "engine" else ["--workers", "0"]
    command = [sys.executable, "-m", "tandem_cli.main", "serve", "--mode", "agg", "--model", str(model), *only, *ports]
    environment = {**os.environ, "TANDEM_RUN_DIR": str(tmp_path), "TANDEM_SERVER_EXIT_TIMEOUT_S": "5"}
    with (tmp_path / "out").open("wb") as out:
        serving = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    server = Server(tmp_path, first, first + 1, first + 2)
    try:
        wait_for(lambda: "ready: " in (tmp_path / "out").read_text() or serving.poll() is not None, 600, "a ready server")
        victim = engine_of(server) if what == "engine" else _stub_of_router(server)
        victim.kill()
        assert serving.wait(GONE_S) == 1, (tmp_path / "out").read_text()
        assert "tritonserver ended by itself" in (tmp_path / "out").read_text()
    finally:
        serving.terminate()
        serving.wait(GONE_S)
        tandem(tmp_path, "stop", "--http-port", str(first), "--drain-timeout-s", "1")


def _stub_of_router(server: Server) -> psutil.Process:
    lines = ((process, command_of(process)) for process in server.processes())
    return next(process for process, line in lines if "triton_python_backend_stub" in line and "/router/" in line)


@dataclass
class Routed:
    """A server of routers alone over two mock workers, and another router beside it."""

    server: RouterServer
    local: LocalRouter
    spoils: Path

    def ended(self) -> bool:
        """Whether its tritonserver has."""
        return self.server.process.poll() is not None

    def ask(self, text: str, timeout_s: float = 30.0) -> str:
        """One request through the server, over HTTP: plain and bounded."""
        body = f'{{"text_input": "{text}", "stream": true, "max_tokens": 8, "ignore_eos": true}}'.encode()
        url = f"http://127.0.0.1:{self.server.http_port}/v2/models/router/generate_stream"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, method="POST"), timeout=timeout_s) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as exc:
            return f"error: {exc.read().decode()}"
        except OSError as exc:
            return f"lost: {exc}"


@pytest.fixture
def routed(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Routed]:
    """Ends with the check that nothing of the server is left once it is told to end."""
    store, spoils = tmp_path / "discovery", tmp_path / "spoils"
    spoils.mkdir()
    root = _root(tmp_path / "root")
    monkeypatch.setattr("router_server.source_root", lambda: root)
    settings = {"TANDEM_SERVER_EXIT_TIMEOUT_S": "5", FOLDER_VARIABLE: str(spoils), "PYTHONPATH": str(SPOILS)}
    with mocks(store, "--workers", "2"), router_server(tmp_path, store, 2, model, **settings) as server, \
            router(store, 2, model) as local:
        yield Routed(server, local, spoils)


def _router_guard(scene: Routed) -> psutil.Process:
    return next(process for process in scene.server.processes() if "tandem_protocol.guard" in process.cmdline())


def _router_server(scene: Routed) -> psutil.Process:
    return psutil.Process(scene.server.process.pid)


def _router_stub(scene: Routed) -> psutil.Process:
    return scene.server.stubs()[0]


@pytest.mark.parametrize("victim", [_router_server, _router_stub, _router_guard], ids=["tritonserver", "stub of the router", "guard"])
def test_a_router_that_is_stopped_and_goes_on(routed: Routed, victim: Callable[[Routed], psutil.Process]) -> None:
    """Its clients wait no longer than they want to, another router serves, and afterwards it answers as before. Only a stub may have
    been given up by tritonserver 2.51 meanwhile: then the guard ends all of it."""
    assert "text_output" in routed.ask("Before.")
    process = victim(routed)
    process.send_signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        answer = routed.ask("Meanwhile.", 3.0)
        assert time.monotonic() - started < 10
        assert ("text_output" in answer) is (victim is _router_guard)
        assert routed.local.send(prompt(1), max_tokens=8).text
    finally:
        process.send_signal(signal.SIGCONT)
    wait_for(lambda: routed.ended() or "text_output" in routed.ask("Afterwards."), BACK_S, "an answer, or the end of the server")
    assert victim is _router_stub or not routed.ended()
    wait_for(lambda: not routed.ended() or not routed.server.processes(), GONE_S, "nothing to be left of an ended server")


@pytest.mark.parametrize(
    ("victim", "number"),
    [(_router_server, signal.SIGKILL), (_router_server, signal.SIGABRT), (_router_stub, signal.SIGKILL)],
    ids=["tritonserver killed", "tritonserver aborted", "stub killed"],
)
def test_a_router_that_dies(routed: Routed, victim: Callable[[Routed], psutil.Process], number: int) -> None:
    """Its server ends, with everything; another router goes on."""
    victim(routed).send_signal(number)
    assert routed.local.send(prompt(2), max_tokens=8).text
    wait_for(routed.ended, GONE_S, "the server to end")
    wait_for(lambda: not routed.server.processes(), GONE_S, "nothing to be left")


def test_a_router_without_its_guard(routed: Routed) -> None:
    """It serves on, and ends when it is told to."""
    _router_guard(routed).kill()
    assert "text_output" in routed.ask("Unguarded.")
    routed.server.process.terminate()
    wait_for(routed.ended, GONE_S, "the server to end")
    wait_for(lambda: not routed.server.processes(), GONE_S, "nothing to be left")


def test_an_exception_in_a_router(routed: Routed) -> None:
    """The request gets it as its error; the next one is served."""
    (routed.spoils / "router_request").touch()
    assert "the router failed on this request: spoiled by a test" in routed.ask("Struck.")
    (routed.spoils / "router_request").unlink()
    assert "text_output" in routed.ask("Served.")


@pytest.fixture
def kept(tmp_path: Path, model: Path) -> Iterator[tuple[Etcd, Mocks, LocalRouter]]:
    """Two mock workers that an etcd keeps, and a router."""
    etcd = Etcd(tmp_path)
    etcd.start()
    try:
        with mocks(etcd.url, "--workers", "2", "--model", str(model)) as running, router(etcd.url, 2, model) as local:
            yield etcd, running, local
    finally:
        etcd.kill()


@pytest.mark.skipif(BINARY is None, reason="etcd is not installed")
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL, signal.SIGABRT], ids=["stopped", "killed", "aborted"])
def test_an_etcd_that_is_away_for_longer_than_its_leases(kept: tuple[Etcd, Mocks, LocalRouter], number: int) -> None:
    """Streams and new requests go on by what was last known; when it is back, so are the workers."""
    etcd, _, local = kept
    sent = [local.send(prompt(i), max_tokens=600, returns=("num_output_tokens",)) for i in range(STREAMS)]
    assert etcd.process is not None
    etcd.process.send_signal(number)
    away, asked = time.monotonic(), 100
    while time.monotonic() - away < LEASE_TTL_S + 2:
        asked += 1
        assert tokens_of(local.send(prompt(asked), max_tokens=30, returns=("num_output_tokens",))) == 30
    assert [tokens_of(one) for one in sent] == [600] * STREAMS
    if number is signal.SIGSTOP:
        etcd.resume()
    else:
        etcd.kill()
        etcd.start()
    wait_for(etcd.answers, BACK_S, "etcd to be back")
    wait_for(lambda: len(local.placed()) == 2, BACK_S, "both workers")
    assert tokens_of(local.send(prompt(99), max_tokens=30, returns=("num_output_tokens",))) == 30
