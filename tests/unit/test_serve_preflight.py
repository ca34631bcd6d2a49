# SPDX-License-Identifier: Apache-2.0
"""Checks before a server starts."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tandem_cli.serve.fleet import Fleet, WorkerPlan
from tandem_cli.serve.preflight import (
    ENGINE_BYTES,
    GIB,
    SHM_BYTES,
    Port,
    available_memory,
    check_memory,
    check_model,
    check_ports,
    check_shared_memory,
    detect_hardware,
    fast_bf16,
    weights_bytes,
)
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role

TWO_ENGINES = Fleet((WorkerPlan("prefill", Role.PREFILL, 1), WorkerPlan("decode", Role.DECODE, 2)), ())


class Usage(NamedTuple):
    """What shutil.disk_usage returns."""

    total: int
    used: int
    free: int


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which somebody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_free_ports_pass() -> None:
    """Checking does not take them."""
    port = free_port()
    check_ports([Port(port, "HTTP", "--http-port")])
    check_ports([Port(port, "HTTP", "--http-port")])


def test_a_port_in_use_is_named_with_its_option(taken_port: int) -> None:
    """And with the process that holds it, where the system tells."""
    with pytest.raises(ConfigError, match=rf"port {taken_port} for gRPC is in use.*: stop that, or set --grpc-port"):
        check_ports([Port(taken_port, "gRPC", "--grpc-port")])


def test_two_parts_of_a_server_cannot_share_a_port() -> None:
    """Both are named."""
    port = free_port()
    with pytest.raises(ConfigError, match=f"metrics and HTTP would share port {port}: set --metrics-port differently"):
        check_ports([Port(port, "HTTP", "--http-port"), Port(port, "metrics", "--metrics-port")])


@pytest.mark.parametrize("spare", [0, 1])
def test_enough_memory_passes(spare: int) -> None:
    """Exactly enough is enough."""
    check_memory(TWO_ENGINES, "org/name", GIB, available_bytes=2 * (ENGINE_BYTES + GIB) + spare)


def test_too_little_memory_is_refused_with_both_numbers() -> None:
    """In GiB, with what to change."""
    with pytest.raises(ConfigError, match=r"2 engines need about 7\.0 GiB of memory and 4\.0 GiB are free: use --mode agg.*now 1 GiB each"):
        check_memory(TWO_ENGINES, "org/name", GIB, available_bytes=4 * GIB)


def test_every_rank_counts_as_an_engine() -> None:
    """Each holds weights and a KV cache of its own."""
    fleet = Fleet((WorkerPlan("vllm", Role.AGGREGATED, 0, arguments={"data_parallel_size": 3}),), ())
    check_memory(fleet, "org/name", GIB, available_bytes=3 * (ENGINE_BYTES + GIB))
    with pytest.raises(ConfigError, match="3 engines need"):
        check_memory(fleet, "org/name", GIB, available_bytes=3 * (ENGINE_BYTES + GIB) - 1)


def test_weights_count_for_every_engine(tmp_path: Path) -> None:
    """Each loads its own copy; other files of the folder don't count."""
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 5000)
    assert weights_bytes(tmp_path) == 1000
    with pytest.raises(ConfigError, match="2 engines need"):
        check_memory(TWO_ENGINES, str(tmp_path), 0, available_bytes=2 * (ENGINE_BYTES + 1000) - 1)


def test_a_hub_id_has_no_weights_yet() -> None:
    """Their size is not known before the download."""
    assert weights_bytes(Path("org/name")) == 0


def test_this_host_has_memory() -> None:
    """Whatever limits it."""
    assert available_memory() > 0


@pytest.mark.parametrize(("free", "passes"), [(2 * SHM_BYTES, True), (2 * SHM_BYTES - 1, False), (64 << 20, False)])
def test_shared_memory_must_hold_the_fleet(monkeypatch: pytest.MonkeyPatch, free: int, passes: bool) -> None:
    """Docker gives containers 64 MiB."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(free, 0, free))
    if passes:
        check_shared_memory(TWO_ENGINES)
    else:
        with pytest.raises(ConfigError, match=rf"/dev/shm has {free >> 20} MiB free and the engines need about 1024 MiB: .*--shm-size"):
            check_shared_memory(TWO_ENGINES)


def test_a_model_folder_passes(tmp_path: Path) -> None:
    """Its config.json is what makes it one."""
    (tmp_path / "config.json").write_text("{}")
    check_model(str(tmp_path))


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    """For example the folder above the model."""
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        check_model(str(tmp_path))


@pytest.mark.parametrize("model", ["/no/such/model", "./no", "../no", "~/no", "gpt2", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(model: str) -> None:
    """It can't be a hub id."""
    with pytest.raises(ConfigError, match=f"there is no model folder {model}"):
        check_model(model)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub that raises `hub["cache"]` for its local cache and `hub["remote"]` when asked; None passes."""
    import huggingface_hub

    answers: dict[str, Any] = {"cache": None, "remote": None, "asked": []}

    def snapshot_download(model: str, **_: Any) -> None:
        if answers["cache"] is not None:
            raise answers["cache"]

    def model_info(_: Any, model: str, **__: Any) -> None:
        answers["asked"].append(model)
        if answers["remote"] is not None:
            raise answers["remote"]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    return answers


def test_a_cached_model_needs_no_hub(hub: dict[str, Any]) -> None:
    """It works offline."""
    hub["remote"] = ConnectionError()
    check_model("org/name")
    assert hub["asked"] == []


def test_a_model_that_the_hub_knows_passes(hub: dict[str, Any]) -> None:
    """vLLM will download it."""
    hub["cache"] = FileNotFoundError()
    check_model("org/name")
    assert hub["asked"] == ["org/name"]


def test_an_unreachable_hub_is_told(hub: dict[str, Any]) -> None:
    """With the way around it."""
    hub.update(cache=FileNotFoundError(), remote=ConnectionError("no route"))
    with pytest.raises(ConfigError, match="not in the local cache and the hub can't be reached: give --model FOLDER"):
        check_model("org/name")


@pytest.mark.parametrize(("visible", "count"), [("0,1", 2), ("", 0), ("-1", 0), ("GPU-abc", 1)])
def test_visible_devices_count_as_gpus(monkeypatch: pytest.MonkeyPatch, visible: str, count: int) -> None:
    """As for CUDA itself."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    hardware = detect_hardware()
    assert hardware.gpus == count
    assert len(hardware.cores) >= 1


def test_a_host_without_nvidia_smi_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no driver then."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert detect_hardware().gpus == 0


@pytest.mark.parametrize(
    ("flags", "fast"),
    [("flags\t\t: fpu avx512f avx512_bf16", True), ("flags : amx_bf16", True), ("flags : fpu avx2 avx512f", False), ("Features : x", True)],
)
def test_bfloat16_is_fast_where_the_processor_names_it(flags: str, fast: bool) -> None:
    """Where /proc/cpuinfo has no flags, nothing is assumed against the processor."""
    assert fast_bf16(f"processor : 0\n{flags}\n\nprocessor : 1\n") is fast
