# SPDX-License-Identifier: Apache-2.0
"""torchvision's build for CUDA is imported on a CPU, with a package that plays its part; the real one is in vllm-omni's environment."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from tandem_worker.omni.torchvision_import import Finder

NAME = "played_torchvision"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that says at its import whether what must come first has come."""
    folder = tmp_path / NAME
    folder.mkdir()
    (folder / "__init__.py").write_text("from declared import operators\n")
    (folder / "transforms.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in (NAME, f"{NAME}.transforms", "declared"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


def test_operators_are_declared_before_the_package_is_imported(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its folder, where its library is; once, also when its modules are imported after it."""
    asked: list[Path] = []

    def declare(folder: Path) -> None:
        asked.append(folder)
        monkeypatch.setitem(sys.modules, "declared", type(sys)("declared"))
        monkeypatch.setattr(sys.modules["declared"], "operators", 2, raising=False)

    monkeypatch.setattr(sys, "meta_path", [Finder(declare, NAME), *sys.meta_path])
    assert importlib.import_module(NAME).operators == 2
    importlib.import_module(f"{NAME}.transforms")
    assert asked == [package]


def test_a_look_for_the_package_imports_nothing(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers looks for it; torch itself may just be half imported."""
    asked: list[Path] = []
    monkeypatch.setattr(sys, "meta_path", [Finder(asked.append, NAME), *sys.meta_path])
    found = importlib.util.find_spec(NAME)
    assert found is not None
    assert found.origin == str(package / "__init__.py")
    assert asked == []


def test_a_package_that_is_not_there_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """And other packages are found as ever."""
    monkeypatch.setattr(sys, "meta_path", [Finder(lambda _: None, "no_such_package_at_all"), *sys.meta_path])
    assert importlib.util.find_spec("no_such_package_at_all") is None
    assert importlib.util.find_spec("json") is not None
