# SPDX-License-Identifier: Apache-2.0
"""Whatever is killed, nothing of ours remains and the state is clear: no process, no file in /dev/shm, no scratch folder."""

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from tritonclient.utils import InferenceServerException

from calls import Call, collect, connect, responses
from servers import Server, command_of, post_json, processes_with, serve, tandem, wait_for
from tandem_worker.shared_memory import mapped_files

ENDLESS = {"temperature": 0, "max_tokens": 3000, "ignore_eos": True}
GONE_WITHIN_S = 45.0
"""Triton's own exit timeout of 30 s and the guard's work after it."""


def shm_files() -> set[str]:
    """What lies in /dev/shm."""
    return set(os.listdir("/dev/shm"))


def left_since(before: set[str]) -> set[str]:
    """What lies there since then and nobody has mapped: other servers on this host have files there, too."""
    return shm_files() - before - {path.name for path in mapped_files(psutil.pids())}


def scratch_folders() -> set[str]:
    """Scratch folders of workers."""
    return {path.name for path in Path(tempfile.gettempdir()).glob("tandem-*") if path.is_dir()}


def scratch_left_since(before: set[str]) -> set[str]:
    """Those that no living process names: every worker has a guard that is told its folder."""
    commands = [command_of(process) for process in psutil.process_iter()]
    return {name for name in scratch_folders() - before if not any(name in command for command in commands)}


def _server(server: Server) -> psutil.Process:
    return psutil.Process(server.pid)


def _engine(server: Server) -> psutil.Process:
    """By its parent: vLLM renames the process, which can blur its environment."""
    return next(child for child in _stub(server).children() if "EngineCor" in f"{child.name()} {' '.join(child.cmdline())}")


def _stub(server: Server) -> psutil.Process:
    commands = [(process, " ".join(process.cmdline())) for process in server.processes()]
    return next(process for process, command in commands if "triton_python_backend_stub" in command and "/vllm/" in command)


@asynccontextmanager
async def streaming(server: Server) -> AsyncIterator["asyncio.Task[Any]"]:
    """A request in mid-stream."""
    async with connect(server.grpc_url) as client:
        first = asyncio.Event()

        async def consume() -> None:
            async for _ in responses(client, Call("vllm", sampling=ENDLESS)):
                first.set()

        task = asyncio.create_task(consume())
        await asyncio.wait_for(first.wait(), 60)
        yield task
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(("victim", "message"), [
    pytest.param(_engine, "engine", id="engine"), pytest.param(_stub, "", id="stub"),
    pytest.param(_server, "", id="tritonserver", marks=pytest.mark.slow),  # the quick run kills servers in tests/fault_tolerance
])  # fmt: skip
async def test_kill_9(tmp_path: Path, tiny_model: Path, victim: Callable[[Server], psutil.Process], message: str) -> None:
    """The request in flight ends with an error, the server goes down so that a supervisor restarts it, nothing is left."""
    shm, scratch = shm_files(), scratch_folders()
    arguments = ("--mode", "agg", "--model", str(tiny_model), "--max-model-len", "4096")
    with serve(tmp_path, *arguments, TANDEM_SERVER_EXIT_TIMEOUT_S="10") as server:
        run_id = f"TANDEM_RUN_ID={server.state['run_id']}"
        async with streaming(server) as task:
            victim(server).send_signal(signal.SIGKILL)
            with pytest.raises((InferenceServerException, grpc.RpcError), match=message):
                await asyncio.wait_for(task, GONE_WITHIN_S)
        await asyncio.to_thread(wait_for, lambda: not processes_with(run_id), GONE_WITHIN_S, f"no process left: {processes_with(run_id)}")
        assert left_since(shm) == set()
        assert scratch_left_since(scratch) == set()


