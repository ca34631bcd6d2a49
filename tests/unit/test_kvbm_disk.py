# SPDX-License-Identifier: Apache-2.0
"""The disk store: the contract, what a restart finds, what a broken disk does."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from store_contract import BLOCK_BYTES, CAPACITY, WAIT_S, EvictingContract, Make, block_of, get, key_of, put
from tandem_kvbm.blob import CorruptBlockError
from tandem_kvbm.disk.files import PAGE
from tandem_kvbm.disk.options import DiskOptions
from tandem_kvbm.disk.store import DiskStore
from tandem_kvbm.layout import Layout
from tandem_kvbm.memory_store import MemoryStore
from tandem_kvbm.store import MissingBlockError, StoreUnavailableError
from tandem_protocol.errors import ConfigError

FILE_BYTES = BLOCK_BYTES + PAGE
LAYOUT = Layout(
    model="org/model", weights="w", dtype="float32", block_bytes=BLOCK_BYTES, tokens_per_hash=32, blocks_per_chunk=1,
    groups=((32, ("layer",)),), parallel=(1, 1, 1, 1, 1), kv_cache_layout="NHD", canonical=False, replicated=False, engine="vllm 0",
    namespace="",
)


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def options(folder: Path, **changes: object) -> DiskOptions:
    return replace(DiskOptions(folder=str(folder), quota_bytes=CAPACITY * FILE_BYTES), **changes)  # type: ignore[arg-type]


Open = Callable[..., tuple[DiskStore, Sequence[bytes]]]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens stores over one folder; closes them at the end."""
    stores: list[DiskStore] = []

    def open_one(clock: Clock | None = None, layout: Layout = LAYOUT, **changes: object) -> tuple[DiskStore, Sequence[bytes]]:
        store = DiskStore(options(tmp_path, **changes), layout, clock=clock or Clock())
        stores.append(store)
        return store, store.open()

    yield open_one
    for store in stores:
        store.close()


def path_of(store: DiskStore, number: int) -> Path:
    return store._files.path(key_of(number))


class TestMemory(EvictingContract):
    @pytest.fixture
    def make(self) -> Make:
        return lambda: MemoryStore(CAPACITY, BLOCK_BYTES)


class TestDisk(EvictingContract):
    @pytest.fixture(params=["direct", "cached", "synced"])
    def make(self, tmp_path: Path, request: pytest.FixtureRequest) -> Make:
        return lambda: DiskStore(options(tmp_path, direct_io=request.param == "direct", fdatasync=request.param == "synced"), LAYOUT)


class TestShared(EvictingContract):
    """A shared folder with one engine is a folder."""

    @pytest.fixture
    def make(self, tmp_path: Path) -> Make:
        return lambda: DiskStore(options(tmp_path, shared=True), LAYOUT)


def test_direct_and_cached_files_are_the_same(opened: Open) -> None:
    store, _ = opened(direct_io=True)
    put(store, 1)
    aligned = store._files.direct_io
    store.close()
    store, keys = opened(direct_io=False)
    assert keys == [key_of(1)]
    assert get(store, 1) == block_of(1)
    if not aligned:
        pytest.skip("this file system has no direct I/O: only the cached half was tested")


def test_a_restart_finds_all_blocks_in_the_order_of_their_use(opened: Open) -> None:
    store, _ = opened()
    for number in range(3):
        put(store, number)
        os.utime(path_of(store, number), ns=(number, number))
    get(store, 0)
    store.close()
    store, keys = opened()
    assert list(keys) == [key_of(1), key_of(2), key_of(0)]
    assert [get(store, number) for number in range(3)] == [block_of(number) for number in range(3)]
    store.check_integrity()


def test_a_smaller_quota_keeps_the_newest(opened: Open) -> None:
    store, _ = opened()
    for number in range(CAPACITY):
        put(store, number)
        os.utime(path_of(store, number), ns=(number, number))
    store.close()
    store, keys = opened(quota_bytes=2 * FILE_BYTES)
    assert list(keys) == [key_of(CAPACITY - 2), key_of(CAPACITY - 1)]
    assert len(list(store._seat.folder.rglob("*.kv"))) == 2


