# SPDX-License-Identifier: Apache-2.0
"""Plays the chart's pods on one host: each container is the image's entry point with the rendered arguments and variables, in a network
namespace with an address of its own, so that all use the ports that the chart gives them. Volumes are folders; there is no kubelet, so
tests ask the probes and run the hooks themselves. Needs root, `ip`, and the right to make namespaces.
"""

import json
import os
import signal
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from charts import ROOT, Document, environment, expand
from servers import wait_for

SUBNET = "10.77.0"
_ENTRY_POINT = str(ROOT / "container" / "entrypoint.sh")
_COMMAND_S = 30
_ASK = "import sys, urllib.request as web; print(web.urlopen(sys.argv[1], timeout=5).status)"


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Address:
    """A pod's place in the network."""

    namespace: str
    ip: str


@dataclass
class Network:
    """A bridge in a namespace of its own, which is also where probes come from."""

    switch: str = field(default_factory=lambda: f"tandem-{os.getpid()}-node")
    pods: list[Address] = field(default_factory=list)

    def add(self) -> Address:
        """A further pod's namespace, connected to the others."""
        number = len(self.pods) + 2
        address = Address(f"tandem-{os.getpid()}-{number}", f"{SUBNET}.{number}")
        _ip("netns", "add", address.namespace)
        self.pods.append(address)
        _ip("-n", address.namespace, "link", "add", "eth0", "type", "veth", "peer", "name", f"pod{number}", "netns", self.switch)
        _ip("-n", self.switch, "link", "set", f"pod{number}", "master", "bridge", "up")
        _ip("-n", address.namespace, "link", "set", "lo", "up")
        _ip("-n", address.namespace, "addr", "add", f"{address.ip}/24", "dev", "eth0")
        _ip("-n", address.namespace, "link", "set", "eth0", "up")
        _ip("-n", address.namespace, "route", "add", "default", "via", f"{SUBNET}.1")
        return address

    def run(self, command: Sequence[str], timeout_s: float = _COMMAND_S, **variables: str) -> subprocess.CompletedProcess[str]:
        """As a process on the node."""
        inside = ["ip", "netns", "exec", self.switch, *command]
        return subprocess.run(inside, env={**os.environ, **variables}, capture_output=True, text=True, timeout=timeout_s, check=False)


@contextmanager
def network() -> Iterator[Network]:
    """Makes one and removes it. Raises OSError where that is not allowed."""
    made = Network()
    with ExitStack() as stack:
        _ip("netns", "add", made.switch)
        stack.callback(_ip, "netns", "del", made.switch)
        stack.callback(lambda: [_ip("netns", "del", one.namespace) for one in made.pods])
        _ip("-n", made.switch, "link", "set", "lo", "up")
        _ip("-n", made.switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", made.switch, "link", "set", "bridge", "up")
        _ip("-n", made.switch, "addr", "add", f"{SUBNET}.1/24", "dev", "bridge")
        yield made


@dataclass(frozen=True)
class PlayedContainer:
    """A container's process."""

    rendered: Document
    address: Address
    process: subprocess.Popen[bytes]
    log: Path
    net: Network

    def probe(self, name: str) -> bool:
        """Whether one of its HTTP probes succeeds, asked from the node as a kubelet does."""
        get = self.rendered[name]["httpGet"]
        port = {one["name"]: one["containerPort"] for one in self.rendered["ports"]}[get["port"]]
        return self.net.run([sys.executable, "-c", _ASK, f"http://{self.address.ip}:{port}{get['path']}"]).returncode == 0

    def wait_until_ready(self, timeout_s: float) -> None:
        """Both probes, as Kubernetes would wait for them."""
        def ready() -> bool:
            assert self.process.poll() is None, f"it ended: {self.log.read_text(errors='replace')[-3000:]}"
            return self.probe("startupProbe") and self.probe("readinessProbe")

        wait_for(ready, timeout_s, f"the readiness of {self.rendered['name']}")

    def stop_hook(self, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Its preStop command, run within it."""
        command = self.rendered["lifecycle"]["preStop"]["exec"]["command"]
        inside = ["ip", "netns", "exec", self.address.namespace, *command]
        return subprocess.run(inside, env=dict(os.environ), capture_output=True, text=True, timeout=timeout_s, check=False)

    def end(self, timeout_s: float) -> int:
        """SIGTERM, as a kubelet sends it; the exit code. The process is `ip`'s child no longer: `ip netns exec` becomes it."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """Whatever is left of it."""
        left = [self.process.pid, *(one.pid for one in psutil.process_iter() if self._is_mine(one))]
        for pid in left:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(_COMMAND_S)

    def _is_mine(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("PLAYED_POD") == self.address.namespace
        except psutil.Error:
            return False


def play(net: Network, rendered: Document, folder: Path) -> PlayedContainer:
    """Starts a container; `folder` becomes its volumes, its home and its log."""
    address = net.add()
    folder.mkdir(parents=True)
    volumes = {mount["mountPath"]: str(folder / mount["name"]) for mount in rendered["volumeMounts"] if mount["mountPath"] != "/dev/shm"}
    told = {name: _moved(value, volumes) for name, value in environment(rendered, address.ip).items()}
    for place in volumes.values():
        Path(place).mkdir()
    home = {"TANDEM_HOME": str(folder / "home"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(folder),
            "PLAYED_POD": address.namespace}
    # A command of its own takes the place of the image's entry point.
    command = [_moved(_option(part, volumes), volumes) for part in [*rendered.get("command", [_ENTRY_POINT]), *rendered.get("args", [])]]
    inside = ["ip", "netns", "exec", address.namespace, *(expand(part, told) for part in command)]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(inside, env={**told, **home}, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                   start_new_session=True)
    return PlayedContainer(rendered, address, process, log, net)


def _moved(value: str, volumes: dict[str, str]) -> str:
    places = (place + value.removeprefix(path) for path, place in volumes.items() if f"{value}/".startswith(f"{path}/"))
    return next(places, value)


def _option(part: str, volumes: dict[str, str]) -> str:
    """The same for `--option=/path`."""
    option, equals, value = part.partition("=")
    return f"{option}={_moved(value, volumes)}" if equals and option.startswith("--") else part


def ask(net: Network, test: Document, front: Address, service: str) -> str:
    """Runs the program of `helm test` on the node, with the front pod in place of the service; what it prints. Fails as it does."""
    told = environment(test)
    url = urllib.parse.urlsplit(told["URL"])
    assert url.hostname == service
    done = net.run([sys.executable, *test["args"][1:]], timeout_s=float(told["TIMEOUT_S"]) + _COMMAND_S,
                   **{**told, "URL": url._replace(netloc=f"{front.ip}:{url.port}").geturl()})
    assert done.returncode == 0, done.stderr
    return done.stdout


def stream(net: Network, front: Address, model: str, tokens: int) -> subprocess.Popen[str]:
    """A client on the node that reads a streamed answer to its end."""
    body = json.dumps({"text_input": "Count:", "stream": True, "max_tokens": tokens, "ignore_eos": True, "temperature": 0})
    program = ("import sys, urllib.request as web\n"
               "with web.urlopen(web.Request(sys.argv[1], data=sys.argv[2].encode()), timeout=300) as answer:\n"
               "    for line in answer:\n"
               "        print(line.decode().strip(), flush=True)\n")
    url = f"http://{front.ip}:8000/v2/models/{model}/generate_stream"
    return subprocess.Popen(["ip", "netns", "exec", net.switch, sys.executable, "-c", program, url, body], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)
