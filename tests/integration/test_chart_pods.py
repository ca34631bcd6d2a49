# SPDX-License-Identifier: Apache-2.0
"""The chart's containers for real: what it renders is started as rendered, probed, asked for Paris, and ended as a kubelet would.

Those with engines take minutes, and are only run when TANDEM_TEST_ENGINE_PODS is set.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from charts import NAME, Document, container, find, pod, render
from played_pods import SUBNET, Network, PlayedContainer, ask, network, play, stream
from servers import START_TIMEOUT_S, wait_for
from tandem_cli.serve.embedded_model import embedded_model

pytestmark = pytest.mark.slow
with_engines = pytest.mark.skipif(not os.environ.get("TANDEM_TEST_ENGINE_PODS"), reason="TANDEM_TEST_ENGINE_PODS is not set")
LEAVE_S, DRAIN_S, ALIVE_S = 1, 60, 60
END_S = 70
"""What the chart adds to the grace period for the end itself."""
CPU = ('platform="cpu"', "worker.leaveDelaySeconds=1", f"worker.drainTimeoutSeconds={DRAIN_S}", 'worker.args=["--max-model-len","512"]',
       "test.timeoutSeconds=300")


@pytest.fixture
def net() -> Iterator[Network]:
    """Skipped where namespaces may not be made."""
    if shutil.which("ip") is None:
        pytest.skip("needs the program ip (iproute2)")
    with ExitStack() as stack:
        try:
            made = stack.enter_context(network())
        except OSError as exc:
            pytest.skip(f"needs the right to make network namespaces: {exc}")
        yield made


def rendered(mode: str, *sets: str) -> list[Document]:
    """For the embedded model."""
    return render(mode, *CPU, f'model.name="{embedded_model()}"', *sets)


def test_a_consolidator(net: Network, tmp_path: Path) -> None:
    """It lives without a worker to listen to, is seen alive from outside its pod, and ends when it is told to."""
    documents = render("agg", "router.enabled=true", 'discovery.kind="etcd"', 'worker.connector="kvbm"', "worker.kvTiers.hostGB=1")
    with ExitStack() as stack:
        sidecar = play(net, container(pod(documents, f"{NAME}-aggregated"), "consolidator"), tmp_path / "consolidator")
        stack.callback(sidecar.kill)
        wait_for(lambda: sidecar.probe("livenessProbe"), ALIVE_S, "the consolidator's /live")
        assert sidecar.end(ALIVE_S) == 0


def test_the_charts_etcd(net: Network, tmp_path: Path) -> None:
    """It is ready, discovery works with it, and it keeps nothing that would hinder its next start."""
    if shutil.which("etcd") is None:
        pytest.skip("needs etcd")
    one = container(pod(render("disagg"), f"{NAME}-etcd"), "etcd")
    with ExitStack() as stack:
        server = play(net, one, tmp_path / "etcd")
        stack.callback(server.kill)
        wait_for(lambda: server.probe("readinessProbe") and server.probe("livenessProbe"), ALIVE_S, "the chart's etcd")
        program = "import sys; from tandem_cli.doctor.service_probes import probe_discovery; print(probe_discovery(sys.argv[1]))"
        said = net.run([sys.executable, "-c", program, f"etcd://{server.address.ip}:2379/llm/demo"], timeout_s=60)
        assert "0 workers are registered" in said.stdout, said
        server.end(ALIVE_S)


@with_engines
def test_an_aggregated_pod(net: Network, tmp_path: Path) -> None:
    """Its probes succeed once it serves, the test pod's program hears Paris, and a request in flight at its end is finished first."""
    documents = rendered("agg")
    with ExitStack() as stack:
        worker = play(net, container(pod(documents, f"{NAME}-aggregated"), "worker"), tmp_path / "worker")
        stack.callback(worker.kill)
        worker.wait_until_ready(START_TIMEOUT_S)
        assert worker.probe("livenessProbe")
        assert "Paris" in ask(net, container(find(documents, "Pod", f"{NAME}-test"), "ask"), worker.address, NAME)
        _leaves_without_loss(net, worker)


def _leaves_without_loss(net: Network, worker: PlayedContainer) -> None:
    """Hook and SIGTERM while an answer is on its way."""
    client = stream(net, worker.address, "vllm", tokens=48)
    assert client.stdout is not None
    first = client.stdout.readline()
    assert first.startswith("data:"), first
    hook = worker.stop_hook(LEAVE_S + DRAIN_S + 30)
    assert hook.returncode == 0, hook.stderr
    rest, _ = client.communicate(timeout=60)
    assert client.returncode == 0, rest
    assert not worker.probe("readinessProbe")
    assert worker.end(END_S) == 0


@pytest.fixture
def etcd(net: Network, tmp_path: Path) -> Iterator[str]:
    """An etcd of one's own, on the node; its host:port."""
    program = shutil.which("etcd")
    if program is None:
        pytest.skip("needs etcd")
    address = f"{SUBNET}.1:2379"
    command = ["ip", "netns", "exec", net.switch, program, f"--data-dir={tmp_path}/etcd", f"--listen-client-urls=http://{address}",
               f"--advertise-client-urls=http://{address}", "--listen-peer-urls=http://127.0.0.1:2380"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield address
    process.terminate()
    process.wait(30)


@with_engines
def test_prefill_decode_and_router_pods(net: Network, tmp_path: Path, etcd: str) -> None:
    """They meet in etcd by the addresses of their pods, and the router's answer has come by both."""
    documents = rendered("disagg", f'discovery.etcd.endpoint="{etcd}"')
    with ExitStack() as stack:
        played = {}
        for owner in ("prefill", "decode", "router"):
            name = "router" if owner == "router" else "worker"
            played[owner] = play(net, container(pod(documents, f"{NAME}-{owner}"), name), tmp_path / owner)
            stack.callback(played[owner].kill)
        for one in played.values():
            one.wait_until_ready(START_TIMEOUT_S)
        assert "Paris" in ask(net, container(find(documents, "Pod", f"{NAME}-test"), "ask"), played["router"].address, NAME)
        served = {owner: _finished(net, played[owner]) for owner in ("prefill", "decode")}
        assert min(served.values()) >= 1, served
        for one in reversed(played.values()):
            assert one.stop_hook(LEAVE_S + DRAIN_S + 30).returncode == 0
            assert one.end(END_S) == 0


def _finished(net: Network, worker: PlayedContainer) -> float:
    """Requests that its engine finished, by its own metrics."""
    program = "import sys, urllib.request as web; print(web.urlopen(sys.argv[1], timeout=10).read().decode())"
    said = net.run(["python3", "-c", program, f"http://{worker.address.ip}:8081/metrics"]).stdout
    return sum(float(line.rpartition(" ")[2]) for line in said.splitlines() if line.startswith("vllm:request_success_total"))
