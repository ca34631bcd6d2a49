# SPDX-License-Identifier: Apache-2.0
"""The probes of `tandem doctor`: what they make of programs' words, of files, and of services that are there or not."""

import json
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fakes import WAIT_S
from tandem_cli.doctor.facts import Gpu
from tandem_cli.doctor.model_probe import probe_model
from tandem_cli.doctor.nixl_agent import MARK
from tandem_cli.doctor.nixl_test import conclude, transport_of
from tandem_cli.doctor.probes import parse_gpus, parse_libraries, probe_ports
from tandem_cli.doctor.service_probes import probe_discovery, probe_prometheus

TABLES = """
[1.2] [vm:1:0]   | reader intra-node cfg#1                                                          |
[1.2] [vm:1:0]   | active message by ucp_am_send*(multi) from host memory |
[1.2] [vm:1:0]   |  65529..inf | multi-frag copy-in | tcp/lo              |
[1.2] [vm:1:0]   | remote memory read by ucp_get*(multi) into host memory from host |
[1.2] [vm:1:0]   | Range  | Description |                  Config                   |
[1.2] [vm:1:0]   | 0..512 | short       | posix/memory                              |
[1.2] [vm:1:0]   | 513..inf | zero-copy   | cma/memory                              |
[1.2] [vm:1:0]   | remote memory write by ucp_put* from host memory to host |
[1.2] [vm:1:0]   | 0..inf | zero-copy   | rc_mlx5/memory                              |
"""


def test_gpus() -> None:
    """As nvidia-smi lists them; memory is not told where it is shared with the host."""
    listed = "NVIDIA H200, 570.86.15, 143771, 12\nNVIDIA GB10, 580.1, [N/A], [N/A]\n"
    assert parse_gpus(listed).gpus == (Gpu("NVIDIA H200", "570.86.15", 143771, 12), Gpu("NVIDIA GB10", "580.1", 0, 0))
    assert parse_gpus("No devices were found\n").gpus == ()


def test_libraries() -> None:
    """The Python that a stub is linked with, and what is not found."""
    listed = "\tlinux-vdso.so.1 (0x1)\n\tlibpython3.11.so.1.0 => not found\n\tlibc.so.6 => /lib/libc.so.6 (0x2)\n\tlibx.so => not found\n"
    assert parse_libraries(listed) == (("libpython3.11.so.1.0",), ("libpython3.11.so.1.0", "libx.so"))


def test_the_transport_is_that_of_large_reads() -> None:
    """A decode worker reads, and blocks are large."""
    assert transport_of(TABLES) == ("zero-copy", "cma/memory")
    assert transport_of("") == ("", "")


@pytest.mark.parametrize(("checksum", "intact"), [(7, True), (8, False)])
def test_a_transfer_is_intact_if_both_sides_count_the_same(checksum: int, intact: bool) -> None:
    """Each reads its own memory."""
    said = f"{TABLES}{MARK}{json.dumps({'seconds': 0.5, 'checksum': checksum})}\n"
    found = conclude({"device": "cpu", "checksum": 7}, said, 100)
    assert (found.intact, found.seconds, found.transport, found.error) == (intact, 0.5, "cma/memory", "")


def test_a_transfer_that_failed_says_why() -> None:
    """By the last line that is no table."""
    found = conclude({}, f"Traceback\nRuntimeError: NIXL_ERR_BACKEND\n{TABLES}", 100)
    assert found.error == "RuntimeError: NIXL_ERR_BACKEND"


def test_a_busy_port_is_found_with_its_owner() -> None:
    """And a free one is not."""
    with socket.socket() as taken, socket.socket() as freed:
        for one in (taken, freed):
            one.bind(("127.0.0.1", 0))
        taken.listen()
        free = freed.getsockname()[1]
        freed.close()
        number = taken.getsockname()[1]
        (busy,) = probe_ports([(number, "HTTP"), (free, "gRPC")])
    assert (busy.number, busy.what) == (number, "HTTP")
    assert "by process" in busy.owner


def shard(path: Path, *, size: int = 16, cut: int = 0) -> None:
    """A safetensors file of one tensor, perhaps cut short."""
    header = json.dumps({"__metadata__": {}, "w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    whole = struct.pack("<Q", len(header)) + header + bytes(size)
    path.write_bytes(whole[: len(whole) - cut])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    shard(tmp_path / "model.safetensors")
    return tmp_path


def test_a_whole_model(folder: Path) -> None:
    """Nothing to complain of."""
    found = probe_model(str(folder))
    assert (found.error, found.problems) == ("", ())
    assert found.weights_bytes == (folder / "model.safetensors").stat().st_size


def test_a_model_with_everything_wrong(folder: Path) -> None:
    """All of it is said at once."""
    (folder / "config.json").write_text("{")
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").unlink()
    assert probe_model(str(folder)).problems == ("config.json is not JSON", "there is no tokenizer", "there are no weights")


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a git-lfs pointer"), (b"", "is not a safetensors file"),
     (b"x" * 100, "is not a safetensors file"), (struct.pack("<Q", 2) + b"{]", "has a broken header"),
     (struct.pack("<Q", 8) + b'{"w": 1}', "has a broken header")],
)
def test_a_shard_that_is_none(folder: Path, content: bytes, problem: str) -> None:
    """Each in its own words."""
    (folder / "model.safetensors").write_bytes(content)
    assert problem in probe_model(str(folder)).problems[0]


def test_a_shard_that_was_cut_short_and_one_that_is_missing(folder: Path) -> None:
    """As after an interrupted download."""
    shard(folder / "model.safetensors", cut=3)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model.safetensors", "v": "model-2.safetensors"}}))
    missing, cut = probe_model(str(folder)).problems
    assert missing == "model-2.safetensors is missing"
    size = (folder / "model.safetensors").stat().st_size
    assert cut == f"model.safetensors has {size} bytes and should have {size + 3}"


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    """The launcher's own sentence."""
    assert "there is no model folder" in probe_model(str(tmp_path / "none")).error


def test_a_discovery_folder(tmp_path: Path) -> None:
    """There, or to be made."""
    assert probe_discovery("").url == ""
    assert probe_discovery(f"file:{tmp_path}").says == "0 workers are registered"
    assert probe_discovery(f"file:{tmp_path / 'new'}").says == "the first worker will make the folder"
    assert not (tmp_path / "new").exists()


def test_a_discovery_that_is_not_there_or_not_understood() -> None:
    """Within its bound."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert probe_discovery(f"etcd://127.0.0.1:{unused.getsockname()[1]}").error
    assert "not valid" in probe_discovery("zookeeper://x").error


@pytest.fixture
def prometheus() -> Iterator[str]:
    """What Prometheus answers, in its own words; a real one is asked in the integration tests where it is installed."""

    class Handler(BaseHTTPRequestHandler):
        """Two targets, one of them down."""

        def do_GET(self) -> None:
            """Both paths."""
            result = [{"metric": {}, "value": [1.0, "1"]}, {"metric": {}, "value": [1.0, "0"]}]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"status": "success", "data": {"resultType": "vector", "result": result}}).encode())

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join(WAIT_S)
    server.server_close()


def test_prometheus(prometheus: str) -> None:
    """Its targets are counted."""
    assert probe_prometheus(prometheus).says == "2 targets, 1 up"
    assert probe_prometheus("").url == ""


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:9090", "file:///etc/passwd"])
def test_what_is_no_prometheus(url: str) -> None:
    """An error, and nothing is opened that is not HTTP."""
    assert "does not answer as Prometheus does" in probe_prometheus(url).error
