# SPDX-License-Identifier: Apache-2.0
"""An omni worker whose parts are killed or stopped: a real tritonserver with a real AsyncOmni on a CPU, named by TANDEM_OMNI_ENV."""

import asyncio
import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import psutil
import pytest
from tritonclient.utils import InferenceServerException

from calls import Call, collect, connect
from omni_models import STORY, make_story
from omni_rig import environment_with_platform, omni_environment
from omni_running import CLIENT_S, ENDLESS, FREED_WITHIN_S, Running, serving, streaming, text, until
from servers import command_of

pytestmark = pytest.mark.slow

GONE_CLIENT_S = 45.0
"""What a client of a killed stub waits for: Triton's end, which the guard enforces."""
LONG_PICTURE = {"stages": {"painter": {"num_inference_steps": 400, "height": 64, "width": 64}}}
LEASE_S = 15.0
"""After a kill a record stays until its lease of 10 s has ended."""
HANG_S = 4.0
CANARY_HANG_S = 10.0
"""Longer than a canary's bound, so that there is a time at which the worker is unwell and not lost."""
SEEN_WITHIN_S = HANG_S + 4.0
"""Two looks, the answer, and steps of a process that shares its core with us."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vllm-omni's, with the CPU platform of the tests."""
    return environment_with_platform(omni_environment(), tmp_path_factory.mktemp("environment"))


def stub_of(running: Running) -> psutil.Process:
    """Triton's Python process of the model."""
    return next(one for one in running.family() if "triton_python_backend_stub" in command_of(one))


def engine_of(running: Running) -> psutil.Process:
    """The only stage's EngineCore, or what stands in its place below the stub."""
    return next(one for one in stub_of(running).children() if re.search("EngineCor", f"{one.name()} {command_of(one)}"))


def server_of(running: Running) -> psutil.Process:
    """tritonserver."""
    return running.family()[0]


def engine_tree(running: Running) -> list[psutil.Process]:
    """The EngineCore and its worker."""
    engine = engine_of(running)
    return [engine, *engine.children(recursive=True)]


async def undiscovered(running: Running, within_s: float) -> None:
    """Discovery has no worker any more."""
    await until(lambda: not asyncio.run(running.states()), within_s, "no worker in discovery")


@pytest.mark.parametrize(("victim", "message", "within_s", "lease_s"), [
    (engine_of, "no live replica|the pipeline of this worker died", 5.0, 5.0), (stub_of, None, GONE_CLIENT_S, LEASE_S),
    (server_of, None, 5.0, LEASE_S),
], ids=["engine", "stub", "tritonserver"])
async def test_kill_9(environment: Path, tmp_path: Path, tiny_model: Path, victim: Callable[[Running], psutil.Process],
                      message: str | None, within_s: float, lease_s: float) -> None:
    """What is in flight ends with an error, the server goes down so that a supervisor restarts it, nothing is left of it."""
    with serving(environment, tmp_path, text(tiny_model)) as running:
        assert len(await running.states()) == 1
        async with streaming(running.server.grpc_url, 2) as tasks:
            traces = running.traces()
            victim(running).send_signal(signal.SIGKILL)
            for task in tasks:
                with pytest.raises((InferenceServerException, grpc.RpcError), match=message):
                    await asyncio.wait_for(task, within_s)
        await traces.vanish()
        await undiscovered(running, lease_s)
        assert "Segfault" not in running.server.log


