# SPDX-License-Identifier: Apache-2.0
"""Which processes map which files of /dev/shm, on a made-up /proc."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from tandem_worker import shared_memory
from tandem_worker.shared_memory import STARTING_S, mapped_files, remove_unmapped, sweep_host_tiers


@pytest.fixture
def shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of /dev/shm."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(shared_memory, "SHM", folder)
    return folder


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """An empty /proc, with a file that is no process."""
    folder = tmp_path / "proc"
    folder.mkdir()
    (folder / "uptime").write_text("1")
    return folder


def add_process(proc: Path, pid: int, *mapped: Path, under: str = "{}") -> None:
    """A process that maps these, besides its program and its heap; `under` is how the kernel shows their names."""
    (proc / str(pid)).mkdir()
    shown = [f"{path.stat().st_ino} {under.format(path)}" for path in mapped]
    lines = [f"7f0000000000-7f0000001000 rw-s 00000000 00:1b {entry}" for entry in ("1 /usr/bin/python3", *shown, "0", "0 [heap]")]
    (proc / str(pid) / "maps").write_text("\n".join(lines) + "\n")


def make(folder: Path, name: str) -> Path:
    """An empty file."""
    path = folder / name
    path.touch()
    return path


def test_only_shared_memory_of_the_given_processes_counts(shm: Path, proc: Path, tmp_path: Path) -> None:
    """Not their programs and other files, not other processes' files."""
    mine, other = {make(shm, "a"), make(shm, "b c")}, make(shm, "other")
    add_process(proc, 1, *mine, make(tmp_path, "elsewhere"))
    add_process(proc, 2, other)
    assert mapped_files([1], proc) == mine


def test_host_tiers_of_killed_engines_are_swept(shm: Path, proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those that somebody maps, not other files, and none that may be of an engine that is starting."""
    stale, used, other = make(shm, "vllm_offload_a.mmap"), make(shm, "vllm_offload_b.mmap"), make(shm, "psm_1")
    add_process(proc, 1, used)
    assert sweep_host_tiers(shm, proc) == []
    now = time.time()
    monkeypatch.setattr(shared_memory.time, "time", lambda: now + STARTING_S + 1)
    assert sweep_host_tiers(shm, proc) == [stale]
    assert sorted(shm.iterdir()) == sorted([used, other])


def test_a_semaphore_is_found_by_its_creator(shm: Path, proc: Path) -> None:
    """Which shows it under the temporary name that glibc gave it first, as deleted."""
    path = make(shm, "sem.mp-1")
    add_process(proc, 1, path, under=f"{shm}/sem.Xy12Zw (deleted)")
    assert mapped_files([1], proc) == {path}


def test_a_real_semaphore_is_found_by_its_creator() -> None:
    """The same with the real kernel and the real glibc."""
    lock = multiprocessing.get_context("spawn").Lock()
    name = lock._semlock.name.lstrip("/")  # type: ignore[attr-defined]
    assert shared_memory.SHM / f"sem.{name}" in mapped_files([os.getpid()])


def test_unlinked_files_do_not_count(shm: Path, proc: Path) -> None:
    """There is nothing left to remove."""
    path = make(shm, "a")
    add_process(proc, 1, path, under="{} (deleted)")
    path.unlink()
    assert mapped_files([1], proc) == set()


def test_processes_that_are_gone_map_nothing(proc: Path) -> None:
    """They may die between being listed and being looked at."""
    assert mapped_files([99], proc) == set()


def test_files_that_nobody_maps_are_removed(shm: Path, proc: Path) -> None:
    """And are told."""
    path = make(shm, "a")
    add_process(proc, 1, make(shm, "b"))
    assert remove_unmapped([path], proc) == [path]
    assert not path.exists()


def test_files_that_somebody_maps_stay(shm: Path, proc: Path) -> None:
    """Another server may share them."""
    path = make(shm, "a")
    add_process(proc, 7, path)
    assert remove_unmapped([path], proc) == []
    assert path.exists()


def test_files_that_are_gone_already_are_not_told(shm: Path, proc: Path) -> None:
    """Somebody else was faster."""
    assert remove_unmapped([shm / "a"], proc) == []


def test_a_file_that_cannot_be_removed_does_not_stop_the_rest(shm: Path, proc: Path) -> None:
    """A folder stands for it here: it can't be unlinked."""
    (shm / "a").mkdir()
    (shm / "b").touch()
    assert remove_unmapped([shm / "a", shm / "b"], proc) == [shm / "b"]
