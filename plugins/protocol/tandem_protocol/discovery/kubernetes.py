# SPDX-License-Identifier: Apache-2.0
"""Discovery in Kubernetes' own API: no server besides the cluster's. `kubernetes`, `kubernetes://namespace[/fleet][?lease_s=10]`.

Kubernetes' Leases have no expiry: a holder writes when it renewed last, and whoever looks decides (`sightings`). So does every watcher
here, by its own clock. Each record is one Lease (`kubernetes_objects`), owned by its pod, so that it goes with it; what a process leaves
behind that was restarted within its pod, watchers remove after a minute.

Threads: as in `etcd`, registrations make their calls on one thread, the watch has its own. API server away: registrations try again, later
and later; the watch keeps its view (`view`).
"""

import logging
import random
import re
import time
from contextlib import closing
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import msgspec

from tandem_protocol.discovery.interface import BEATS_PER_LEASE, LEASE_TTL_S, R
from tandem_protocol.discovery.kubernetes_leases import LONGEST_PAUSE_S, BusyError, Leases
from tandem_protocol.discovery.kubernetes_objects import Change, KubernetesAddress, TooLargeError
from tandem_protocol.discovery.leased import LeasedRegistration
from tandem_protocol.discovery.remote import CALL_TIMEOUT_S, Publish, RemoteDiscovery, WatchThread
from tandem_protocol.discovery.sightings import Sightings
from tandem_protocol.discovery.view import View
from tandem_protocol.errors import ConfigError, UnavailableError
from tandem_protocol.kubernetes_access import own_namespace
from tandem_protocol.records import Record
from tandem_protocol.workers import WorkerRecord

log = logging.getLogger(__name__)

DEFAULT_FLEET = "tandem"
_FIRST_PAUSE_S = 0.5
_SHORT_TURN_S = 0.5
"""A watch that ends sooner was not worth its read; a pause follows."""
_SWEEPS_PER_TURN = 8
_NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_FLEET = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")


def parse_address(rest: str) -> KubernetesAddress:
    """What follows `kubernetes:` in a URL; what is left out is the pod's namespace, the fleet `tandem` and 10 s. Raises ConfigError."""
    parts = urlsplit(rest)
    namespace, fleet = parts.netloc or own_namespace(), parts.path.strip("/") or DEFAULT_FLEET
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    seconds = given.pop("lease_s", f"{LEASE_TTL_S:g}")
    if given or not _NAMESPACE.fullmatch(namespace) or not _FLEET.fullmatch(fleet) or not seconds.isdigit() or not 3 <= int(seconds) <= 600:
        raise ConfigError(f"TANDEM_DISCOVERY='kubernetes:{rest}' is not valid: write kubernetes://namespace/fleet, where the fleet is the "
                          "value of a label; ?lease_s= takes 3 to 600")
    return KubernetesAddress(namespace, fleet, float(seconds))


def open_kubernetes(rest: str, kind: type[Record]) -> "KubernetesDiscovery[Any]":
    """The cluster that this process runs in, or that of its kubeconfig; reads the credentials, and asks nothing yet. Raises ConfigError."""
    return KubernetesDiscovery(parse_address(rest), kind=kind)


def backoff_s(failures: int) -> float:
    """Doubles from failure to failure up to a bound, and is spread: a whole fleet fails at once."""
    return min(_FIRST_PAUSE_S * 2.0 ** min(failures - 1, 10), LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)  # noqa: S311 - no secret


def asked_s(failure: UnavailableError | None) -> float:
    """The pause that the server asked for."""
    return failure.wait_s if isinstance(failure, BusyError) else 0.0


class KubernetesDiscovery(RemoteDiscovery[R, Leases]):
    """Records in Leases. Followed by Kubernetes' own watch, and by whole reads: once a minute, when a lease should have been renewed, and
    when half of one was silent."""

    def __init__(self, address: KubernetesAddress, kind: type[Record] = WorkerRecord) -> None:
        super().__init__(Leases(address, kind.collection), kind)
        self.address = address
        self._collection = kind.collection
        self._seen = Sightings()
        self._missed = False

    async def close(self) -> None:
        """As of any store, and ends the connections."""
        await super().close()
        self._client.close()

    def _away(self, exc: Exception) -> UnavailableError:
        del exc
        return UnavailableError(f"Kubernetes took longer than {CALL_TIMEOUT_S:g} s: look at the API server")

    def _new_registration(self, record: R) -> "KubernetesRegistration[R]":
        return KubernetesRegistration(self, record)

    def _new_watch(self, publish: Publish[R]) -> "KubernetesWatch[R]":
        return KubernetesWatch(self, Leases(self.address, self._collection), publish)

    def _read(self, client: Leases) -> dict[str, bytes]:
        """A lease that an earlier read of the same version showed, longer ago than it runs, has ended."""
        try:
            listing = client.list()
        except UnavailableError:
            self._missed = True
            raise
        now = time.monotonic()
        if self._missed:
            self._seen.excuse(now)
            self._missed = False
        self._seen.listed(listing.leases, now)
        return self._seen.running


