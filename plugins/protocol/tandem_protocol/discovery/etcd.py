# SPDX-License-Identifier: Apache-2.0
"""Discovery in etcd (3.4 and later), over its JSON gateway by the library etcd3gw.

The one module that imports it. `etcd3`, the gRPC client, would force the slow pure-Python protobuf on the whole process.

Threads: registrations make their blocking calls on one thread, in turn; the watch has a thread of its own. Each has
its own HTTP session, and every call a deadline. Keys are `<prefix>/workers/<id>` (`routers/` for routers), under a lease each.

etcd away: registrations retry every second and write their latest record under a new lease; the watch keeps its view
(`view.py`). The process never depends on etcd for anything but news.
"""

import base64
import json
import logging
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec
import requests
from etcd3gw.client import Etcd3Client
from etcd3gw.exceptions import Etcd3Exception
from etcd3gw.lease import Lease

from tandem_protocol.discovery.interface import BEATS_PER_LEASE, LEASE_TTL_S, R
from tandem_protocol.discovery.leased import LeasedRegistration
from tandem_protocol.discovery.remote import Publish, RemoteDiscovery, WatchThread
from tandem_protocol.discovery.view import View
from tandem_protocol.errors import ConfigError, UnavailableError
from tandem_protocol.records import Record
from tandem_protocol.workers import WorkerRecord

log = logging.getLogger(__name__)

DEFAULT_PORT = 2379
DEFAULT_PREFIX = "/tandem"
_CONNECT_TIMEOUT_S = 1.0
_READ_TIMEOUT_S = 2.0
_RETRY_S = 1.0
"""Between two tries while etcd is away: well below the lease that watchers grant after its return."""
_LOST = (Etcd3Exception, requests.RequestException, ValueError, KeyError)
"""No answer, an error, or an answer that is none of etcd's (of a proxy, say)."""


@dataclass(frozen=True)
class EtcdAddress:
    """Where etcd is, and under which prefix our keys are."""

    host: str
    port: int
    prefix: str

    def key(self, name: str, collection: str = WorkerRecord.collection) -> str:
        """The key of a record; of the whole collection for ""."""
        return f"{self.prefix}/{collection}/{name}"


def parse_address(rest: str) -> EtcdAddress:
    """What follows `etcd:` in a URL. Raises ConfigError."""
    try:
        parts = urlsplit(rest)
        host, port = parts.hostname, parts.port or DEFAULT_PORT
    except ValueError:
        host, port = None, 0
    if not host or parts.username or parts.query:
        raise ConfigError(f"TANDEM_DISCOVERY='etcd:{rest}' is not valid: write etcd://host:port[/prefix]")
    return EtcdAddress(host, port, parts.path.rstrip("/") or DEFAULT_PREFIX)


def open_etcd(rest: str, kind: type[Record]) -> "EtcdDiscovery[Any]":
    """etcd at the address of an `etcd:` URL; does not connect yet."""
    return EtcdDiscovery(parse_address(rest), kind=kind)


class Session(requests.Session):
    """A session whose every request has a deadline, and that goes straight to etcd: proxies are not for it."""

    def __init__(self) -> None:
        super().__init__()
        self.trust_env = False

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        """As of `requests`."""
        if kwargs.get("timeout") is None:
            kwargs["timeout"] = (_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S)
        return super().request(*args, **kwargs)


def connect(address: EtcdAddress) -> Etcd3Client:
    """A client for use on one thread; it connects when used."""
    return Etcd3Client(host=address.host, port=address.port, session=Session(), api_path="/v3/")


@dataclass(frozen=True)
class Listing:
    """What etcd held at one revision."""

    revision: int
    values: dict[str, bytes]


def read_all(client: Etcd3Client, prefix: str) -> Listing:
    """All keys that start with `prefix`. Unlike the library's `get_prefix` it tells the revision, from which a watch can go on."""
    answer = client.post(client.get_url("/kv/range"), json=_range(prefix))
    values = {_text(pair["key"]): base64.b64decode(pair.get("value", "")) for pair in answer.get("kvs", [])}
    return Listing(int(answer["header"]["revision"]), values)


def _range(prefix: str) -> dict[str, str]:
    """All keys that start with `prefix`, which ends with a slash."""
    return {"key": _b64(prefix), "range_end": _b64(prefix[:-1] + chr(ord("/") + 1))}


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _text(encoded: str) -> str:
    return base64.b64decode(encoded).decode(errors="replace")


