# SPDX-License-Identifier: Apache-2.0
"""The image under a real Docker Engine: aggregated, disaggregated and routed answers, no root, health, and stops that lose nothing.

Needs an engine (DOCKER_HOST) and an image: `./build.sh image --cpu --tag tandem:test`, then TANDEM_TEST_IMAGE=tandem:test. Skipped without.
Containers share the host's network, since an engine without iptables has no other, and the cores that this process may use.
"""

import asyncio
import functools
import itertools
import json
import os
import shutil
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import charts
from calls import Call, begin_streams, connect, text_of
from servers import free_ports, get_json, wait_for
from tandem_cli.serve.embedded_model import embedded_model

IMAGE = os.environ.get("TANDEM_TEST_IMAGE", "")
USER = 10001
HEALTHY_S = 540.0
STOP_S = 60
"""Docker's own grace of 10 s is shorter than a drain."""
DOCKER_S = 300.0
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not IMAGE, reason="TANDEM_TEST_IMAGE names no image")]


def docker(*arguments: str, timeout_s: float = DOCKER_S) -> str:
    """Runs docker; its output."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False, timeout=timeout_s)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@dataclass(frozen=True)
class Container:
    """A running container of the image."""

    name: str
    first_port: int

    @property
    def grpc_url(self) -> str:
        """Where clients connect."""
        return f"127.0.0.1:{self.first_port + 1}"

    @property
    def admin_url(self) -> str:
        """The admin server of its only worker or router."""
        return f"http://127.0.0.1:{self.first_port + 3}"

    def inspect(self, template: str) -> str:
        """A field of `docker inspect`."""
        return docker("inspect", "--format", template, self.name)

    def users(self) -> set[str]:
        """The numeric users of all its processes, as the host sees them."""
        return {line.split()[1] for line in docker("top", self.name, "-eo", "pid,uid").splitlines()[1:]}

    def is_healthy(self) -> bool:
        """What Docker made of the image's HEALTHCHECK; fails at once when the container has ended."""
        assert self.inspect("{{.State.Running}}") == "true", self.log()
        return self.inspect("{{.State.Health.Status}}") == "healthy"

    def log(self) -> str:
        """The end of its log."""
        done = subprocess.run(["docker", "logs", "--tail", "60", self.name], capture_output=True, text=True, check=False, timeout=DOCKER_S)
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def model() -> Iterator[Path]:
    """The embedded model where the image's user may read it; its own folder is its owner's alone."""
    with TemporaryDirectory(prefix="tandem-model-") as folder:
        shutil.copytree(embedded_model(), folder, dirs_exist_ok=True)
        for path in (Path(folder), *Path(folder).iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield Path(folder)


_CONTAINERS = 5
"""The most that one run starts."""
_blocks = itertools.count()


@functools.cache
def all_ports() -> int:
    """The first of 20 free ports for each container: taken at once, since one that starts doesn't listen yet."""
    return free_ports(20 * _CONTAINERS)


@contextmanager
def container(role: str, model: Path, *arguments: str, index: int = 0, discovery: Path | None = None, wait: bool = True,
              **environment: str) -> Iterator[Container]:
    """A container that is healthy, unless not waited for; removed at the end.

    `index` is that of its worker, which the launcher adds to admin ports.
    """
    first, name = all_ports() + 20 * next(_blocks), f"tandem-test-{uuid.uuid4().hex[:8]}"
    ports = {"TANDEM_ROUTER_ADMIN_PORT": first + 3, "DYN_SYSTEM_PORT": first + 3 - index, "DYN_VLLM_KV_EVENT_PORT": first + 8,
             "VLLM_NIXL_SIDE_CHANNEL_PORT": first + 12}
    variables = {"TANDEM_MODEL": "/models/smollm2", **{key: str(port) for key, port in ports.items()},
                 **({"TANDEM_DISCOVERY": "file:/discovery"} if discovery else {}), **environment}
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    mounts = ["--volume", f"{model}:/models/smollm2:ro", *(["--volume", f"{discovery}:/discovery"] if discovery else [])]
    options = [word for key, value in variables.items() for word in ("--env", f"{key}={value}")]
    flags = ["--http-port", str(first), "--grpc-port", str(first + 1), "--metrics-port", str(first + 2)]
    docker("run", "--detach", "--name", name, "--network=host", "--cpuset-cpus", cores, "--shm-size=1g", *mounts, *options, IMAGE, role,
           *flags, *arguments)
    started = time.monotonic()
    running = Container(name, first)
    try:
        if wait:
            wait_for(running.is_healthy, HEALTHY_S, f"{role} to be healthy")
            print(f"{role} {' '.join(arguments)}: healthy after {time.monotonic() - started:.1f} s")  # noqa: T201 - shown by pytest -s
        yield running
    except AssertionError:
        print(running.log())  # noqa: T201 - or nobody sees why
        raise
    finally:
        docker("rm", "--force", "--volumes", name)


async def paris(url: str, model: str) -> str:
    """The answer to the usual question."""
    async with connect(url) as client:
        return await text_of(client, Call(model, sampling={"temperature": 0, "max_tokens": 16}))


async def stopped_in_flight(stopped: Container, url: str, model: str, streams: int = 4) -> list[str]:
    """Stops a container while it streams; the texts, which come whole or not at all."""
    call = Call(model, sampling={"temperature": 0, "max_tokens": 40, "ignore_eos": True})
    async with connect(url) as client:
        running = await begin_streams(client, [call] * streams)
        await asyncio.to_thread(docker, "stop", "--time", str(STOP_S), stopped.name)
        return list(await asyncio.gather(*running))


async def test_an_aggregated_worker(model: Path) -> None:
    """It answers, as a user without rights; a stop ends it with success, all answers whole, and nothing left of it."""
    with container("worker", model) as worker:
        assert "Paris" in await paris(worker.grpc_url, "vllm")
        assert worker.users() == {str(USER)}
        assert json.loads(worker.inspect("{{json .Config.Entrypoint}}"))[0] == "tini"
        texts = await stopped_in_flight(worker, worker.grpc_url, "vllm")
        assert len(set(texts)) == 1
        assert "Paris" in texts[0]
        assert worker.inspect("{{.State.ExitCode}} {{.State.OOMKilled}}") == "0 false"


async def test_prefill_decode_and_router(model: Path) -> None:
    """Three containers that meet in a folder: KV blocks travel between two, the third one places, and loses nothing at its stop."""
    with ExitStack() as stack:
        discovery = shared_folder(stack)
        prefill, decode = (stack.enter_context(container("worker", model, flag, index=1, discovery=discovery, wait=False))
                           for flag in ("--is-prefill-worker", "--is-decode-worker"))
        for worker in (prefill, decode):
            await asyncio.to_thread(wait_for, worker.is_healthy, HEALTHY_S, f"{worker} to be healthy")
        router = stack.enter_context(container("router", model, discovery=discovery))
        await asyncio.to_thread(wait_for, lambda: placed(router) == 2, 120, "the router to place both")
        assert "Paris" in await paris(router.grpc_url, "router")
        assert prefilled(prefill) > 0
        texts = await stopped_in_flight(router, router.grpc_url, "router", streams=2)
        assert len(set(texts)) == 1
        assert "Paris" in texts[0]
        assert router.inspect("{{.State.ExitCode}}") == "0"
        assert decode.is_healthy()


def test_a_worker_as_the_chart_renders_it(model: Path) -> None:
    """The pod's own arguments, variables, user and rights; its probes, the program of `helm test`, its preStop hook and its end."""
    documents = charts.render("agg", 'platform="cpu"', 'model.name="/models/smollm2"', "worker.leaveDelaySeconds=1")
    worker = charts.container(charts.pod(documents, f"{charts.NAME}-aggregated"), "worker")
    asks = charts.container({"spec": charts.find(documents, "Pod", f"{charts.NAME}-test")["spec"]}, "ask")
    with ExitStack() as stack:
        models = shared_folder(stack)
        shutil.copytree(model, models / "smollm2")
        pod = stack.enter_context(rendered_container(worker, models))
        wait_for(lambda: probe(pod, worker, "startupProbe") and probe(pod, worker, "readinessProbe"), HEALTHY_S, "the pod to be ready")
        told = [word for name, value in charts.environment(asks).items() for word in ("--env", f"{name}={value}")]
        assert "Paris" in docker("exec", *told, pod, *asks["args"])
        docker("exec", pod, *worker["lifecycle"]["preStop"]["exec"]["command"])
        assert not probe(pod, worker, "readinessProbe")
        docker("stop", "--time", str(STOP_S), pod)
        assert docker("inspect", "--format", "{{.State.ExitCode}}", pod) == "0"


@contextmanager
def rendered_container(rendered: charts.Document, models: Path) -> Iterator[str]:
    """The chart's container under Docker, in a network of its own, where the service's name is its own address; its name."""
    name, address = f"tandem-test-{uuid.uuid4().hex[:8]}", "127.0.0.1"
    told = charts.environment(rendered, address)
    variables = [word for key, value in told.items() for word in ("--env", f"{key}={value}")]
    rights = ["--user", f"{USER}:{USER}", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
    docker("run", "--detach", "--name", name, "--network=none", f"--add-host={charts.NAME}:{address}", "--shm-size=1g", *rights,
           "--cpuset-cpus", ",".join(map(str, sorted(os.sched_getaffinity(0)))), "--volume", f"{models}:/models", *variables, IMAGE,
           *(charts.expand(argument, told) for argument in rendered["args"]))
    try:
        yield name
    finally:
        docker("rm", "--force", "--volumes", name)


def probe(pod: str, rendered: charts.Document, kind: str) -> bool:
    """Whether an HTTP probe succeeds, asked from within."""
    get = rendered[kind]["httpGet"]
    port = {one["name"]: one["containerPort"] for one in rendered["ports"]}[get["port"]]
    program = "import sys, urllib.request as web; web.urlopen(sys.argv[1], timeout=5)"
    done = subprocess.run(["docker", "exec", pod, "python", "-c", program, f"http://127.0.0.1:{port}{get['path']}"], capture_output=True,
                          check=False, timeout=DOCKER_S)
    return done.returncode == 0


def shared_folder(stack: ExitStack) -> Path:
    """A folder that the image's user may write."""
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="tandem-discovery-", ignore_cleanup_errors=True)))
    folder.chmod(0o777)
    return folder