async def test_a_stopped_engine(environment: Path, tmp_path: Path, tiny_model: Path) -> None:
    """Continued in time it goes on as if nothing had been; else its requests fail within the bound, /live says why, stacks are in the log,
    discovery forgets the worker, and the server ends without leaving anything."""
    with serving(environment, tmp_path, text(tiny_model), TANDEM_HANG_TIMEOUT_S=f"{HANG_S:g}") as running:
        tree = engine_tree(running)
        async with streaming(running.server.grpc_url, 1, sampling={**ENDLESS, "max_tokens": 600}) as [task]:
            for process in tree:
                process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(HANG_S / 2)  # the pause is the subject of the test
            for process in tree:
                process.send_signal(signal.SIGCONT)
            assert await asyncio.wait_for(task, CLIENT_S) == 600
        assert running.server.health()["status"] == "ready"
        async with streaming(running.server.grpc_url, 2) as tasks:
            traces = running.traces()
            for process in tree:
                process.send_signal(signal.SIGSTOP)
            stopped = time.monotonic()
            for task in tasks:
                with pytest.raises(InferenceServerException, match="the engine hangs"):
                    await asyncio.wait_for(task, SEEN_WITHIN_S)
            assert time.monotonic() - stopped > HANG_S - 2
            assert "neither a step nor computation" in running.server.health()["reason"]
        await undiscovered(running, FREED_WITHIN_S)
        await traces.vanish()
        assert "host.py" in running.server.log.partition("engine.hangs")[2], "the stub's stacks"


async def test_an_idle_engine_that_stops(environment: Path, tmp_path: Path, tiny_model: Path) -> None:
    """Nobody asks it anything but a canary: it takes no requests from then on, and ends as one that hangs."""
    canaries = {"DYN_HEALTH_CHECK_ENABLED": "1", "DYN_CANARY_WAIT_TIME": "1", "DYN_HEALTH_CHECK_REQUEST_TIMEOUT": "2"}
    with serving(environment, tmp_path, text(tiny_model), TANDEM_HANG_TIMEOUT_S=f"{CANARY_HANG_S:g}", **canaries) as running:
        await until(lambda: running.metrics.sum_of("vllm:request_success_total") >= 2, CLIENT_S, "canaries")
        assert running.metrics.sum_of("dynamo_component_requests_total") == 0, "a canary is no request of a client"
        traces = running.traces()
        for process in engine_tree(running):
            process.send_signal(signal.SIGSTOP)
        await until(lambda: running.server.health()["status"] == "unwell", CLIENT_S, "a late canary")
        async with connect(running.server.grpc_url) as client:
            with pytest.raises(InferenceServerException, match="did not answer a canary request within 2 s"):
                await collect(client, Call("omni"))
        await traces.vanish()
        assert "the engine hangs: 1 requests in it" in running.server.log


def painter_of(running: Running) -> psutil.Process:
    """The process of the stage that paints."""
    return next(one for one in stub_of(running).children() if "Diffusion" in f"{one.name()} {command_of(one)}")


@pytest.mark.parametrize(("victim", "message", "lease_s"), [(painter_of, "no live replica|the pipeline of this worker died", 5.0),
                                                            (server_of, None, LEASE_S)], ids=["painter", "tritonserver"])
async def test_kill_9_while_a_later_stage_works(environment: Path, tmp_path: Path, tiny_model: Path,
                                                victim: Callable[[Running], psutil.Process], message: str | None, lease_s: float) -> None:
    """A text that is being painted: as where there is one stage."""
    (tmp_path / "deploy.yaml").write_text(json.dumps(STORY))  # JSON is YAML
    arguments = {"model": str(make_story(environment, tmp_path, tiny_model)), "deploy_config": "../../../deploy.yaml"}
    with serving(environment, tmp_path, arguments) as running:
        async with streaming(running.server.grpc_url, 2, sampling=LONG_PICTURE) as tasks:
            await until(lambda: running.metrics.sum_of("vllm:request_success_total") == 2, CLIENT_S, "both texts")
            traces = running.traces()
            victim(running).send_signal(signal.SIGKILL)
            for task in tasks:
                with pytest.raises((InferenceServerException, grpc.RpcError), match=message):
                    await asyncio.wait_for(task, SEEN_WITHIN_S)
        await traces.vanish()
        await undiscovered(running, lease_s)
        assert "Segfault" not in running.server.log
