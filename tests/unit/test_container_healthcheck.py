# SPDX-License-Identifier: Apache-2.0
"""What the image's health check asks, by role."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from container_rig import CONTAINER


@pytest.fixture(scope="module")
def check() -> Any:
    """container/healthcheck.py as a module."""
    spec = importlib.util.spec_from_file_location("tandem_healthcheck", CONTAINER / "healthcheck.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STATE = {"http_port": 8010, "admin_urls": {"vllm": "http://0.0.0.0:8081", "decode": "http://127.0.0.1:-1"},
         "router_urls": ["http://127.0.0.1:8079"]}


def test_a_server_is_ready_and_its_parts_live(check: Any) -> None:
    """Triton's readiness and each admin server that there is, over loopback."""
    assert check.wanted("worker", {}, STATE) == [
        "http://127.0.0.1:8010/v2/health/ready", "http://127.0.0.1:8081/live", "http://127.0.0.1:8079/live",
    ]


def test_a_server_that_has_not_started_is_not_healthy(check: Any) -> None:
    """There is nothing to ask."""
    with pytest.raises(LookupError, match="not been started"):
        check.wanted("router", {}, None)


def test_a_consolidator_has_a_port_of_its_own(check: Any) -> None:
    """8481 plus the worker's index, as its settings say."""
    assert check.wanted("consolidator", {}, None) == ["http://127.0.0.1:8481/live"]
    moved = {"TANDEM_CONSOLIDATOR_ADMIN_PORT": "9000", "TANDEM_CONSOLIDATOR_WORKER_INDEX": "2", "TANDEM_CONSOLIDATOR_ADMIN_HOST": "0.0.0.0"}
    assert check.wanted("consolidator", moved, None) == ["http://127.0.0.1:9002/live"]


def test_a_planner_has_one_too(check: Any) -> None:
    """8078; with 0 it takes any, which only it knows."""
    assert check.wanted("planner", {}, None) == ["http://127.0.0.1:8078/live"]
    assert check.wanted("planner", {"TANDEM_PLANNER_ADMIN_PORT": "0"}, None) == []


def test_the_newest_run_counts(check: Any, tmp_path: Path) -> None:
    """None before the first one."""
    assert check.newest_state(tmp_path) is None
    (tmp_path / "8000").mkdir()
    (tmp_path / "8000" / "state.json").write_text(json.dumps(STATE))
    assert check.newest_state(tmp_path) == STATE


def test_the_role_is_that_of_the_child_of_process_1(check: Any, tmp_path: Path) -> None:
    """tini started it with the variable that the entry point sets."""
    (tmp_path / "1" / "task" / "1").mkdir(parents=True)
    (tmp_path / "1" / "task" / "1" / "children").write_text("7 ")
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "environ").write_bytes(b"PATH=/bin\0TANDEM_CONTAINER_ROLE=router\0")
    assert check.container_role(tmp_path) == "router"
    (tmp_path / "7" / "environ").write_bytes(b"PATH=/bin\0")
    with pytest.raises(LookupError):
        check.container_role(tmp_path)


def test_silence_is_no_answer(check: Any) -> None:
    """Nothing listens on port 9 here; the standard library alone was needed."""
    assert not check.answers("http://127.0.0.1:9/live")
    assert "tandem_healthcheck" not in sys.modules
