# SPDX-License-Identifier: Apache-2.0
"""The guard, on real processes: a dummy server, a dummy stub that starts the guard, and a dummy engine with shared memory."""

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from fakes import WAIT_S
from tandem_worker.guard import WORKER_TOKEN_VARIABLE, Ward, clean_up
from tandem_worker.shared_memory import SHM

IDLE = "import signal; print('up', flush=True); signal.pause()"
ENGINE = """
import mmap, signal, sys
with open(sys.argv[1], "w+b") as file:
    file.truncate(4096)
    mapped = mmap.mmap(file.fileno(), 4096)
print("up", flush=True)
signal.pause()
"""
SHARER = """
import signal
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=4096)
memory.close()
print(memory.name, flush=True)
signal.pause()
"""
STUB = """
import os, signal, subprocess, sys
from pathlib import Path
from tandem_protocol.guard import say_goodbye
from tandem_worker.guard import WORKER_TOKEN_VARIABLE, Ward, start_guard
server, token, scratch, engine_code, shm_file = sys.argv[1:]
guard = start_guard(Ward(int(server), os.getpid(), token, Path(scratch), 30.0))
os.environ[WORKER_TOKEN_VARIABLE] = token
engine = subprocess.Popen([sys.executable, "-c", engine_code, shm_file], stdout=subprocess.PIPE)
engine.stdout.readline()
print(guard.pid, engine.pid, flush=True)
sys.stdin.readline()
say_goodbye(guard, 30.0)
print("left", flush=True)
signal.pause()
"""


def lives(process: psutil.Process) -> bool:
    """Neither gone nor a zombie."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@dataclass
class Scene:
    """A server with one worker."""

    server: "subprocess.Popen[str]"
    stub: "subprocess.Popen[str]"
    guard: psutil.Process
    engine: psutil.Process
    shm_file: Path
    scratch: Path


@contextlib.contextmanager
def python(code: str, *arguments: str, **environment: str) -> "Iterator[subprocess.Popen[str]]":
    """A process that is killed in the end, if it still lives."""
    with subprocess.Popen([sys.executable, "-c", code, *arguments], env={**os.environ, **environment}, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: "subprocess.Popen[str]") -> str:
    """The next line that the process prints."""
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """Everything up and running; nothing of it is left afterwards."""
    shm_file, scratch = SHM / f"tandem-test-{uuid.uuid4().hex}", tmp_path / "scratch"
    scratch.mkdir()
    with python(IDLE) as server, python(STUB, str(server.pid), uuid.uuid4().hex, str(scratch), ENGINE, str(shm_file)) as stub:
        line_of(server)
        guard, engine = (psutil.Process(int(pid)) for pid in line_of(stub).split())
        try:
            yield Scene(server, stub, guard, engine, shm_file, scratch)
        finally:
            for process in (guard, engine):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            shm_file.unlink(missing_ok=True)


def test_the_death_of_the_stub_ends_the_worker_and_the_server(scene: Scene) -> None:
    """So that a supervisor restarts the server whole."""
    scene.stub.kill()
    scene.guard.wait(WAIT_S)
    assert not lives(scene.engine)
    assert not scene.shm_file.exists()
    assert not scene.scratch.exists()
    assert scene.server.wait(WAIT_S) == -signal.SIGTERM


def test_the_death_of_the_server_ends_the_worker(scene: Scene) -> None:
    """Stub and engine would hold the GPU for nobody."""
    scene.server.kill()
    scene.guard.wait(WAIT_S)
    assert scene.stub.wait(WAIT_S) == -signal.SIGKILL
    assert not lives(scene.engine)
    assert not scene.shm_file.exists()
    assert not scene.scratch.exists()


def test_nothing_is_killed_after_a_goodbye(scene: Scene) -> None:
    """A clean unload has shut its engine down itself; only the scratch folder is left to remove."""
    assert scene.stub.stdin is not None
    scene.stub.stdin.write("\n")
    scene.stub.stdin.flush()
    assert line_of(scene.stub) == "left\n"
    assert not scene.guard.is_running()
    assert lives(scene.engine)
    assert scene.shm_file.exists()
    assert not scene.scratch.exists()
    assert scene.stub.poll() is scene.server.poll() is None


def test_a_server_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    """A dead stub can keep tritonserver from unloading for ever."""
    with python(f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {IDLE}") as server, python(IDLE) as stub:
        line_of(server)
        stub.kill()
        stub.wait(WAIT_S)
        clean_up(Ward(server.pid, stub.pid, uuid.uuid4().hex, tmp_path, 0.0), server_died=False)
        assert server.wait(WAIT_S) == -signal.SIGKILL


def test_shared_memory_that_no_look_has_seen_is_removed_by_its_tracker(tmp_path: Path) -> None:
    """Which is Python's own, and must outlive the engine for that."""
    token = uuid.uuid4().hex
    with python(IDLE) as server, python(IDLE) as stub, python(SHARER, **{WORKER_TOKEN_VARIABLE: token}) as engine:
        shm_file = SHM / line_of(engine).strip()
        assert shm_file.exists()
        clean_up(Ward(server.pid, stub.pid, token, tmp_path / "scratch", 30.0), server_died=True)
        assert not shm_file.exists()
        assert engine.wait(WAIT_S) == -signal.SIGKILL


def test_engine_processes_are_found_by_their_token(tmp_path: Path) -> None:
    """Not those of other workers, and not the stub, which the guard treats apart."""
    token = uuid.uuid4().hex
    with (python(IDLE, **{WORKER_TOKEN_VARIABLE: token}) as stub, python(IDLE, **{WORKER_TOKEN_VARIABLE: token}) as engine,
          python(IDLE, **{WORKER_TOKEN_VARIABLE: "another"}) as other):
        for process in (stub, engine, other):
            line_of(process)
        assert Ward(1, stub.pid, token, tmp_path, 1.0).engine_pids() == [engine.pid]


def test_processes_that_were_seen_are_waited_for_until_they_are_gone(tmp_path: Path) -> None:
    """A process that the kernel is killing shows no token any more, but may still map its files."""
    token = uuid.uuid4().hex
    with python(IDLE, **{WORKER_TOKEN_VARIABLE: token}) as engine:
        line_of(engine)
        ward = Ward(os.getpid(), os.getpid(), token, tmp_path, 1.0)
        ward.look()
        assert ward.dying_pids() == [engine.pid]
        engine.kill()
        engine.wait(WAIT_S)
        assert ward.dying_pids() == []
        ward.look()
        assert ward.seen == set()


def test_a_server_that_died_before_the_guard_was_up_is_noticed(tmp_path: Path) -> None:
    """There is no process left to watch then."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with python("pass") as server:
        server.wait(WAIT_S)
    with python(IDLE) as stub:
        line_of(stub)
        arguments = [str(server.pid), str(stub.pid), uuid.uuid4().hex, str(scratch), "1"]
        guard = subprocess.run([sys.executable, "-m", "tandem_worker.guard", *arguments], stdin=stub.stdout, stderr=subprocess.PIPE,
                               text=True, timeout=WAIT_S, check=True)
        assert "tritonserver died" in guard.stderr
        assert stub.wait(WAIT_S) == -signal.SIGKILL
    assert not scratch.exists()
