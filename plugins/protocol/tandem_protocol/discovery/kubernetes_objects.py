# SPDX-License-Identifier: Apache-2.0
"""Our Leases (coordination.k8s.io/v1) as Kubernetes has them: names, labels, bodies, and what we read of them. Pure.

One object per record: the record as JSON in an annotation, its id in `holderIdentity`, and labels that say whose it is and of which kind.
"""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec

from tandem_protocol.discovery.interface import LEASE_TTL_S
from tandem_protocol.discovery.sightings import Lease
from tandem_protocol.errors import UnavailableError

FLEET_LABEL = "tandem.dev/fleet"
COLLECTION_LABEL = "tandem.dev/collection"
RECORD_ANNOTATION = "tandem.dev/record"
LIMIT_BYTES = 256 * 1024
"""Kubernetes' own, of all annotations of an object together."""
_LONGEST_LEASE_S = 3600.0
Body = dict[str, Any]
"""JSON, as Kubernetes' client takes it."""


@dataclass(frozen=True)
class KubernetesAddress:
    """Whose records: the namespace and the fleet in it, and how long one lives without a sign of life."""

    namespace: str
    fleet: str
    lease_s: float = LEASE_TTL_S

    def selector(self, collection: str) -> str:
        """The labels of a collection's Leases."""
        return f"{FLEET_LABEL}={self.fleet},{COLLECTION_LABEL}={collection}"

    def name(self, collection: str, record_id: str) -> str:
        """Of a record's Lease. Ids may have any signs in them, names of objects not; the id stands in `holderIdentity`."""
        digest = hashlib.sha256("\0".join((self.fleet, collection, record_id)).encode()).hexdigest()
        return f"tandem-{collection}-{digest[:20]}"


@dataclass(frozen=True)
class Owner:
    """The pod that Kubernetes removes together with what it owns."""

    name: str
    uid: str


class TooLargeError(UnavailableError):
    """The record does not fit into an annotation."""


class Metadata(msgspec.Struct, rename="camel"):
    name: str = ""
    uid: str = ""
    resource_version: str = ""
    annotations: dict[str, str] | None = None


class Spec(msgspec.Struct, rename="camel"):
    lease_duration_seconds: int | None = None


class Object(msgspec.Struct, rename="camel"):
    """Of a Status it takes only `code`."""

    metadata: Metadata = msgspec.field(default_factory=Metadata)
    spec: Spec | None = None
    code: int = 0

    def lease(self) -> Lease:
        """What counts of it. A duration is bounded, whoever wrote it."""
        seconds = self.spec.lease_duration_seconds if self.spec is not None else None
        record = (self.metadata.annotations or {}).get(RECORD_ANNOTATION, "")
        return Lease(self.metadata.name, self.metadata.uid, self.metadata.resource_version,
                     min(max(float(seconds or LEASE_TTL_S), 1.0), _LONGEST_LEASE_S), record.encode())


class ObjectList(msgspec.Struct, rename="camel"):
    metadata: Metadata
    items: list[Object]


class Event(msgspec.Struct):
    type: str
    object: Object


@dataclass(frozen=True)
class Listing:
    """What the API server held at one version."""

    version: str
    leases: tuple[Lease, ...]


@dataclass(frozen=True)
class Change:
    """One event of a watch."""

    lease: Lease
    removed: bool


def micro_time(now: datetime) -> str:
    """A MicroTime of a time in UTC. For people who look: nobody's decision rests on it.

    Never on the full second: the client library writes times anew, then without the fraction, and Kubernetes takes no MicroTime without.
    """
    return now.replace(microsecond=now.microsecond or 1).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def renewal(now: datetime) -> Body:
    """A merge patch: one sign of life."""
    return {"spec": {"renewTime": micro_time(now)}}


def whole(address: KubernetesAddress, collection: str, record_id: str, record: bytes, owner: Owner | None, now: datetime) -> Body:
    """The Lease of a record, to create it or as a merge patch. Raises TooLargeError for a record that doesn't fit."""
    if len(record) + len(RECORD_ANNOTATION) > LIMIT_BYTES:
        raise TooLargeError(f"the record of {record_id} has {len(record)} bytes, and Kubernetes takes {LIMIT_BYTES} in annotations: "
                            "let the worker list fewer adapters, or use etcd")
    labels = {FLEET_LABEL: address.fleet, COLLECTION_LABEL: collection, "app.kubernetes.io/managed-by": "tandem"}
    metadata: Body = {"name": address.name(collection, record_id), "labels": labels, "annotations": {RECORD_ANNOTATION: record.decode()}}
    if owner is not None:
        metadata["ownerReferences"] = [{"apiVersion": "v1", "kind": "Pod", "name": owner.name, "uid": owner.uid}]
    spec = {"holderIdentity": record_id, "leaseDurationSeconds": round(address.lease_s), "acquireTime": micro_time(now),
            "renewTime": micro_time(now)}
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