def placed(router: Container) -> int:
    """Workers that the router places on."""
    return sum(worker["placed"] for worker in get_json(f"{router.admin_url}/fleet")["workers"])


def prefilled(prefill: Container) -> int:
    """Requests that the prefill worker has finished."""
    with urllib.request.urlopen(f"{prefill.admin_url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:request_success_total")))


def test_what_is_in_the_image() -> None:
    """A list of its packages, its labels, and no wheelhouse or package settings of the host that built it."""
    labels = json.loads(docker("image", "inspect", "--format", "{{json .Config.Labels}}", IMAGE))
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    foreign = "find / -xdev -name '*.whl' -o -xdev -name pip.conf | grep -v -e ensurepip -e /usr/share/python-wheels || true"
    script = f"set -e; wc -l < $0/python.txt; wc -l < $0/debian.tsv; {foreign}; id -u"
    words = docker("run", "--rm", "--network=none", IMAGE, "bash", "-c", script, labels["dev.tandem.sbom"]).split()
    assert int(words[0]) > 150
    assert int(words[1]) > 80
    assert words[2:] == [str(USER)]
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", IMAGE)
    assert "PIP_" not in history


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["router"], "set TANDEM_DISCOVERY"), (["worker", "--max-modle-len", "9"], "did you mean --max-model-len?"),
     (["--nonsense"], "first argument")],
)
def test_a_wrong_start_ends_with_a_sentence(arguments: list[str], message: str) -> None:
    """Exit code 2, before an engine starts."""
    done = subprocess.run(["docker", "run", "--rm", "--network=host", "--shm-size=1g", IMAGE, *arguments], capture_output=True, text=True,
                          check=False, timeout=DOCKER_S)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
