# SPDX-License-Identifier: Apache-2.0
"""What the image's entry point runs for each role, and what it refuses before anything starts."""

from pathlib import Path

import pytest

from container_rig import CONTAINER, Stage

ENTRY = CONTAINER / "entrypoint.sh"


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """`tandem` and `python` only note how they are called."""
    made = Stage(tmp_path)
    made.recorder("tandem")
    made.recorder("python")
    return made


def run(stage: Stage, *arguments: str, **environment: str) -> list[str]:
    """The last program that the entry point ran, with its arguments."""
    done = stage.run(ENTRY, *arguments, **{"TANDEM_HOME": str(stage.folder / "home"), **environment})
    assert done.returncode == 0, done.stderr
    return stage.calls()[-1]


def refused(stage: Stage, *arguments: str, **environment: str) -> str:
    """The sentence of a refusal, after which nothing was run."""
    done = stage.run(ENTRY, *arguments, **{"TANDEM_HOME": str(stage.folder / "home"), **environment})
    assert (done.returncode, stage.calls()) == (2, [])
    return done.stderr.strip()


@pytest.mark.parametrize(
    ("arguments", "environment", "command"),
    [
        ([], {}, ["--mode", "agg", "--routers", "0"]),
        (["worker", "--max-model-len", "512"], {}, ["--mode", "agg", "--routers", "0", "--max-model-len", "512"]),
        (["worker", "--omni", "--model", "org/pipeline"], {}, ["--omni", "--model", "org/pipeline"]),
        (["worker", "--mode", "disagg"], {}, ["--routers", "0", "--mode", "disagg"]),
        (["worker", "--mode=both", "--routers=1"], {}, ["--mode=both", "--routers=1"]),
        (["worker", "--is-prefill-worker"], {}, ["--routers", "0", "--is-prefill-worker"]),
        (["worker", "--is-decode-worker"], {}, ["--routers", "0", "--is-decode-worker"]),
        (["worker"], {"DYN_VLLM_IS_DECODE_WORKER": "true"}, ["--routers", "0"]),
        (["worker"], {"DYN_VLLM_IS_DECODE_WORKER": "0"}, ["--mode", "agg", "--routers", "0"]),
        (["router"], {"TANDEM_DISCOVERY": "etcd://etcd:2379"}, ["--mode", "agg", "--workers", "0"]),
        (["router", "--discovery", "file:/d"], {}, ["--mode", "agg", "--workers", "0", "--discovery", "file:/d"]),
    ],
)
def test_worker_and_router_are_the_launcher(stage: Stage, arguments: list[str], environment: dict[str, str], command: list[str]) -> None:
    """One engine without a router, or routers without an engine; what is given explicitly stands."""
    assert run(stage, *arguments, **environment) == ["tandem", "serve", *command]


def test_other_roles_are_modules(stage: Stage) -> None:
    """The planner takes flags, a consolidator none."""
    assert run(stage, "planner", "--no-operation") == ["python", "-m", "tandem_planner", "--no-operation"]
    assert run(stage, "consolidator") == ["python", "-m", "tandem_kvbm.consolidator"]
    assert run(stage, "tandem", "doctor") == ["tandem", "doctor"]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["router"], {}, "set TANDEM_DISCOVERY"),
        (["worker"], {"TANDEM_DISCOVERY": "etcd://etcd:2379"}, "set TANDEM_GRPC_URL=HOST:8001"),
        (["worker"], {"TANDEM_DISCOVERY": "zookeeper://z"}, "use file:/shared/folder, etcd://host:2379 or kubernetes"),
        (["worker"], {"TANDEM_DISCOVERY": "kubernetes"}, "set TANDEM_GRPC_URL=HOST:8001"),
        (["worker"], {"TANDEM_MODEL": "/models/absent"}, "mount it"),
        (["worker"], {"TANDEM_HOME": "/proc/absent"}, "/proc/absent can't be written by user"),
        (["consolidator", "--port"], {}, "takes its settings from the environment"),
        (["--max-model-len", "512"], {}, "the first argument is the role"),
    ],
)
def test_what_cannot_work_is_refused(stage: Stage, arguments: list[str], environment: dict[str, str], message: str) -> None:
    """In a sentence with the fix, in milliseconds instead of at the engine's start."""
    assert message in refused(stage, *arguments, **environment)


@pytest.mark.parametrize("given", [{"TANDEM_GRPC_URL": "10.0.0.1:8001"}, {}])
def test_an_address_may_be_a_variable_or_a_flag(stage: Stage, given: dict[str, str]) -> None:
    """Either says where routers reach the worker."""
    flags = [] if given else ["--grpc-url", "10.0.0.1:8001"]
    assert run(stage, "worker", *flags, TANDEM_DISCOVERY="etcd://etcd:2379", **given)[:2] == ["tandem", "serve"]


def test_the_role_is_left_for_the_health_check(stage: Stage) -> None:
    """In the environment of what is run."""
    stage.program("show", "echo $TANDEM_CONTAINER_ROLE")
    assert stage.run(ENTRY, "show").stdout == "show\n"


def test_an_image_for_cuda_needs_a_gpu(stage: Stage, tmp_path: Path) -> None:
    """The installer's mark says what the image is for; the driver is checked when a worker starts."""
    installed = tmp_path / "opt"
    (installed / "venv" / ".tandem").mkdir(parents=True)
    (installed / "venv" / ".tandem" / "platform").write_text("cuda\n")
    (installed / "container").symlink_to(CONTAINER)
    copied = installed / "copy"
    copied.mkdir()
    for name in ("entrypoint.sh", "checks.sh", "versions.env"):
        (copied / name).write_bytes((CONTAINER / name).read_bytes())
    (copied / "entrypoint.sh").chmod(0o755)
    stage.program("nvidia-smi", "echo 'CUDA Version: 12.2'; case \"$*\" in *driver_version*) echo 535.1;; esac")
    done = stage.run(copied / "entrypoint.sh", "worker", TANDEM_HOME=str(tmp_path / "home"))
    assert done.returncode == 2
    assert "install driver 580.65.06 or newer" in done.stderr
    assert stage.run(copied / "entrypoint.sh", "worker", TANDEM_HOME=str(tmp_path / "home"), TANDEM_PLATFORM="cpu").returncode == 0


def test_a_driver_of_many_lines_is_read_to_its_end(stage: Stage) -> None:
    """A reader that leaves after the first GPU's line would kill nvidia-smi (SIGPIPE) in some runs, or, with this many, in all."""
    drivers = "echo 'CUDA Version: 99.9'; case \"$*\" in *driver_version*) yes 999.1 | head -n 100000;; *compute_cap*) echo 9.0;; esac"
    stage.program("nvidia-smi", drivers)
    checks = 'set -Eeuo pipefail; . "$0/versions.env"; . "$0/checks.sh"; check_driver; echo went on'
    done = stage.run(Path("bash"), "-c", checks, str(CONTAINER))
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr


def test_a_gpu_is_seen_among_many_lines(stage: Stage) -> None:
    stage.program("nvidia-smi", "for gpu in {0..20000}; do echo \"GPU $gpu: H200\"; done")
    done = stage.run(Path("bash"), "-c", 'set -Eeuo pipefail; . "$0/checks.sh"; decide_platform auto', str(CONTAINER))
    assert done.stdout == "cuda"
