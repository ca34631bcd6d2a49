# SPDX-License-Identifier: Apache-2.0
"""Discovery in etcd (3.4 and later), over its JSON gateway by the library etcd3gw.

The one module that imports it. `etcd3`, the gRPC client, would force the slow pure-Python protobuf on the whole process.

Threads: registrations make their blocking calls on one thread, in turn; the watch has a thread of its own. Each has
its own HTTP session, and every call a deadline. Keys are `<prefix>/workers/<id>` (`routers/` for routers), under a lease each.

etcd away: registrations retry every second and write their latest record under a new lease; the watch keeps its view
(`view.py`). The process never depends on etcd for anything but news.
"""

import asyncio
import base64
import json
import logging
import os
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import msgspec
import requests
from etcd3gw.client import Etcd3Client
from etcd3gw.exceptions import Etcd3Exception
from etcd3gw.lease import Lease

from tandem_protocol.discovery.feed import Feed
from tandem_protocol.discovery.interface import BEATS_PER_LEASE, LEASE_TTL_S, Discovery, R, Registration, Snapshot
from tandem_protocol.discovery.leased import LeasedRegistration
from tandem_protocol.discovery.view import View
from tandem_protocol.errors import ConfigError, UnavailableError
from tandem_protocol.records import Record
from tandem_protocol.workers import WorkerRecord

log = logging.getLogger(__name__)

DEFAULT_PORT = 2379
DEFAULT_PREFIX = "/tandem"
_CONNECT_TIMEOUT_S = 1.0
_READ_TIMEOUT_S = 2.0
_CALL_TIMEOUT_S = 8.0
"""Of a whole turn on the calls' thread, which may be several requests and a wait for its turn."""
_RETRY_S = 1.0
"""Between two tries while etcd is away: well below the lease that watchers grant after its return."""
_LOST = (Etcd3Exception, requests.RequestException, ValueError, KeyError)
"""No answer, an error, or an answer that is none of etcd's (of a proxy, say)."""
T = TypeVar("T")


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


class EtcdDiscovery(Discovery[R]):
    """Records under leases."""

    def __init__(self, address: EtcdAddress, lease_s: float = LEASE_TTL_S, kind: type[Record] = WorkerRecord) -> None:
        super().__init__()
        self.address = address
        self._kind = kind
        self._decoder: msgspec.json.Decoder[R] = msgspec.json.Decoder(kind)
        self.lease_s = lease_s
        self._client = connect(address)
        self._calls = ThreadPoolExecutor(1, thread_name_prefix="tandem-discovery")
        self._feed: Feed[R] = Feed()
        self._bad: dict[str, bytes] = {}
        self._watch: EtcdWatch[R] | None = None
        self._registrations: list[EtcdRegistration[R]] = []

    async def register(self, record: R) -> Registration[R]:
        """Writes the record under a new lease; a task of this loop keeps it alive from then on."""
        registration = EtcdRegistration(self, record)
        await self.call(registration.write)
        self.counts.registrations += 1
        registration.start()
        self._registrations.append(registration)
        return registration

    def watch(self) -> AsyncGenerator[Snapshot[R], None]:
        """etcd's own watch, and a whole read at least three times per lease."""
        if self._watch is None:
            loop = asyncio.get_running_loop()
            self._watch = EtcdWatch(self, lambda snapshot: loop.call_soon_threadsafe(self._feed.publish, snapshot))
            self._watch.start()
        return self._feed.follow()

    async def list(self) -> tuple[R, ...]:
        """One read, without the grace that watches grant."""
        listing = await self.call(lambda client: read_all(client, self.key("")))
        records = self.decode(listing)
        return tuple(records[name] for name in sorted(records))

    async def close(self) -> None:
        """Ends the watch and revokes the own leases."""
        for registration in self._registrations:
            await registration.close()
        if self._watch is not None:
            await asyncio.to_thread(self._watch.stop)
        self._feed.close()
        self._calls.shutdown(wait=False, cancel_futures=True)

    def key(self, name: str) -> str:
        """As of the address, in the collection of this kind."""
        return self.address.key(name, self._kind.collection)

    async def call(self, step: Callable[[Etcd3Client], T]) -> T:
        """Runs a step on the calls' thread. Raises UnavailableError if etcd does not answer it."""
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                return await asyncio.get_running_loop().run_in_executor(self._calls, step, self._client)
        except (*_LOST, TimeoutError) as exc:
            where = f"{self.address.host}:{self.address.port}"
            raise UnavailableError(f"etcd at {where} does not answer ({type(exc).__name__}): start it, or mend TANDEM_DISCOVERY") from exc

    def decode(self, listing: Listing) -> dict[str, R]:
        """Id -> record; what is no record is counted and left out."""
        records = {}
        for key, value in listing.values.items():
            try:
                record = self._decoder.decode(value)
            except msgspec.DecodeError as exc:
                self._note_bad(key, value, exc)
            else:
                records[record.id] = record
        return records

    def _note_bad(self, key: str, value: bytes, exc: msgspec.DecodeError) -> None:
        """Once per value: everything is read again and again."""
        if self._bad.get(key) != value:
            self._bad[key] = value
            self.counts.bad_records += 1
            log.warning("discovery.bad_record key=%s error=%s: left out, remove it or update whoever wrote it", key, exc)


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


class EtcdWatch(Generic[R]):
    """The watching thread: read everything, wait for a change, and again."""

    def __init__(self, discovery: EtcdDiscovery[R], publish: Callable[[Snapshot[R]], object]) -> None:
        self._discovery = discovery
        self._publish = publish
        self._client = connect(discovery.address)
        self._view: View[R] = View(discovery.counts, discovery.lease_s)
        self._stopping = threading.Event()
        self._stream: requests.Response | None = None
        self._thread = threading.Thread(target=self._run, name="tandem-discovery-watch", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; blocks for the time of a request at most."""
        self._stopping.set()
        stream = self._stream
        with suppress(OSError, AttributeError, ValueError):  # no stream is open any more: then the thread sees the flag soon
            if stream is not None:
                _break(stream)
        self._thread.join(_CONNECT_TIMEOUT_S + _READ_TIMEOUT_S)

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
        self._send(self._view.listed(self._discovery.decode(listing), listing.revision, time.monotonic()))
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

    def _send(self, snapshot: Snapshot[R]) -> None:
        with suppress(RuntimeError):  # the loop was closed without closing us
            self._publish(snapshot)
