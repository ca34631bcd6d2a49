# SPDX-License-Identifier: Apache-2.0
"""Files that are replaced whole or not at all."""

from pathlib import Path

import pytest

from tandem_protocol.durable import replace_file


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    """Also in a folder that isn't there yet."""
    path = tmp_path / "new" / "state"
    replace_file(path, b"first, and longer")
    replace_file(path, b"second")
    assert path.read_bytes() == b"second"
    assert [one.name for one in path.parent.iterdir()] == ["state"]


def test_what_can_not_be_written_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, seen at the flush to it."""
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "state"
    replace_file(path, b"old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["state"]