def test_files_of_another_size_and_leftovers_are_removed_and_strangers_left(opened: Open) -> None:
    store, _ = opened()
    put(store, 1)
    put(store, 2)
    os.truncate(path_of(store, 1), 100)
    leftover = store._seat.folder / "tmp" / "1-2-3"
    stranger = path_of(store, 2).with_name("README")
    leftover.write_bytes(b"torn")
    stranger.write_bytes(b"hello")
    torn = path_of(store, 1)
    store.close()
    _, keys = opened()
    assert list(keys) == [key_of(2)]
    assert (torn.exists(), leftover.exists(), stranger.exists()) == (False, False, True)


def test_the_quota_is_of_bytes_on_disk(opened: Open) -> None:
    store, _ = opened()
    for number in range(3 * CAPACITY):
        put(store, number)
        store.check_integrity()
    files = list(store._seat.folder.rglob("*.kv"))
    assert len(files) == CAPACITY
    assert sum(file.stat().st_size for file in files) == store.stats().size_bytes <= CAPACITY * FILE_BYTES


def test_another_layout_model_or_namespace_sees_nothing(opened: Open) -> None:
    store, _ = opened()
    put(store, 1)
    for field in ("dtype", "weights", "namespace", "engine", "kv_cache_layout", "model"):
        stranger, keys = opened(layout=replace(LAYOUT, **{field: "another"}))
        assert not keys
        assert not stranger.holds(key_of(1))


def test_two_engines_sit_apart_and_a_restarted_one_where_it_sat(opened: Open) -> None:
    first, _ = opened()
    second, _ = opened()
    put(first, 1)
    put(second, 2)
    assert first._seat.folder != second._seat.folder
    second.close()
    again, keys = opened()
    assert list(keys) == [key_of(2)]
    assert again._seat.folder == second._seat.folder


def test_folders_that_nobody_used_for_long_are_swept(opened: Open, tmp_path: Path) -> None:
    """Another model's, and an engine's that isn't started again; not those in use, used lately, or shared."""
    names = ("old", "used", "shared", "late")
    old, used, shared, other = (opened(layout=replace(LAYOUT, model=name), shared=name == "shared")[0] for name in names)
    for store in (old, used, shared, other):
        put(store, 1)
    for store in (old, shared, other):
        store.close()
    for store in (old, used, shared):
        folder = store._seat.folder
        for path in (*folder.iterdir(), folder):
            os.utime(path, (0, 0))
    mine, _ = opened(forget_s=86_400.0)
    assert sorted(path.name.split("_")[0] for path in (tmp_path / "tandem-kv").iterdir()) == ["late", "org", "shared", "used"]
    assert get(used, 1) == block_of(1)
    put(mine, 1)
    assert list(opened(layout=replace(LAYOUT, model="late"))[1]) == [key_of(1)]


def test_a_sweep_that_was_killed_is_ended_by_the_next(opened: Open, tmp_path: Path) -> None:
    """What it had renamed is of no use to anybody."""
    store, _ = opened()
    left = store._seat.folder.with_name(".gone-0")
    (left / "00").mkdir(parents=True)
    opened(forget_s=86_400.0)
    assert not left.exists()


def test_a_shared_folder_shows_what_others_wrote(opened: Open) -> None:
    first, _ = opened(shared=True)
    second, _ = opened(shared=True)
    put(first, 1)
    assert second.holds(key_of(1)) is None
    assert second.probe([key_of(1), key_of(2)]) == [True, False]
    assert second.holds(key_of(1))
    assert get(second, 1) == block_of(1)
    assert not second.write(key_of(1), memoryview(block_of(1))).stored


def test_only_the_owner_of_a_shared_folder_evicts(opened: Open) -> None:
    clock = Clock()
    owner, _ = opened(clock, shared=True)
    guest, _ = opened(clock, shared=True)
    for number in range(CAPACITY):
        put(guest, number)
    assert not guest.write(key_of(100), memoryview(block_of(100))).stored
    clock.now += 31.0
    assert len(put(owner, 101)) == 1
    owner.check_integrity()
    clock.now += 31.0
    owner.close()
    assert len(put(guest, 102)) == 2, "the one that is gone and, as the new owner, the one that it gave up"