async def test_sigterm_and_stop(tmp_path: Path, tiny_model: Path) -> None:
    """Draining refuses new requests and lets running ones finish; SIGTERM then ends everything."""
    shm, scratch = shm_files(), scratch_folders()
    with serve(tmp_path, "--mode", "agg", "--model", str(tiny_model), "--max-model-len", "4096") as server:
        run_id = f"TANDEM_RUN_ID={server.state['run_id']}"
        async with connect(server.grpc_url) as client:
            call = Call("vllm", sampling={**ENDLESS, "max_tokens": 200}, returns=("num_output_tokens",))
            running = asyncio.create_task(collect(client, call))
            await asyncio.to_thread(wait_for, lambda: server.health("vllm")["running"] == 1, 120, "a running request")
            draining = asyncio.create_task(asyncio.to_thread(post_json, f"{server.admin_url('vllm')}/engine/drain", {"timeout_s": 60}))
            await asyncio.to_thread(wait_for, lambda: server.health("vllm")["status"] == "draining", 10, "draining")
            with pytest.raises(InferenceServerException, match="draining"):
                await collect(client, Call("vllm"))
            assert sum(response["num_output_tokens"][0] for response in await running) == 200
            assert await draining == {"aborted": 0}
        os.kill(server.pid, signal.SIGTERM)
        await asyncio.to_thread(wait_for, lambda: not processes_with(run_id), GONE_WITHIN_S, "no process left")
        assert left_since(shm) == set()
        assert scratch_left_since(scratch) == set()
    assert "state.json" not in str(sorted(os.walk(tmp_path)))


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--model", "/no/such/model"], {}, "no model folder"),
        (["--model", "nobody/no-such-model"], {}, "hub"),
        (["--max-modle-len", "10"], {}, "did you mean --max-model-len?"),
        (["--connector", "none", "--is-prefill-worker"], {}, "needs the connector nixl"),
        (["--connector", "null", "nixl"], {}, "can't be combined"),
        (["--connector", "infiniband"], {}, "unknown connector"),
        (["--connector", "kvbm", "nixl", "--is-prefill-worker"], {}, "has no tier"),
        (["--connector", "lmcache"], {}, "not installed"),
        (["--is-prefill-worker", "--is-decode-worker"], {}, "exclude each other"),
        (["--is-decode-worker", "--mode", "agg"], {}, "can't be combined"),
        (["--kv-event-port", "80"], {}, "1024"),
        ([], {"DYN_VLLM_KV_EVENT_PORT": "ten"}, "DYN_VLLM_KV_EVENT_PORT"),
        ([], {"VLLM_CPU_KVCACHE_SPACE": "4000"}, "GiB of memory"),
        (["--prefill", "0"], {}, "at least 1"),
    ],
)
def test_serve_refuses_in_one_sentence(tmp_path: Path, arguments: list[str], environment: dict[str, str], message: str) -> None:
    """Exit code 2 and a sentence that says what to do, before any engine starts."""
    ports = ["--http-port", "25990", "--grpc-port", "25991", "--metrics-port", "25992"]
    done = tandem(tmp_path, "serve", "--detach", *ports, *arguments, timeout_s=60, **environment)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_serve_refuses_a_port_in_use(server: Server, tmp_path: Path) -> None:
    """The sentence names the port and the process on it."""
    done = tandem(tmp_path, "serve", "--detach", "--http-port", str(server.http_port), timeout_s=60)
    assert done.returncode == 2
    assert f"port {server.http_port} for HTTP is in use by process" in done.stderr


@pytest.mark.slow
def test_an_engine_argument_that_vllm_refuses(tmp_path: Path, tiny_model: Path) -> None:
    """What only vLLM can know still ends the start with its reason, and leaves nothing."""
    ports = ["--http-port", "25990", "--grpc-port", "25991", "--metrics-port", "25992"]
    what = ["--mode", "agg", "--model", str(tiny_model), "--max-model-len", "1000000"]
    done = tandem(tmp_path, "serve", "--detach", *ports, *what, timeout_s=300)
    assert done.returncode == 1
    assert "model vllm did not start" in done.stderr
    assert not list(tmp_path.glob("*/state.json"))