class KubernetesRegistration(LeasedRegistration[R, Leases]):
    """One Lease."""

    def __init__(self, discovery: KubernetesDiscovery[R], record: R) -> None:
        super().__init__(record, discovery.counts, discovery.call, self._until_next_s)
        self._beat_s = discovery.address.lease_s / BEATS_PER_LEASE
        self._made = False

    def _until_next_s(self, failures: int, failure: UnavailableError | None) -> float:
        """A little earlier than a third of the lease, and never in step with the others of a fleet that started together."""
        if not failures:
            return self._beat_s * random.uniform(0.85, 1.0)  # noqa: S311 - no secret
        return max(min(backoff_s(failures), self._beat_s), asked_s(failure))

    def write(self, client: Leases) -> None:
        """Into the Lease there is, or a new one."""
        record = self._record
        made = client.put(record.id, msgspec.json.encode(record), fresh=not self._made)
        if made and self._made:
            self._counts.re_registrations += 1
            log.info("discovery.registered_again worker=%s", record.id)
        self._made, self._written = True, record

    def keep(self, client: Leases) -> None:
        """A record that is too large for Kubernetes is no reason to let the one before it end."""
        if self._written is self._record and client.renew(self._record.id):
            return
        try:
            self.write(client)
        except TooLargeError:
            client.renew(self._record.id)
            raise

    def remove(self, client: Leases) -> None:
        """The Lease goes, and with it the record."""
        client.remove(self._record.id)


class KubernetesWatch(WatchThread[R]):
    """Reads everything, follows the changes until there is a reason to read again, and so on."""

    def __init__(self, discovery: KubernetesDiscovery[R], leases: Leases, publish: Publish[R]) -> None:
        super().__init__(publish)
        self._discovery = discovery
        self._leases = leases
        self._seen = Sightings()
        self._view: View[R] = View(discovery.counts, discovery.address.lease_s)
        self._revision = 0
        self._away = False
        self._sweeps = True
        self._refused = 0
        self._failures = 0

    def _interrupt(self) -> None:
        self._leases.interrupt()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.turn()
                self._failures = 0
            except UnavailableError as exc:
                self._away = True
                self._failures += 1
                if not self._stopping.is_set():
                    self._send(self._view.lost(str(exc)))
                    self._stopping.wait(max(backoff_s(self._failures), asked_s(exc)))
        self._leases.close()

    def turn(self) -> None:
        """One read and what follows it. Raises UnavailableError if the read fails."""
        listing = self._leases.list()
        now = time.monotonic()
        if self._away:
            self._seen.excuse(now)
            self._away = False
        self._seen.listed(listing.leases, now)
        self._revision = int(listing.version) if listing.version.isdigit() else 0
        self._show(now)
        self._sweep(now)
        try:
            self._follow(listing.version)
            self._refused = 0
        except UnavailableError as exc:  # no loss: what was read is true, only later news are missing
            self._refused += 1
            if self._refused == 1:
                log.warning("discovery.no_watch error=%s: reading everything now and then instead", exc)
        if time.monotonic() - now < _SHORT_TURN_S:  # nothing may make it read again and again without a pause
            self._stopping.wait(backoff_s(1 + self._refused))

    def _follow(self, version: str) -> None:
        with closing(self._leases.watch(version, self._discovery.address.lease_s / 2)) as changes:
            for change in changes:
                now = time.monotonic()
                if self._take(change, now):
                    self._show(now)
                if self._stopping.is_set() or self._seen.overdue(now):
                    return

    def _take(self, change: Change, now: float) -> bool:
        """Whether there is more to show than one sign of life."""
        if change.removed:
            self._seen.gone(change.lease.name)
            return True
        return self._seen.changed(change.lease, now)

    def _show(self, now: float) -> None:
        self._send(self._view.listed(self._discovery.decode(self._seen.running), self._revision, now))

    def _sweep(self, now: float) -> None:
        """Removes what died long ago; who has no right to do so leaves it to others."""
        for lease in self._seen.long_dead(now)[:_SWEEPS_PER_TURN] if self._sweeps else ():
            try:
                self._discovery.counts.swept += self._leases.sweep(lease)
            except UnavailableError as exc:
                self._sweeps = False
                log.info("discovery.no_sweep error=%s: leases of the dead stay until others remove them", exc)
