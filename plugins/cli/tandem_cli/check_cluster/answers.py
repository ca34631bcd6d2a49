# SPDX-License-Identifier: Apache-2.0
"""The parts of Kubernetes' JSON that are looked at; everything else in it is passed over."""

import msgspec


class Metadata(msgspec.Struct, frozen=True):
    """Of any object."""

    name: str
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class Version(msgspec.Struct, frozen=True, rename="camel"):
    """Of the client or of the server."""

    git_version: str = ""


class Versions(msgspec.Struct, frozen=True, rename="camel"):
    """`kubectl version`."""

    client_version: Version = Version()
    server_version: Version | None = None


class StorageClassItem(msgspec.Struct, frozen=True):
    """A StorageClass."""

    metadata: Metadata


class StorageClassList(msgspec.Struct, frozen=True):
    """`get storageclasses`."""

    items: list[StorageClassItem]


class NodeSpec(msgspec.Struct, frozen=True):
    """A node's spec."""

    unschedulable: bool = False


class NodeStatus(msgspec.Struct, frozen=True):
    """A node's status."""

    allocatable: dict[str, str] = {}


class NodeItem(msgspec.Struct, frozen=True):
    """A Node."""

    metadata: Metadata
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()


class NodeList(msgspec.Struct, frozen=True):
    """`get nodes`."""

    items: list[NodeItem]


class Waiting(msgspec.Struct, frozen=True):
    """Why a container does not run yet."""

    reason: str = ""
    message: str = ""


class ContainerState(msgspec.Struct, frozen=True):
    """One of the three is there."""

    waiting: Waiting | None = None
    running: dict[str, str] | None = None
    terminated: dict[str, object] | None = None


class ContainerStatus(msgspec.Struct, frozen=True, rename="camel"):
    """Of one container of a pod."""

    name: str
    state: ContainerState = ContainerState()


class PodStatus(msgspec.Struct, frozen=True, rename="camel"):
    """Of a pod."""

    phase: str = ""
    container_statuses: list[ContainerStatus] = []


class PodItem(msgspec.Struct, frozen=True):
    """A Pod."""

    metadata: Metadata
    status: PodStatus = PodStatus()


class PodList(msgspec.Struct, frozen=True):
    """`get pods`."""

    items: list[PodItem]


class QuotaStatus(msgspec.Struct, frozen=True):
    """Of a ResourceQuota."""

    hard: dict[str, str] = {}
    used: dict[str, str] = {}


class QuotaItem(msgspec.Struct, frozen=True):
    """A ResourceQuota."""

    metadata: Metadata
    status: QuotaStatus = QuotaStatus()


class QuotaList(msgspec.Struct, frozen=True):
    """`get resourcequotas`."""

    items: list[QuotaItem]


class ApiResource(msgspec.Struct, frozen=True):
    """A kind that the server knows."""

    kind: str


class ApiResourceList(msgspec.Struct, frozen=True):
    """`get --raw /apis/GROUP/VERSION`."""

    resources: list[ApiResource]
