# SPDX-License-Identifier: Apache-2.0
"""The requests about Leases of one fleet and one kind of record.

Edge to Kubernetes' API. Every method blocks for one or two requests, each with a deadline, and raises UnavailableError; nothing is tried
again here. Used by one thread. Verbs: `list` and `watch` to follow, `create`, `patch` and `delete` to register.
"""

import contextlib
import os
import socket
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec
import urllib3
from kubernetes import client

from tandem_protocol import kubernetes_access as access
from tandem_protocol.discovery.kubernetes_objects import Body, Change, Event, KubernetesAddress, Listing, ObjectList, Owner, renewal, whole
from tandem_protocol.discovery.sightings import Lease
from tandem_protocol.errors import ConfigError, UnavailableError

LONGEST_PAUSE_S = 5.0
"""However long a server asks for: half of the lease that watchers grant when it is back."""
_CONNECT_TIMEOUT_S = 2.0
_READ_TIMEOUT_S = 3.0
SERVER_WATCH_S = 60
"""After which the server ends a watch, so that everything is read again once a minute."""
_LONGEST_LINE = 4 << 20
"""Above etcd's limit of 1.5 MB per object."""
_RIGHTS = "docs/kubernetes.md"
T = TypeVar("T")


class BusyError(UnavailableError):
    """The server asks for a pause."""

    def __init__(self, reason: str, wait_s: float) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class Leases:
    """The edge. Resource handling: `close` ends its connections; `interrupt` may be called by any thread."""

    def __init__(self, address: KubernetesAddress, collection: str) -> None:
        """Reads the credentials. Raises ConfigError where there are none."""
        self.address = address
        self._collection = collection
        self._owner = _own_pod(address.namespace)
        self._stream: urllib3.BaseHTTPResponse | None = None
        self._interrupted = False
        self._connect()

    def _connect(self) -> None:
        self._client = access.api_client(access.load_settings("to register in"))
        self._api = client.CoordinationV1Api(self._client)

    def list(self) -> Listing:
        """All Leases, as the store has them now and not as some cache had them."""
        answer = self._call(lambda: self._api.list_namespaced_lease(
            self.address.namespace, label_selector=self.address.selector(self._collection), **_RAW))
        try:
            listed = msgspec.json.decode(answer, type=ObjectList)
        except msgspec.DecodeError as exc:
            raise UnavailableError(f"what answers is no API server of Kubernetes: {exc}") from exc
        return Listing(listed.metadata.resource_version, tuple(one.lease() for one in listed.items))

    def put(self, record_id: str, record: bytes, *, fresh: bool) -> bool:
        """Writes a record whole; whether its Lease had to be made. `fresh` says that there is none, as far as known.

        Raises TooLargeError for a record that doesn't fit.
        """
        body = whole(self.address, self._collection, record_id, record, self._owner, datetime.now(UTC))
        if not fresh and self._patch(record_id, body):
            return False
        try:
            self._call(lambda: self._api.create_namespaced_lease(self.address.namespace, body, **_RAW))
        except ConflictError:
            if self._patch(record_id, body):
                return False
            raise
        return True

    def renew(self, record_id: str) -> bool:
        """One sign of life; whether there was a Lease to renew."""
        return self._patch(record_id, renewal(datetime.now(UTC)))

    def remove(self, record_id: str) -> None:
        """Also if it is gone already."""
        with contextlib.suppress(access.MissingError):
            self._call(lambda: self._api.delete_namespaced_lease(self._name(record_id), self.address.namespace, **_RAW))

    def sweep(self, lease: Lease) -> bool:
        """Removes this very version of somebody else's Lease; false if it has been renewed or is gone."""
        only_this = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid=lease.uid, resource_version=lease.version))
        try:
            self._call(lambda: self._api.delete_namespaced_lease(lease.name, self.address.namespace, body=only_this, **_RAW))
        except (access.MissingError, ConflictError):
            return False
        return True

    def watch(self, version: str, silence_s: float) -> Generator[Change, None, None]:
        """What changed since `version`, as it comes. Ends when the server ends it, when the connection breaks, when `version` is too old
        for it (410), and after `silence_s` without an event. Raises UnavailableError if it does not begin.
        """
        timeout = (_CONNECT_TIMEOUT_S, silence_s)
        try:
            stream = self._open(lambda: self._api.list_namespaced_lease(
                self.address.namespace, label_selector=self.address.selector(self._collection), resource_version=version, watch=True,
                allow_watch_bookmarks=True, timeout_seconds=SERVER_WATCH_S, _preload_content=False, _request_timeout=timeout))
        except _GoneError:
            return
        self._stream = stream
        try:
            if not self._interrupted:  # looked at only after the stream can be found
                yield from _changes(stream)
        except (*access.UNREACHABLE, msgspec.DecodeError, ValueError):
            return  # whatever broke it: a list says where things stand
        finally:
            self._stream = None
            stream.close()

    def interrupt(self) -> None:
        """Ends a watch that another thread waits in, and later ones; closing alone would leave it waiting."""
        self._interrupted = True
        stream = self._stream
        with contextlib.suppress(OSError, AttributeError, ValueError):  # no stream is open any more
            if stream is not None:
                with socket.socket(fileno=os.dup(stream.fileno())) as connection:
                    connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends its connections."""
        self._client.close()

    # --- one request ---

    def _name(self, record_id: str) -> str:
        return self.address.name(self._collection, record_id)

    def _patch(self, record_id: str, body: Body) -> bool:
        """Whether there was something to patch. A merge patch has no version, so a write that timed out but arrived is no conflict."""
        try:
            self._call(lambda: self._api.patch_namespaced_lease(
                self._name(record_id), self.address.namespace, body, _content_type="application/merge-patch+json", **_RAW))
        except access.MissingError:
            return False
        return True

    def _call(self, request: Callable[[], urllib3.BaseHTTPResponse]) -> bytes:
        """The body of the answer."""
        answer = self._open(request)
        try:
            return bytes(answer.data)
        except access.UNREACHABLE as exc:
            raise UnavailableError(f"Kubernetes' answer broke off ({type(exc).__name__})") from exc
        finally:
            answer.release_conn()

    def _open(self, request: Callable[[], urllib3.BaseHTTPResponse]) -> urllib3.BaseHTTPResponse:
        try:
            return request()
        except access.ApiException as exc:
            raise self._refusal(exc) from exc
        except access.UNREACHABLE as exc:
            what = type(exc).__name__
            raise UnavailableError(f"Kubernetes does not answer ({what}): look at its API server, or mend TANDEM_DISCOVERY") from exc

    def _refusal(self, exc: Any) -> UnavailableError:
        """What the answer means. After a 401, or a handshake that failed, token and certificates are read anew for the next try."""
        if exc.status in {0, 401}:
            self._renew_credentials()
        if exc.status in _NAMED:
            return _NAMED[exc.status](f"Kubernetes refuses: {exc.status} {exc.reason}")
        try:
            pause = access.judge(exc, 0.0, LONGEST_PAUSE_S, _RIGHTS)
        except UnavailableError as refusal:
            return refusal
        return BusyError(f"Kubernetes does not do it now: {pause.reason}", pause.wait_s)

    def _renew_credentials(self) -> None:
        old = self._client
        with contextlib.suppress(ConfigError):  # a token that is just being replaced: the next try reads it again
            self._connect()
            old.close()


class ConflictError(UnavailableError):
    """There is such an object already, or it is another version."""


class _GoneError(UnavailableError):
    """The version is too old."""


_NAMED: dict[int, type[UnavailableError]] = {409: ConflictError, 410: _GoneError}
_RAW: dict[str, Any] = {"_preload_content": False, "_request_timeout": (_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S)}


def _own_pod(namespace: str) -> Owner | None:
    """None outside of a pod, or for the records of another namespace, where a pod can own nothing."""
    pod = access.pod_settings()
    ours = pod.pod_uid and pod.pod_name and access.own_namespace() == namespace
    return Owner(pod.pod_name, pod.pod_uid) if ours else None


def _changes(stream: urllib3.BaseHTTPResponse) -> Iterator[Change]:
    """Until an ERROR, which is a 410 in nearly all cases; bookmarks only break the silence."""
    for line in _lines(stream):
        event = msgspec.json.decode(line, type=Event)
        if event.type == "ERROR":
            return
        if event.type in {"ADDED", "MODIFIED", "DELETED"}:
            yield Change(event.object.lease(), removed=event.type == "DELETED")


def _lines(stream: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    rest = b""
    for chunk in stream.stream(amt=None, decode_content=False):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line for line in lines if line.strip())
        if len(rest) > _LONGEST_LINE:
            raise ValueError("an event without an end")