def test_a_corrupt_block_is_refused_and_removed(opened: Open) -> None:
    store, _ = opened()
    put(store, 1)
    with path_of(store, 1).open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff\x00\xff")
    with pytest.raises(CorruptBlockError):
        get(store, 1)
    assert not store.holds(key_of(1))
    assert not path_of(store, 1).exists()
    put(store, 1)
    assert get(store, 1) == block_of(1)


def test_a_truncated_block_is_refused_and_removed(opened: Open) -> None:
    store, _ = opened()
    put(store, 1)
    os.truncate(path_of(store, 1), BLOCK_BYTES)
    with pytest.raises(CorruptBlockError):
        get(store, 1)
    assert not store.holds(key_of(1))


def test_a_file_with_the_tail_lost_to_a_power_cut_is_refused(opened: Open) -> None:
    store, _ = opened()
    put(store, 1)
    os.truncate(path_of(store, 1), PAGE)
    os.truncate(path_of(store, 1), FILE_BYTES)
    with pytest.raises(CorruptBlockError):
        get(store, 1)


def test_a_block_under_the_name_of_another_is_refused(opened: Open) -> None:
    store, _ = opened()
    put(store, 1)
    put(store, 2)
    shutil.copy(path_of(store, 1), path_of(store, 2))
    with pytest.raises(CorruptBlockError):
        get(store, 2)
    assert get(store, 1) == block_of(1)


def test_a_block_of_another_layout_under_its_name_is_refused(opened: Open) -> None:
    store, _ = opened()
    other, _ = opened(layout=replace(LAYOUT, dtype="bfloat16"))
    put(store, 1)
    put(other, 1)
    shutil.copy(path_of(other, 1), path_of(store, 1))
    with pytest.raises(CorruptBlockError):
        get(store, 1)


def test_a_removed_file_is_a_missing_block(opened: Open) -> None:
    store, _ = opened()
    put(store, 1)
    path_of(store, 1).unlink()
    with pytest.raises(MissingBlockError):
        get(store, 1)
    assert not store.holds(key_of(1))
    assert store.ready()


def test_a_folder_that_was_emptied_is_used_again(opened: Open) -> None:
    store, _ = opened()
    put(store, 1)
    for path in store._seat.folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(StoreUnavailableError):
        store.write(key_of(2), memoryview(block_of(2)))
    put(store, 3)
    assert get(store, 3) == block_of(3)


def test_a_vanished_folder_rests_the_disk_and_is_not_made_anew(opened: Open) -> None:
    clock = Clock()
    store, _ = opened(clock)
    put(store, 1)
    folder = store._seat.folder
    hidden = folder.rename(folder.with_name("hidden"))
    for _ in range(3):
        with pytest.raises(StoreUnavailableError):
            get(store, 1)
        with pytest.raises(StoreUnavailableError):
            store.write(key_of(2), memoryview(block_of(2)))
    assert not folder.exists()
    assert not store.ready()
    hidden.rename(folder)
    with pytest.raises(StoreUnavailableError, match="left alone"):
        get(store, 1)
    clock.now += 2.0
    assert store.ready()
    assert get(store, 1) == block_of(1)
    put(store, 2)


