# SPDX-License-Identifier: Apache-2.0
"""tritonserver's command line, environment and backends."""

import sys
from pathlib import Path

import pytest

from tandem_cli.serve import tritonserver
from tandem_cli.serve.tritonserver import TritonInstall, find_triton, join_backends, server_command, server_environment
from tandem_protocol.errors import ConfigError

INSTALL = TritonInstall(Path("/t/bin/tritonserver"), Path("/t/backends"), (Path("/t/libs"), Path("/py/lib")))


@pytest.mark.parametrize(
    "option",
    ["--model-repository=/run/models", "--backend-directory=/run/backends", "--http-port=8000", "--grpc-port=8001", "--metrics-port=8002",
     "--backend-config=python,thread-pool-size=256", "--backend-config=python,stub-timeout-seconds=900", "--model-control-mode=explicit",
     "--load-model=*", "--exit-timeout-secs=30"],
)
def test_command_line(option: str) -> None:
    """Each option once, after the binary."""
    command = server_command(INSTALL, Path("/run/models"), Path("/run/backends"), (8000, 8001, 8002), 900)
    assert command[0] == "/t/bin/tritonserver"
    assert command.count(option) == 1


def test_the_stub_finds_this_python_and_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before those of the caller."""
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    environment = server_environment(INSTALL, {})
    assert environment["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"
    assert environment["LD_LIBRARY_PATH"] == "/t/libs:/py/lib:/mine"


def test_the_containers_tritonserver_needs_no_library_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's is left as it is, also when there is none."""
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    assert "LD_LIBRARY_PATH" not in server_environment(TritonInstall(Path("/t"), Path("/b"), ()), {})


def test_worker_settings_win_over_the_callers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag wins over a variable; everything else is inherited."""
    monkeypatch.setenv("DYN_SYSTEM_PORT", "1")
    monkeypatch.setenv("TANDEM_TEST_INHERITED", "yes")
    environment = server_environment(INSTALL, {"DYN_SYSTEM_PORT": "2"})
    assert (environment["DYN_SYSTEM_PORT"], environment["TANDEM_TEST_INHERITED"]) == ("2", "yes")


def test_the_drop_in_replaces_tritons_own_vllm_backend(tmp_path: Path) -> None:
    """Twice in a row, and with everything else linked."""
    own, drop_in, target = tmp_path / "own", tmp_path / "drop_in", tmp_path / "target"
    for name in ("python", "vllm"):
        (own / name).mkdir(parents=True)
    (drop_in / "__pycache__").mkdir(parents=True)
    (drop_in / "model.py").write_text("mine")
    for _ in range(2):
        join_backends(TritonInstall(Path("/t"), own, ()), drop_in, target)
    assert (target / "python").readlink() == own / "python"
    assert {path.name: path.read_text() for path in (target / "vllm").iterdir()} == {"model.py": "mine"}


def test_the_containers_tritonserver_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as it should be, nothing has to be prepared."""
    monkeypatch.setattr(tritonserver, "CONTAINER", tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tritonserver").touch()
    assert find_triton() == TritonInstall(tmp_path / "bin" / "tritonserver", tmp_path / "backends", ())


def test_without_any_tritonserver_the_message_names_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The container, or the package."""
    monkeypatch.setattr(tritonserver, "CONTAINER", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="run in NVIDIA's Triton container, or install the package nvidia-pytriton"):
        find_triton()
