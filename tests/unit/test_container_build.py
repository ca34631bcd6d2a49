# SPDX-License-Identifier: Apache-2.0
"""`./build.sh image`: which docker command it runs, what it refuses, what goes into an image, and that all scripts are sound."""

import os
import shlex
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

from container_rig import CONTAINER, Stage
from tandem_protocol.version import VERSION

ROOT = CONTAINER.parent
SCRIPTS = sorted(CONTAINER.glob("*.sh"))


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """A docker that only notes how it is called."""
    made = Stage(tmp_path)
    made.recorder("docker")
    return made


def command(stage: Stage, *arguments: str, **environment: str) -> list[str]:
    """The docker command that would be run."""
    done = stage.run(ROOT / "build.sh", "image", "--print", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def build_args(words: list[str]) -> dict[str, str]:
    """Build arguments with a value, by name."""
    given = [words[i + 1] for i, word in enumerate(words) if word == "--build-arg"]
    return dict(arg.split("=", 1) for arg in given if "=" in arg)


@pytest.mark.parametrize(("platform", "base"), [("cpu", "debian:"), ("cuda", "nvcr.io/nvidia/tritonserver:")])
def test_defaults_come_from_the_pins(stage: Stage, platform: str, base: str) -> None:
    """Base by platform, tag by version, labels by commit and time."""
    words = command(stage, f"--{platform}")
    arguments = build_args(words)
    assert arguments["BASE_IMAGE"].startswith(base)
    assert words[words.index("--tag") + 1] == f"tandem:{VERSION}-{platform}"
    assert (arguments["PLATFORM"], arguments["VERSION"]) == (platform, VERSION)
    assert len(arguments["REVISION"].removesuffix("-dirty")) in (40, len("unknown"))


def test_what_is_given_stands(stage: Stage) -> None:
    """Base, tag, LMCache, vllm-omni, and docker's own options after two dashes."""
    words = command(stage, "--cuda", "--lmcache", "--omni", "--base", "mine:1", "--tag", "ours:2", "--", "--network=host")
    assert build_args(words)["BASE_IMAGE"] == "mine:1"
    assert build_args(words)["INSTALL_OPTIONS"] == "--lmcache --omni"
    assert words[words.index("--tag") + 1] == "ours:2"
    assert words[-2:] == ["--network=host", str(ROOT)]


def test_settings_of_pip_are_passed_by_name(stage: Stage) -> None:
    """Docker takes their values from the environment, so that no address or password stands on a command line."""
    words = command(stage, "--cpu", PIP_INDEX_URL="https://user:secret@index/simple")
    assert "PIP_INDEX_URL" in words
    assert "PIP_EXTRA_INDEX_URL" not in words
    assert not any("secret" in word for word in words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--cpu", "--lmcache"], "leave --lmcache out"), (["--gpu"], "unknown argument '--gpu'"), (["--cpu", "--tag"], "--tag needs a value")],
)
def test_what_cannot_be_built_is_refused(stage: Stage, arguments: list[str], message: str) -> None:
    """Before docker is asked."""
    done = stage.run(ROOT / "build.sh", "image", *arguments)
    assert (done.returncode, message in done.stderr, stage.calls()) == (2, True, [])


def test_an_engine_that_is_away_is_named(stage: Stage) -> None:
    """Not docker's own message alone."""
    stage.program("docker", "exit 1")
    done = stage.run(ROOT / "build.sh", "image", "--cpu")
    assert (done.returncode, "set DOCKER_HOST" in done.stderr) == (2, True)


def test_docker_is_run(stage: Stage) -> None:
    """With the command that --print shows."""
    assert stage.run(ROOT / "build.sh", "image", "--cpu", "--tag", "ours:3").returncode == 0
    version, build = stage.calls()
    assert version == ["docker", "version"]
    assert build[:2] == ["docker", "build"]
    assert build[build.index("--tag") + 1] == "ours:3"


@pytest.mark.parametrize(("platform", "options", "fetched"), [("cpu", [], 1), ("cpu", ["--omni"], 2), ("cuda", ["--lmcache"], 3),
                                                             ("cuda", ["--lmcache", "--omni"], 4)])
def test_a_wheelhouse_is_filled_by_this_hosts_pip(stage: Stage, platform: str, options: list[str], fetched: int) -> None:
    """The lock, for CUDA also torch with its libraries, LMCache and vllm-omni if asked for; the build comes after."""
    stage.recorder("python3")
    assert stage.run(ROOT / "build.sh", "image", f"--{platform}", "--wheelhouse", *options).returncode == 0
    wheels = [call for call in stage.calls() if call[:4] == ["python3", "-m", "pip", "wheel"]]
    assert len(wheels) == fetched
    assert str(ROOT / "requirements" / f"{platform}.txt") in wheels[0]
    assert (str(ROOT / "requirements" / f"omni-{platform}.txt") in wheels[-1]) == ("--omni" in options)
    assert all(call[call.index("-w") + 1] == str(CONTAINER / "wheelhouse") for call in wheels)
    assert stage.calls()[-1][:2] == ["docker", "build"]


def test_the_context_holds_what_the_image_needs() -> None:
    """.dockerignore leaves out everything but these, and every COPY and install of the Dockerfile finds its source."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in lines if line.startswith("!")]
    assert "*" in lines
    assert all((ROOT / name).exists() for name in kept)
    words = (CONTAINER / "Dockerfile").read_text().split()
    sources = [word.removeprefix("/build/") for word in words if word.startswith("/build/") and "wheelhouse" not in word]
    assert [source for source in sources if not any(fnmatch(source, f"{name}*") for name in kept)] == []
    assert [source for source in sources if not (ROOT / source).exists()] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_sound(script: Path) -> None:
    """It parses; shellcheck finds nothing where it is installed."""
    assert subprocess.run(["bash", "-n", script], check=False, timeout=60).returncode == 0
    assert os.access(script, os.X_OK) == (script.name not in {"checks.sh", "omni.sh"})
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", "-x", "-P", CONTAINER, script], capture_output=True, text=True, check=False, timeout=60)
        assert checked.returncode == 0, checked.stdout
