# SPDX-License-Identifier: Apache-2.0
"""What container/install_vllm.sh decides, with drivers and compilers that only play their part, and that its steps are not repeated."""

import shutil
from pathlib import Path

import pytest

from container_rig import CONTAINER, Stage

INSTALL = CONTAINER / "install_vllm.sh"
HEADER = "| NVIDIA-SMI {driver}      Driver Version: {driver}      CUDA Version: {cuda}     |"
PYTHON = """
case "$*" in
  *version_info*) echo "${PLAYED_PYTHON:-3.11}" ;;
  -VV) echo "Python 3.11" ;;
  *ensurepip*) exit "${NO_VENV:-0}" ;;
  "-m venv "*) mkdir -p "$3/bin" "$3/lib/python3.11/site-packages"; cp "$0" "$3/bin/python" ;;
  *) echo "$*" >> "$PIP_LOG"; case "$*" in *"${PIP_FAILS:-nothing}"*) exit 1 ;; esac ;;
esac
"""


no_gpu = pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="the driver of this machine would be seen")


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """A machine with a Python, and without a GPU."""
    made = Stage(tmp_path)
    made.program("python3", PYTHON)
    made.program("uname", "echo x86_64")
    return made


def driver(stage: Stage, version: str = "580.82.07", cuda: str = "13.0", capability: str = "9.0") -> None:
    """A GPU with this driver."""
    stage.program("nvidia-smi", f"""
case "$*" in
  -L) echo "GPU 0: NVIDIA H200 (UUID: GPU-0)" ;;
  *driver_version*) echo "{version}" ;;
  *compute_cap*) echo "{capability}" ;;
  *) echo "{HEADER.format(driver=version, cuda=cuda)}" ;;
esac""")


