# SPDX-License-Identifier: Apache-2.0
"""A repository written for Triton's vllm_backend loads unchanged: `backend: "vllm"`, `model.json`, `multi_lora.json`."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tritonclient.utils import InferenceServerException

from calls import Call, collect, connect, text_of
from models import make_lora
from servers import free_ports, get_text, processes_with, wait_for
from tandem_cli.serve.layout import source_root
from tandem_cli.serve.tritonserver import find_triton, join_backends, server_command, server_environment

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def grpc_url(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[str]:
    """tritonserver over such a repository, started by hand."""
    folder = tmp_path_factory.mktemp("drop_in")
    _write_repository(folder, tiny_model)
    install = find_triton()
    join_backends(install, source_root() / "backends" / "vllm", folder / "backends")
    port = free_ports(8)
    environment = server_environment(install, {
        "DYN_SYSTEM_PORT": str(port + 3), "DYN_VLLM_KV_EVENT_PORT": str(port + 4), "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0", "TANDEM_RUN_ID": str(folder),
    })
    with (folder / "log").open("wb") as log:
        command = server_command(install, folder / "models", folder / "backends", (port, port + 1, port + 2), 600)
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_for(lambda: server.poll() is not None or _ready(port), 300, "the drop-in server")
        assert server.poll() is None, (folder / "log").read_text()[-3000:]
        yield f"127.0.0.1:{port + 1}"
    finally:
        server.terminate()
        server.wait(60)
        wait_for(lambda: not processes_with(f"TANDEM_RUN_ID={folder}"), 30, "no process left")


def _ready(port: int) -> bool:
    try:
        return get_text(f"http://127.0.0.1:{port}/v2/models/vllm_model/ready") == ""
    except OSError:
        return False


def _write_repository(folder: Path, model: Path) -> None:
    version = folder / "models" / "vllm_model" / "1"
    version.mkdir(parents=True)
    engine = {"model": str(model), "gpu_memory_utilization": 0.5, "enforce_eager": True, "enable_lora": True, "max_lora_rank": 8,
              "max_model_len": 1024}
    (version / "model.json").write_text(json.dumps(engine))
    (version / "multi_lora.json").write_text(json.dumps({"doll": str(make_lora(folder / "lora"))}))
    (version.parent / "config.pbtxt").write_text('backend: "vllm"\ninstance_group [ { count: 1 kind: KIND_MODEL } ]\n')


async def test_it_answers(grpc_url: str) -> None:
    """The model loads by its backend's name and answers a vllm_backend client's request."""
    async with connect(grpc_url) as client:
        assert len(await text_of(client, Call("vllm_model", prompt="Hello", sampling=GREEDY))) > 0


async def test_a_lora_changes_the_text(grpc_url: str) -> None:
    """A name of multi_lora.json, given as sampling parameter, selects the adapter."""
    async with connect(grpc_url) as client:
        plain = await text_of(client, Call("vllm_model", prompt="Hello there", sampling=GREEDY))
        adapted = await text_of(client, Call("vllm_model", prompt="Hello there", sampling={**GREEDY, "lora_name": "doll"}))
        again = await text_of(client, Call("vllm_model", prompt="Hello there", sampling=GREEDY))
    assert plain == again
    assert adapted != plain


async def test_an_unknown_lora_is_refused_with_vllm_backends_words(grpc_url: str) -> None:
    """Clients match on this text."""
    async with connect(grpc_url) as client:
        with pytest.raises(InferenceServerException, match=r"LoRA alpaca is not supported, we currently support \['doll'\]"):
            await collect(client, Call("vllm_model", sampling={**GREEDY, "lora_name": "alpaca"}))