def test_errors_in_a_row_are_not_tried_again_until_the_back_off_ends(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    store, _ = opened(clock)
    put(store, 1)
    calls = 0

    def broken(*_: object) -> int:
        nonlocal calls
        calls += 1
        raise OSError(errno.EIO, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "readv", broken)
        for _ in range(20):
            with pytest.raises(StoreUnavailableError):
                get(store, 1)
        assert calls == 3
        clock.now += 1.5
        with pytest.raises(StoreUnavailableError):
            get(store, 1)
        assert calls == 4
        clock.now += 1.5
        assert not store.ready(), "the second back-off is longer"
    clock.now += 1.0
    assert get(store, 1) == block_of(1)


def test_a_failed_write_leaves_nothing_and_says_what_it_gave_up(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = opened()
    for number in range(CAPACITY):
        put(store, number)

    def broken(*_: object) -> int:
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(os, "writev", broken)
    with pytest.raises(StoreUnavailableError) as failure:
        store.write(key_of(100), memoryview(block_of(100)))
    assert failure.value.evicted == (key_of(0),)
    assert not store.holds(key_of(100))
    assert list((store._seat.folder / "tmp").iterdir()) == []
    store.check_integrity()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_full_before_its_quota_makes_do_with_what_fits(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(tmp_path)], check=True, timeout=WAIT_S)
    clock = Clock()
    store = DiskStore(options(tmp_path, quota_bytes=1000 * FILE_BYTES), LAYOUT, clock=clock)
    try:
        store.open()
        refused = stored = 0
        for number in range(400):
            try:
                stored += store.write(key_of(number), memoryview(block_of(number))).stored
            except StoreUnavailableError:
                refused += 1
            store.check_integrity()
        assert refused == 1, "after the first refusal, blocks are given up instead"
        assert stored == 399
        assert get(store, 399) == block_of(399)
        assert store.ready()
    finally:
        store.close()
        subprocess.run(["umount", str(tmp_path)], check=True, timeout=WAIT_S)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_becomes_read_only_still_reads(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], check=True, timeout=WAIT_S)
    store = DiskStore(options(tmp_path), LAYOUT, clock=Clock())
    try:
        store.open()
        put(store, 1)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True, timeout=WAIT_S)
        for number in range(2, 8):
            with pytest.raises(StoreUnavailableError):
                store.write(key_of(number), memoryview(block_of(number)))
        assert get(store, 1) == block_of(1)
        assert store.ready()
        store.close()
        with pytest.raises(ConfigError, match="DYN_KVBM_DISK_CACHE_DIR"):
            DiskStore(options(tmp_path), LAYOUT).open()
    finally:
        store.close()
        subprocess.run(["umount", str(tmp_path)], check=True, timeout=WAIT_S)


def test_a_short_write_is_a_full_disk_for_a_while(opened: Open) -> None:
    clock = Clock()
    store, _ = opened(clock)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, hard))
    try:
        with pytest.raises(StoreUnavailableError):
            store.write(key_of(1), memoryview(block_of(1)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not store.write(key_of(1), memoryview(block_of(1))).stored
    clock.now += 61.0
    put(store, 1)
    assert get(store, 1) == block_of(1)


def test_a_folder_that_can_not_be_made_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match="DYN_KVBM_DISK_CACHE_DIR"):
        DiskStore(options(tmp_path / "file"), LAYOUT).open()


def test_a_quota_below_one_block_is_a_wrong_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="less than one block"):
        DiskStore(options(tmp_path, quota_bytes=BLOCK_BYTES), LAYOUT).open()


def test_files_are_the_owners_alone(opened: Open) -> None:
    store, _ = opened()
    put(store, 1)
    assert path_of(store, 1).stat().st_mode & 0o777 == 0o600
    assert store._seat.folder.stat().st_mode & 0o777 == 0o700


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from store_contract import block_of, key_of
from test_kvbm_disk import LAYOUT, options
from tandem_kvbm.disk.store import DiskStore
store = DiskStore(options(Path(sys.argv[1]), fdatasync=sys.argv[3] == "sync"), LAYOUT)
store.open()
print("open", flush=True)
number = 0
while True:
    store.write(key_of(number % 40), memoryview(block_of(number % 40)))
    number += 1
    if number % 10 == 0:
        print(number, flush=True)
"""


@pytest.mark.parametrize("lines", [1, 4, 9, 17])
def test_a_writer_killed_at_any_moment_leaves_no_wrong_block(tmp_path: Path, opened: Open, lines: int) -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    command = [sys.executable, "-c", WRITER, str(tmp_path), str(here), "sync" if lines % 2 else "no"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(lines + 1):
            assert writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        writer.wait(WAIT_S)
    store, keys = opened()
    assert store._seat.folder.name == "seat-0", "the lock died with its holder"
    assert keys
    names = {key_of(number): number for number in range(40)}
    for key in keys:
        assert get(store, names[key]) == block_of(names[key])
    assert list((store._seat.folder / "tmp").iterdir()) == []
    store.check_integrity()
