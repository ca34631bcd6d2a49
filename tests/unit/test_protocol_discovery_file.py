# SPDX-License-Identifier: Apache-2.0
"""Discovery in a folder: who is alive, what is swept, and what a folder that can't be used does. The clock is the test's."""

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from discovery_contract import ids, until, worker
from tandem_protocol.discovery import LEASE_TTL_S, Counts, Snapshot
from tandem_protocol.discovery.file import Entry, FileDiscovery, Folder, is_running, this_host
from tandem_protocol.errors import UnavailableError
from tandem_protocol.workers import WorkerState


class Clock:
    """The wall clock, and what the test adds to it."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return time.time() + self.ahead_s


@pytest.fixture
def clock() -> Clock:
    """The readers' clock; `ahead_s` ages every file."""
    return Clock()


@pytest.fixture
def folder(tmp_path: Path, clock: Clock) -> Folder:
    """An empty folder."""
    return Folder(tmp_path, Counts(), now=clock)


def leave(path: Path, name: str, pid: int, host: str) -> None:
    """A file as another process would leave it."""
    (path / f"{name}.json").write_bytes(msgspec.json.encode(Entry(record=worker(name), pid=pid, host=host)))


def gone_pid() -> int:
    """The id of a process that ended and was collected."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(("age_s", "listed"), [(0.0, True), (LEASE_TTL_S - 1, True), (LEASE_TTL_S + 1, False)])
def test_a_file_lives_for_one_lease(folder: Folder, clock: Clock, age_s: float, listed: bool) -> None:
    """Without a sign of life."""
    folder.write(worker())
    clock.ahead_s = age_s
    assert bool(folder.scan()) is listed


def test_a_touch_is_a_sign_of_life(folder: Folder, clock: Clock) -> None:
    """And it brings back a worker that was only asleep."""
    folder.write(worker())
    clock.ahead_s = LEASE_TTL_S + 1
    assert folder.scan() == ()
    assert folder.touch("vllm-1")
    assert folder.scan() == (worker(),)


def test_a_local_process_that_is_gone_is_not_listed(folder: Folder) -> None:
    """At once, not after its lease; the same pid on another host says nothing."""
    leave(folder.path, "dead", gone_pid(), this_host())
    leave(folder.path, "elsewhere", gone_pid(), "another/1")
    leave(folder.path, "alive", os.getpid(), this_host())
    assert [record.id for record in folder.scan()] == ["alive", "elsewhere"]


def test_a_process_that_nobody_collected_is_gone() -> None:
    """A killed stub stays a zombie until tritonserver looks."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert is_running(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not is_running(process.pid)
    process.communicate()


def test_the_long_dead_are_swept(folder: Folder, clock: Clock) -> None:
    """Entries and half-written ones; what is not ours stays, however old."""
    folder.write(worker())
    (folder.path / "x.1.tandem-partial").write_bytes(b"")
    others = {"package.json": b'{"name": "x"}', "notes.txt": b"", "broken.json": b"{"}
    for name, content in others.items():
        (folder.path / name).write_bytes(content)
    clock.ahead_s = 5 * LEASE_TTL_S
    folder.scan()
    assert len(list(folder.path.iterdir())) == 5
    clock.ahead_s = 7 * LEASE_TTL_S
    folder.scan()
    assert {path.name for path in folder.path.iterdir()} == set(others)


def test_a_bad_record_is_counted_once(tmp_path: Path) -> None:
    """However often it is looked at; the others are listed."""
    counts = Counts()
    folder = Folder(tmp_path, counts)
    folder.write(worker())
    (tmp_path / "bad.json").write_text('{"record": {}}')
    assert [folder.scan() for _ in range(3)] == [(worker(),)] * 3
    assert counts.bad_records == 1


def test_a_changed_file_is_read_again(folder: Folder) -> None:
    """The cache knows a file by more than its time."""
    folder.write(worker())
    assert folder.scan() == (worker(),)
    folder.write(worker(state=WorkerState.ASLEEP))
    assert folder.scan() == (worker(state=WorkerState.ASLEEP),)


async def test_a_lost_file_is_written_again(tmp_path: Path) -> None:
    """Whoever removed it, and if the whole folder is gone."""
    discovery = FileDiscovery(tmp_path / "discovery")
    registration = await discovery.register(worker())
    (tmp_path / "discovery" / "vllm-1.json").unlink()
    (tmp_path / "discovery").rmdir()
    assert await discovery.list() == ()
    await registration.beat()  # type: ignore[attr-defined]
    assert await discovery.list() == (worker(),)
    assert discovery.counts.re_registrations == 1
    await discovery.close()


async def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    """Registering and listing say so; a watch keeps its view; what was asked meanwhile is stored afterwards."""
    path = tmp_path / "discovery"
    discovery = FileDiscovery(path)
    registration = await discovery.register(worker())
    watch = discovery.watch()
    assert ids(await until(watch, lambda _: True)) == ["vllm-1"]
    path.rename(tmp_path / "away")
    path.write_text("a file in its place")
    with pytest.raises(UnavailableError, match="can't be used"):
        await discovery.list()
    await registration.set_state(WorkerState.DRAINING)
    assert not registration.held
    assert await until(watch, lambda snapshot: not snapshot.current) == Snapshot(records=(worker(),), current=False)
    path.unlink()
    (tmp_path / "away").rename(path)
    await registration.beat()  # type: ignore[attr-defined]
    assert registration.held
    await until(watch, lambda snapshot: snapshot.current and snapshot.records == (worker(state=WorkerState.DRAINING),))
    assert (discovery.counts.losses, discovery.counts.re_registrations) == (2, 1)
    await discovery.close()
