# SPDX-License-Identifier: Apache-2.0
"""The environment of an engine."""

import socket
from pathlib import Path
from typing import Any

import pytest

from tandem_worker.config import WorkerSettings
from tandem_worker.environment import LOOPBACK, OVERRIDABLE, engine_environment, overridable, reachable_address
from tandem_worker.ranks import LocalRanks


def environment(first: int = 0, ranks: int = 1, **settings: Any) -> dict[str, str]:
    """The variables of a worker with these settings and data-parallel ranks."""
    return engine_environment(WorkerSettings(**settings), token="t", stub_pid=42, scratch=Path("/scratch"), ranks=LocalRanks(first, ranks))


def test_the_guard_finds_its_processes_by_token_and_pid() -> None:
    """Every engine process inherits both."""
    variables = environment()
    assert (variables["TANDEM_WORKER_TOKEN"], variables["TANDEM_STUB_PID"], variables["VLLM_RPC_BASE_PATH"]) == ("t", "42", "/scratch")


def test_engine_processes_are_spawned() -> None:
    """A fork would inherit the stub's threads and locks."""
    assert environment()["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


@pytest.mark.parametrize(("index", "first", "ranks", "port"), [(0, 0, 1, "5600"), (3, 0, 1, "5603"), (1, 0, 2, "5602"), (0, 2, 2, "5598")])
def test_side_channels_are_offset_by_the_worker_index(index: int, first: int, ranks: int, port: str) -> None:
    """Two workers of one host must not share a port, nor their ranks; vLLM adds the rank."""
    assert environment(first, ranks, worker_index=index)["VLLM_NIXL_SIDE_CHANNEL_PORT"] == port


def test_the_side_channel_host_can_be_given() -> None:
    """For hosts with several networks."""
    assert environment(side_channel_host="10.0.0.7")["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.0.0.7"


@pytest.mark.parametrize(("setting", "variable"), [("gpus", "CUDA_VISIBLE_DEVICES"), ("cpu_cores", "VLLM_CPU_OMP_THREADS_BIND")])
def test_placement_is_set_only_when_given(setting: str, variable: str) -> None:
    """Empty leaves the server's own."""
    assert environment(**{setting: "0,1"})[variable] == "0,1"
    assert variable not in environment()


def test_an_address_that_can_be_bound_is_advertised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers on other hosts reach the handshake there."""
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.0.2")
    assert reachable_address() == "127.0.0.2"


def test_an_address_that_is_not_this_hosts_falls_back_to_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host names sometimes resolve to somebody else; 192.0.2.0/24 is nobody's (RFC 5737)."""
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "192.0.2.1")
    assert reachable_address() == LOOPBACK


def test_a_host_name_that_does_not_resolve_falls_back_to_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on many laptops."""

    def fail(_: str) -> str:
        raise socket.gaierror

    monkeypatch.setattr(socket, "gethostbyname", fail)
    assert reachable_address() == LOOPBACK


@pytest.mark.parametrize(("host", "name"), [("gpu_07.Rack-2", "gpu-07-rack-2-3"), ("---", "host-3")])
def test_a_worker_has_a_name_for_buckets(monkeypatch: pytest.MonkeyPatch, host: str, name: str) -> None:
    """The same after a restart, and different for each worker of a host."""
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    variables = overridable(WorkerSettings(worker_index=3))
    assert variables["TANDEM_KVBM_WORKER_ID"] == name
    assert OVERRIDABLE.items() < variables.items()
