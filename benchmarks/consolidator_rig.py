# SPDX-License-Identifier: Apache-2.0
"""A consolidator in its own process on its own core, between an engine's sockets and a router's: both of them here, in one thread."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import zmq

from benchmarks.consolidator_trace import Frame, number, number_of
from benchmarks.errors import BenchmarkError

_START_S = 60.0
_ANSWER_S = 30.0
_END = (1 << 64) - 1
_LIVE_STEP_S = 0.1


@dataclass(frozen=True)
class Ports:
    """All of 127.0.0.1. The consolidator's replay is 1000 above its stream."""

    engine: int
    engine_replay: int
    stream: int
    admin: int


@dataclass
class Rig:
    """Sends frames and takes what comes of them."""

    engine: "zmq.Socket[bytes]"
    replay: "zmq.Socket[bytes]"
    router: "zmq.Socket[bytes]"
    consolidator: psutil.Process
    sent: list[Frame] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)
    """In order, without gaps."""
    arrived_s: dict[int, float] = field(default_factory=dict)
    """Number of a frame sent -> when the last that it led to came."""

    @property
    def open(self) -> int:
        """Frames that nothing has come of yet."""
        return len(self.sent) - len(self.arrived_s)

    def cpu_s(self) -> float:
        """Time that the consolidator has computed."""
        times = self.consolidator.cpu_times()
        return float(times.user + times.system)

    def waited_s(self) -> float:
        """Time that its threads could have computed but other processes had the core: what a shared machine adds."""
        tasks = Path(f"/proc/{self.consolidator.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[1]) for task in tasks) / 1e9

    def send(self, frame: Frame) -> int:
        """Publishes a frame; its number."""
        place = len(self.sent)
        number(frame.payload, place)
        self.sent.append(frame)
        self.engine.send_multipart([b"", place.to_bytes(8, "big"), frame.payload])
        return place

    def take(self, wait_s: float) -> bool:
        """Waits for something to do, and does it: whether anything came out."""
        ready = dict(self._poller().poll(max(0, int(wait_s * 1000))))
        if self.replay in ready:
            self._answer()
        if self.router in ready:
            self._receive()
        return self.router in ready

    def settle(self) -> None:
        """Until everything that was sent has come out. Raises BenchmarkError if it doesn't."""
        deadline = time.monotonic() + _ANSWER_S
        while self.open:
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{self.open} of {len(self.sent)} frames led to nothing within {_ANSWER_S:g} s")
            self.take(0.05)

    def _poller(self) -> zmq.Poller:
        poller = zmq.Poller()
        poller.register(self.router, zmq.POLLIN)
        poller.register(self.replay, zmq.POLLIN)
        return poller

    def _receive(self) -> None:
        try:
            while True:
                _, seq, payload = self.router.recv_multipart(zmq.DONTWAIT)
                if int.from_bytes(seq, "big") != len(self.received):
                    raise BenchmarkError(f"frame {int.from_bytes(seq, 'big')} came where {len(self.received)} was expected")
                self.received.append(payload)
                self.arrived_s[number_of(payload)] = time.perf_counter()
        except zmq.Again:
            return

    def _answer(self) -> None:
        """As vLLM: all from the number on that is asked for."""
        client, _, start = self.replay.recv_multipart()
        first = int.from_bytes(start, "big")
        for place, frame in enumerate(self.sent[first:], start=first):
            self.replay.send_multipart([client, b"", b"", place.to_bytes(8, "big"), bytes(frame.payload)])
        self.replay.send_multipart([client, b"", b"", _END.to_bytes(8, "big"), b""])


@contextmanager
def rig(ports: Ports, cores: Sequence[int]) -> Iterator[Rig]:
    """Starts a consolidator on the last of the cores; this process keeps to the others. Raises BenchmarkError if it doesn't start."""
    if len(cores) > 1:
        os.sched_setaffinity(0, set(cores[:-1]))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    engine, replay, router = context.socket(zmq.PUB), context.socket(zmq.ROUTER), context.socket(zmq.SUB)
    process = _start(ports, cores[-1])
    try:
        for one in (engine, replay):
            one.set(zmq.SNDHWM, 0)
        router.set(zmq.RCVHWM, 0)
        router.subscribe(b"")
        engine.bind(f"tcp://127.0.0.1:{ports.engine}")
        replay.bind(f"tcp://127.0.0.1:{ports.engine_replay}")
        router.connect(f"tcp://127.0.0.1:{ports.stream}")
        made = Rig(engine, replay, router, psutil.Process(process.pid))
        _await_ready(made, process, ports.admin)
        yield made
    finally:
        process.terminate()
        process.wait(_ANSWER_S)
        context.destroy(linger=0)
        os.sched_setaffinity(0, set(cores))


def _start(ports: Ports, core: int) -> "subprocess.Popen[bytes]":
    environment = {
        **os.environ, "TANDEM_CONSOLIDATOR_PORT": str(ports.stream), "TANDEM_CONSOLIDATOR_ADMIN_PORT": str(ports.admin),
        "TANDEM_CONSOLIDATOR_ENGINE": f"tcp://127.0.0.1:{ports.engine}", "TANDEM_CONSOLIDATOR_HOST": "127.0.0.1",
        "TANDEM_CONSOLIDATOR_ENGINE_REPLAY": f"tcp://127.0.0.1:{ports.engine_replay}",
        "TANDEM_CONSOLIDATOR_WATCHED_PID": str(os.getpid()), "TANDEM_CONSOLIDATOR_WORKER_INDEX": "0",
    }
    process = subprocess.Popen([sys.executable, "-m", "tandem_kvbm.consolidator"], env=environment)
    os.sched_setaffinity(process.pid, {core})  # before it has threads
    return process


def _await_ready(made: Rig, process: "subprocess.Popen[bytes]", admin: int) -> None:
    """Until both subscriptions stand: `/health` tells of the consolidator's, ZMQ's monitor of ours."""
    monitor = made.router.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    deadline = time.monotonic() + _START_S
    while not (_healthy(admin) and monitor.poll(0)):
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchmarkError(f"the consolidator did not start (exit code {process.poll()})")
        made.take(_LIVE_STEP_S)
    made.router.disable_monitor()
    monitor.close()
    made.take(_LIVE_STEP_S)  # the subscription goes out right after the handshake; were it late, the first frames would be missed, and said


def _healthy(admin: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{admin}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
