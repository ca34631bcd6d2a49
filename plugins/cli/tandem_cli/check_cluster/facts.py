# SPDX-License-Identifier: Apache-2.0
"""What `tandem check-cluster` found out, before anybody judges it. What could not be asked is None, never empty."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tandem_cli.check_cluster.needs import CustomKind, Needs


@dataclass(frozen=True)
class StorageClass:
    """One of the cluster's."""

    name: str
    is_default: bool


@dataclass(frozen=True)
class Node:
    """What pods may have of it; what they have already is not taken off."""

    name: str
    schedulable: bool
    gpu_label: bool
    allocatable: Mapping[str, float]


@dataclass(frozen=True)
class OperatorPod:
    """A pod of the GPU operator."""

    name: str
    phase: str


@dataclass(frozen=True)
class Quota:
    """One ResourceQuota: resource -> limit, and what is used of it, in units of one."""

    name: str
    hard: Mapping[str, float]
    used: Mapping[str, float]


@dataclass(frozen=True)
class Pull:
    """How an image's pull went; `failure` is Kubernetes' own reason, empty for a good one."""

    image: str
    failure: str = ""


@dataclass(frozen=True)
class ClusterFacts:
    """Everything that the checks judge."""

    namespace: str
    client_version: str = ""
    client_error: str = ""
    server_version: str = ""
    server_error: str = ""
    needs: Needs | None = None
    values_error: str = ""
    namespace_error: str = ""
    storage_classes: tuple[StorageClass, ...] | None = None
    nodes: tuple[Node, ...] | None = None
    operator_pods: tuple[OperatorPod, ...] | None = None
    served_kinds: Mapping[CustomKind, bool] | None = None
    quotas: tuple[Quota, ...] | None = None
    missing_objects: tuple[str, ...] | None = None
    """`secret/NAME` and `persistentvolumeclaim/NAME` that pods need and the namespace lacks."""
    dry_run_errors: tuple[str, ...] | None = None
    pulls: tuple[Pull, ...] | None = None
    unanswered: Mapping[str, str] = field(default_factory=dict)
    """Question -> why kubectl gave no answer."""
