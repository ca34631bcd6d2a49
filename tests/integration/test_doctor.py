# SPDX-License-Identifier: Apache-2.0
"""`tandem doctor` on this very host, with its NIXL transfer, and with etcd where it is installed."""

import json
from pathlib import Path
from typing import Any

import pytest

from etcds import BINARY, Etcd
from servers import tandem

pytestmark = pytest.mark.slow


def examine(run_dir: Path, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code, and the checks by name."""
    done = tandem(run_dir, "doctor", "--json", *arguments, timeout_s=300)
    return done.returncode, {check["check"]: check for check in json.loads(done.stdout)["checks"]}


def test_a_host_that_runs_these_tests_is_healthy(tmp_path: Path, tiny_model: Path) -> None:
    """Bytes really moved between two processes; the folder of discovery is looked at."""
    code, checks = examine(tmp_path, "--model", str(tiny_model), "--discovery", f"file:{tmp_path / 'discovery'}")
    assert code == 0, checks
    assert "64 MiB of " in checks["nixl"]["says"]
    assert "GB/s by " in checks["nixl"]["says"]
    assert checks["nixl"]["verdict"] in {"ok", "warning"}
    assert checks["stub"]["verdict"] == checks["numpy"]["verdict"] == checks["vllm"]["verdict"] == checks["model"]["verdict"] == "ok"


@pytest.mark.skipif(BINARY is None, reason="etcd is not installed")
def test_etcd_is_asked(tmp_path: Path, tiny_model: Path) -> None:
    """While it lives, and after it was killed."""
    etcd = Etcd(tmp_path)
    etcd.start()
    options = ["--no-nixl", "--model", str(tiny_model), "--discovery", etcd.url]
    try:
        code, checks = examine(tmp_path, *options)
        assert (code, checks["discovery"]["verdict"]) == (0, "ok"), checks
        assert "0 workers are registered" in checks["discovery"]["says"]
    finally:
        etcd.kill()
    code, checks = examine(tmp_path, *options)
    assert (code, checks["discovery"]["verdict"]) == (1, "failure")


def test_a_table_for_people_and_an_exit_code(tmp_path: Path) -> None:
    """A model that is not there is a failure with its fix."""
    done = tandem(tmp_path, "doctor", "--no-nixl", "--model", str(tmp_path / "none"), timeout_s=120)
    assert done.returncode == 1
    assert "FAIL  there is no model folder" in done.stdout
    assert "fix: give --model FOLDER_OR_ID" in done.stdout