class EtcdDiscovery(RemoteDiscovery[R, Etcd3Client]):
    """Records under leases. Followed by etcd's own watch, and by a whole read at least three times per lease."""

    _lost = (*_LOST, TimeoutError)

    def __init__(self, address: EtcdAddress, lease_s: float = LEASE_TTL_S, kind: type[Record] = WorkerRecord) -> None:
        super().__init__(connect(address), kind)
        self.address = address
        self._kind = kind
        self.lease_s = lease_s

    def key(self, name: str) -> str:
        """As of the address, in the collection of this kind."""
        return self.address.key(name, self._kind.collection)

    def _away(self, exc: Exception) -> UnavailableError:
        where = f"{self.address.host}:{self.address.port}"
        return UnavailableError(f"etcd at {where} does not answer ({type(exc).__name__}): start it, or mend TANDEM_DISCOVERY")

    def _new_registration(self, record: R) -> "EtcdRegistration[R]":
        return EtcdRegistration(self, record)

    def _new_watch(self, publish: Publish[R]) -> "EtcdWatch[R]":
        return EtcdWatch(self, publish)

    def _read(self, client: Etcd3Client) -> dict[str, bytes]:
        return read_all(client, self.key("")).values


class EtcdRegistration(LeasedRegistration[R, Etcd3Client]):
    """One key and its lease."""

    def __init__(self, discovery: EtcdDiscovery[R], record: R) -> None:
        beat_s = discovery.lease_s / BEATS_PER_LEASE
        super().__init__(record, discovery.counts, discovery.call, lambda failures, _: _RETRY_S if failures else beat_s)
        self._discovery = discovery
        self._lease: Lease | None = None

    def write(self, client: Etcd3Client) -> None:
        """Under the lease there is, or a new one."""
        record = self._record
        lease = self._lease or client.lease(ttl=round(self._discovery.lease_s))
        self._lease = None
        client.put(self._discovery.key(record.id), msgspec.json.encode(record), lease=lease)
        self._lease, self._written = lease, record

    def keep(self, client: Etcd3Client) -> None:
        """Refreshes the lease; one that etcd has forgotten is made anew."""
        if self._lease is not None and self._lease.refresh() > 0:
            if self._written is not self._record:
                self.write(client)
            return
        self._lease = None
        self.write(client)
        self._counts.re_registrations += 1
        log.info("discovery.registered_again worker=%s", self._record.id)

    def remove(self, _: Etcd3Client) -> None:
        """Revokes the lease, and the key with it."""
        if self._lease is not None:
            self._lease.revoke()
        self._lease = None


def _break(stream: requests.Response) -> None:
    """Ends a read that another thread waits in; closing alone would leave it waiting."""
    with socket.socket(fileno=os.dup(stream.raw.fileno())) as connection:
        connection.shutdown(socket.SHUT_RDWR)


class EtcdWatch(WatchThread[R]):
    """Reads everything, waits for a change, and again."""

    def __init__(self, discovery: EtcdDiscovery[R], publish: Publish[R]) -> None:
        super().__init__(publish)
        self._discovery = discovery
        self._client = connect(discovery.address)
        self._view: View[R] = View(discovery.counts, discovery.lease_s)
        self._stream: requests.Response | None = None

    def _interrupt(self) -> None:
        stream = self._stream
        with suppress(OSError, AttributeError, ValueError):  # no stream is open any more: then the thread sees the flag soon
            if stream is not None:
                _break(stream)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.turn()
            except _LOST as exc:
                if not self._stopping.is_set():
                    self._send(self._view.lost(f"{type(exc).__name__}: {exc}"))
                    self._stopping.wait(_RETRY_S)

    def turn(self) -> None:
        """Reads everything, and returns after the next change or a third of a lease. Raises when etcd goes away."""
        listing = read_all(self._client, self._discovery.key(""))
        self._send(self._view.listed(self._discovery.decode(listing.values), listing.revision, time.monotonic()))
        self._await_change(listing.revision)

    def _await_change(self, revision: int) -> None:
        wanted = {"create_request": {**_range(self._discovery.key("")), "start_revision": revision + 1}}
        timeout = (_CONNECT_TIMEOUT_S, self._discovery.lease_s / BEATS_PER_LEASE)
        # Not the library's own watch: it does not tell when its stream ends, and takes each chunk for one message.
        with self._client.session.post(self._client.get_url("/watch"), json=wanted, stream=True, timeout=timeout) as stream:
            self._stream = stream
            try:
                self._read_stream(stream)
            except requests.ConnectionError as exc:
                if "timed out" not in str(exc).lower():
                    raise
            finally:
                self._stream = None

    def _read_stream(self, stream: requests.Response) -> None:
        """Returns at the first event. Raises requests.ConnectionError when nothing came in time, or the stream broke."""
        for line in stream.iter_lines():
            if line.strip() and "created" not in json.loads(line)["result"]:
                return
        raise requests.ConnectionError("the watch ended")