def check(stage: Stage, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and message of `--check`."""
    done = stage.run(INSTALL, "--check", *arguments, **environment)
    return done.returncode, done.stderr.strip()


@no_gpu
def test_the_platform_is_the_machines(stage: Stage) -> None:
    """A GPU makes it CUDA, none makes it CPU; an argument wins."""
    assert check(stage) == (0, "install_vllm.sh: this machine can run the cpu environment")
    driver(stage)
    assert check(stage) == (0, "install_vllm.sh: this machine can run the cuda environment")
    assert check(stage, "--cpu") == (0, "install_vllm.sh: this machine can run the cpu environment")


@pytest.mark.parametrize(("version", "cuda"), [("580.65.06", "13.0"), ("590.10.01", "13.1"), ("600.1.1", "14.0"), ("575.57.08", "13.0")])
def test_a_driver_that_speaks_the_cuda_is_taken(stage: Stage, version: str, cuda: str) -> None:
    """What counts is the CUDA that it speaks: compatibility packages raise that of older drivers."""
    driver(stage, version, cuda)
    assert check(stage, "--cuda")[0] == 0


@pytest.mark.parametrize(("version", "cuda"), [("570.124.06", "12.8"), ("550.54.14", "12.4"), ("535.1", "12.2"), ("470.1", "N/A")])
def test_an_old_driver_is_refused_with_the_new_one(stage: Stage, version: str, cuda: str) -> None:
    """The message names what is there, what is needed, and what to install."""
    driver(stage, version, cuda)
    code, message = check(stage, "--cuda")
    assert code == 2
    assert version in message
    assert "install driver 580.65.06 or newer, or install with --cpu" in message


def test_a_newer_header_of_nvidia_smi_is_read(stage: Stage) -> None:
    """Later drivers write `CUDA UMD Version`."""
    driver(stage)
    text = (stage.folder / "bin" / "nvidia-smi").read_text()
    stage.program("nvidia-smi", text.replace("CUDA Version", "CUDA UMD Version"))
    assert check(stage, "--cuda")[0] == 0


@pytest.mark.parametrize(("capability", "code"), [("7.0", 2), ("6.1", 2), ("7.5", 0), ("8.9", 0), ("10.0", 0), ("12.0", 0)])
def test_gpus_older_than_the_wheels_are_refused(stage: Stage, capability: str, code: int) -> None:
    """CUDA 13 begins with Turing."""
    driver(stage, capability=capability)
    found, message = check(stage, "--cuda")
    assert found == code
    assert ("too old" in message) == (code == 2)


def test_a_broken_driver_is_no_missing_one(stage: Stage) -> None:
    """nvidia-smi is there and fails: its first line is in the message."""
    stage.program("nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    code, message = check(stage, "--cuda")
    assert code == 2
    assert "version mismatch" in message
    assert "reload or reinstall the NVIDIA driver" in message


@no_gpu
def test_an_image_is_built_without_a_driver(stage: Stage) -> None:
    """--cuda without nvidia-smi goes on, and says when it is checked."""
    code, message = check(stage, "--cuda")
    assert code == 0
    assert "checked again when a worker starts" in message


@pytest.mark.parametrize(("release", "warned"), [("13.0", False), ("13.2", False), ("12.4", True), ("11.8", True)])
def test_a_compiler_of_another_cuda_is_a_warning(stage: Stage, release: str, warned: bool) -> None:
    """It matters only for kernels that are compiled at run time."""
    driver(stage)
    stage.program("nvcc", f"echo 'Cuda compilation tools, release {release}, V{release}.76'")
    code, message = check(stage, "--cuda")
    assert code == 0
    assert ("nvcc is of CUDA" in message) == warned


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({"PLAYED_PYTHON": "3.13"}, [], "tritonserver's stubs are for 3.11 and 3.12"),
        ({"NO_VENV": "1"}, [], "install python3-venv (Debian: apt-get install python3.11-venv)"),
        ({}, ["--python", "/nowhere/python"], "/nowhere/python does not run"),
        ({}, ["--cpu", "--lmcache"], "leave --lmcache out"),
        ({}, ["--rocm"], "unknown argument '--rocm'"),
        ({}, ["--prefix"], "--prefix needs a value"),
    ],
)
def test_what_cannot_work_is_refused_with_its_fix(stage: Stage, environment: dict[str, str], arguments: list[str], message: str) -> None:
    """One sentence each."""
    code, found = check(stage, *arguments, **environment)
    assert code == 2
    assert message in found


def test_another_machine_is_refused(stage: Stage) -> None:
    """tritonserver's wheel is for x86_64."""
    stage.program("uname", "echo aarch64")
    code, message = check(stage)
    assert (code, "build on x86_64" in message) == (2, True)


def install(stage: Stage, *arguments: str, **environment: str) -> tuple[int, str, list[str]]:
    """Exit code, messages, and what the environment's Python was asked to do, of a whole installation."""
    log = stage.folder / "pip.log"
    log.write_text("")
    done = stage.run(INSTALL, "--prefix", str(stage.folder / "venv"), *arguments, PIP_LOG=str(log), **environment)
    return done.returncode, done.stderr, log.read_text().splitlines()


def test_steps_are_done_once(stage: Stage) -> None:
    """The second run does nothing but look."""
    code, _, first = install(stage, "--cpu")
    assert code == 0
    assert any("requirements/cpu.txt" in line for line in first)
    code, message, second = install(stage, "--cpu")
    assert (code, second) == (0, [])
    assert message.count("done before") == 4


def test_a_broken_installation_goes_on_where_it_stopped(stage: Stage) -> None:
    """What failed says its fix, what was done is not done again."""
    code, message, _ = install(stage, "--cuda", PIP_FAILS="requirements/cuda.txt")
    assert code == 2
    assert "run again when the package index is reachable, or give --wheelhouse" in message
    code, message, again = install(stage, "--cuda")
    assert code == 0
    assert "environment: done before" in message
    assert "torch: done before" in message
    assert any("requirements/cuda.txt" in line for line in again)
    assert not any("torch==" in line for line in again)


@pytest.mark.parametrize(
    ("fails", "fix"),
    [("torch==", "torch 2.13.0 could not be installed"), ("setuptools==", "setuptools"), ("--no-build-isolation", "Tandem's wheel"),
     ("omni-cuda.txt", "vllm-omni's environment could not be installed"), ("lmcache.txt", "leave --lmcache out"),
     ("- cuda", "the environment is not what versions.env says")],
)
def test_every_step_says_its_fix(stage: Stage, fails: str, fix: str) -> None:
    """Whichever fails."""
    code, message, _ = install(stage, "--cuda", "--lmcache", "--omni", PIP_FAILS=fails)
    assert (code, fix in message) == (2, True), message


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_vllm_omnis_environment_is_made_over_the_other(stage: Stage, platform: str) -> None:
    """It sees the other's packages after its own, and the other remembers it; torchvision needs help on CPUs alone."""
    code, message, calls = install(stage, f"--{platform}", "--omni")
    assert code == 0, message
    assert any("--no-deps" in line and line.endswith(f"requirements/omni-{platform}.txt") for line in calls)
    common, omni = stage.folder / "venv", stage.folder / "venv-omni"
    assert (common / ".omni").read_text() == str(omni)
    first, *more = (omni / "lib" / "python3.11" / "site-packages" / "tandem.pth").read_text().splitlines()
    assert first == f'import site; site.addsitedir("{common}/lib/python3.11/site-packages")'
    assert [line.partition(" as ")[0] for line in more] == ["import tandem_worker.omni.torchvision_import"] * (platform == "cpu")
    assert install(stage, f"--{platform}", "--omni")[2] == []


def test_a_wheelhouse_replaces_the_index(stage: Stage) -> None:
    """Only if it holds wheels."""
    wheels = stage.folder / "wheels"
    wheels.mkdir()
    _, _, calls = install(stage, "--cpu", "--wheelhouse", str(wheels))
    assert not any("--no-index" in line for line in calls)
    (wheels / "a-1-py3-none-any.whl").touch()
    (stage.folder / "venv").rename(stage.folder / "old")
    _, _, calls = install(stage, "--cpu", "--wheelhouse", str(wheels))
    assert all(f"--no-index --find-links {wheels}" in line for line in calls if "pip install" in line)
