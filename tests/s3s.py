# SPDX-License-Identifier: Apache-2.0
"""A real S3 endpoint for tests (moto's server), and a TCP proxy in front of it that misbehaves on demand."""

import contextlib
import select
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from servers import free_ports, wait_for

_START_TIMEOUT_S = 60.0
_CHUNK = 1 << 16
_POLL_S = 0.05
_TRICKLE_BYTES = 64
KEYS = {"access_key": "test", "secret_key": "testtest", "region": "us-east-1"}


def tier_settings(url: str, bucket: str) -> dict[str, str]:
    """The environment of an engine whose object tier is this bucket."""
    return {
        "DYN_KVBM_OBJECT_ENABLED": "true", "DYN_KVBM_OBJECT_BUCKET": bucket, "DYN_KVBM_OBJECT_ENDPOINT": url,
        "DYN_KVBM_OBJECT_REGION": KEYS["region"], "DYN_KVBM_OBJECT_ACCESS_KEY": KEYS["access_key"],
        "DYN_KVBM_OBJECT_SECRET_KEY": KEYS["secret_key"],
    }


@dataclass(frozen=True)
class S3:
    """A running endpoint."""

    port: int

    @property
    def url(self) -> str:
        """For DYN_KVBM_OBJECT_ENDPOINT."""
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> Any:
        """A client of its own, to look behind the store's back."""
        import boto3

        return boto3.client("s3", endpoint_url=self.url, aws_access_key_id=KEYS["access_key"], aws_secret_access_key=KEYS["secret_key"],
                            region_name=KEYS["region"])

    def make_bucket(self, name: str) -> str:
        """An empty bucket."""
        self.client().create_bucket(Bucket=name)
        return name

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """Its objects."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3]:
    """An endpoint that ends with the block."""
    s3 = S3(free_ports(1))
    with (folder / "s3.log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(s3.port)], stdin=subprocess.DEVNULL,
                                   stdout=log, stderr=log)
    try:
        wait_for(lambda: _answers(s3.url), _START_TIMEOUT_S, f"the S3 endpoint answers; see {folder / 's3.log'}")
        yield s3
    finally:
        process.kill()
        process.wait(10)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


class Mood(Enum):
    """What the proxy does with connections, also with those that are open."""

    GOOD = "passes everything on"
    DOWN = "refuses and breaks off"
    SILENT = "takes everything and answers nothing"
    BUSY = "answers 503 SlowDown"
    TRICKLE = "passes answers on, 64 bytes every 50 ms"
    CUT = "breaks off after 100,000 bytes of an answer"
    FLIP = "changes a byte far into an answer"


@dataclass
class Proxy:
    """A TCP proxy on one host. `mood` may change at any time."""

    target: int
    port: int = field(default_factory=lambda: free_ports(1))
    mood: Mood = Mood.GOOD
    requests: int = 0
    """Connections and requests that arrived while it was silent or busy, and connections otherwise."""

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._server = socket.create_server(("127.0.0.1", self.port), backlog=128)
        self._server.settimeout(_POLL_S)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Ends it and its connections."""
        self._stop.set()
        self._thread.join(10)
        self._server.close()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                client, _ = self._server.accept()
            except TimeoutError:
                continue
            self.requests += 1
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if self.mood is Mood.DOWN:
                _reset(client)
                return
            with socket.create_connection(("127.0.0.1", self.target), timeout=30) as server:
                self._pump(client, server)

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        answered = 0
        while not self._stop.is_set():
            readable, _, _ = select.select([client, server], [], [], _POLL_S)
            if self.mood is Mood.DOWN:
                _reset(client)
                return
            if client in readable:
                if not (data := client.recv(_CHUNK)):
                    return
                answered = 0
                if self.mood is Mood.BUSY:
                    _answer_busy(client)
                    return
                if self.mood is not Mood.SILENT:
                    server.sendall(data)
            if server in readable:
                if not (data := server.recv(_CHUNK)):
                    return
                if not self._pass_on(client, data, answered):
                    return
                answered += len(data)

    def _pass_on(self, client: socket.socket, data: bytes, answered: int) -> bool:
        if self.mood is Mood.CUT and answered + len(data) > 100_000:
            client.sendall(data[: max(0, 100_000 - answered)])
            return False
        if self.mood is Mood.FLIP and answered + len(data) > 5_000 >= answered:
            at = max(0, 5_000 - answered)
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        if self.mood is Mood.TRICKLE:
            return self._trickle(client, data)
        if self.mood is not Mood.SILENT:
            client.sendall(data)
        return True

    def _trickle(self, client: socket.socket, data: bytes) -> bool:
        for first in range(0, len(data), _TRICKLE_BYTES):
            if self._stop.wait(_POLL_S) or self.mood is not Mood.TRICKLE:
                return False
            client.sendall(data[first : first + _TRICKLE_BYTES])
        return True


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def _answer_busy(client: socket.socket) -> None:
    body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
    head = b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    client.sendall(head + body)
