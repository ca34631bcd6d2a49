# SPDX-License-Identifier: Apache-2.0
"""What rendered manifests ask of a cluster. Pure: the documents of `helm template` in, needs out.

Pods are counted as their owners will make them: replicas, and for a LeaderWorkerSet the size of its groups.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tandem_cli.check_cluster.quantities import parse_quantity

Document = Mapping[str, Any]
_BUILT_IN = frozenset({"", "apps", "autoscaling", "batch", "policy", "networking.k8s.io", "rbac.authorization.k8s.io", "storage.k8s.io"})
_GPU_WORD = "gpu"


@dataclass(frozen=True, order=True)
class CustomKind:
    """A kind that a CustomResourceDefinition must bring."""

    group: str
    version: str
    kind: str


@dataclass(frozen=True)
class Claim:
    """Storage that will be asked for."""

    name: str
    size_bytes: float
    storage_class: str = ""
    """Empty: the cluster's default."""


@dataclass(frozen=True)
class Needs:
    """Everything together."""

    custom_kinds: frozenset[CustomKind] = frozenset()
    images: tuple[str, ...] = ()
    pull_secrets: tuple[str, ...] = ()
    pods: int = 0
    requests: Mapping[str, float] = field(default_factory=dict)
    """Resource -> sum over all pods, in units of one (cores, bytes, GPUs)."""
    largest_gpus: Mapping[str, int] = field(default_factory=dict)
    """GPU resource -> what one pod asks for at most: a node must have as many."""
    claims: tuple[Claim, ...] = ()
    secrets: tuple[str, ...] = ()
    """That pods refer to, must be there before."""
    volume_claims: tuple[str, ...] = ()
    """Claims that pods mount and nobody here makes."""

    @property
    def gpus(self) -> dict[str, int]:
        """GPU resource -> number, of all pods."""
        return {name: int(value) for name, value in self.requests.items() if is_gpu(name)}


def is_gpu(resource: str) -> bool:
    """nvidia.com/gpu, amd.com/gpu, nvidia.com/gpu.shared."""
    return "/" in resource and _GPU_WORD in resource.rpartition("/")[2]


def needs_of(documents: Sequence[Document]) -> Needs:
    """Adds up what the documents ask for. Raises ValueError for quantities that are none."""
    pods = [(count, spec) for document in documents for count, spec in _pods(document)]
    made = {document["metadata"]["name"] for document in documents if document["kind"] == "PersistentVolumeClaim"}
    requests: defaultdict[str, float] = defaultdict(float)
    largest: dict[str, int] = {}
    for count, spec in pods:
        for resource, value in _requests(spec).items():
            requests[resource] += value * count
            if is_gpu(resource) and count:
                largest[resource] = max(largest.get(resource, 0), int(value))
    specs = [spec for _, spec in pods]
    return Needs(
        custom_kinds=frozenset(kind for document in documents if (kind := _custom_kind(document)) is not None),
        images=_unique(container["image"] for spec in specs for container in _containers(spec)),
        pull_secrets=_unique(secret["name"] for spec in specs for secret in spec.get("imagePullSecrets", [])),
        pods=sum(count for count, _ in pods), requests=dict(requests), largest_gpus=largest,
        claims=tuple(claim for document in documents for claim in _claims(document)),
        secrets=_unique(name for spec in specs for name in _secrets(spec)),
        volume_claims=_unique(name for spec in specs for name in _volume_claims(spec) if name not in made),
    )


def _unique(names: Iterator[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _custom_kind(document: Document) -> CustomKind | None:
    group, slash, version = document["apiVersion"].rpartition("/")
    return None if not slash or group in _BUILT_IN else CustomKind(group, version, document["kind"])


def _pods(document: Document) -> Iterator[tuple[int, Document]]:
    """Number of pods and their spec; those of `helm test` come later and go, so they don't count."""
    spec = document.get("spec") or {}
    replicas = int(spec.get("replicas", 1))
    if document["kind"] in {"Deployment", "StatefulSet"}:
        yield replicas, spec["template"]["spec"]
    elif document["kind"] == "LeaderWorkerSet":
        group = spec["leaderWorkerTemplate"]
        leaders = 1 if "leaderTemplate" in group else 0
        if leaders:
            yield replicas, group["leaderTemplate"]["spec"]
        yield replicas * (int(group["size"]) - leaders), group["workerTemplate"]["spec"]


def _containers(spec: Document) -> list[Document]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def _requests(spec: Document) -> dict[str, float]:
    """Of one pod: the containers that run together, as Kubernetes counts them (a limit without a request is one)."""
    total: defaultdict[str, float] = defaultdict(float)
    for container in spec["containers"]:
        resources = container.get("resources") or {}
        for resource, value in {**(resources.get("limits") or {}), **(resources.get("requests") or {})}.items():
            total[resource] += parse_quantity(value)
    return dict(total)


def _claims(document: Document) -> Iterator[Claim]:
    spec = document.get("spec") or {}
    if document["kind"] == "PersistentVolumeClaim":
        yield _claim(document)
    elif document["kind"] == "StatefulSet":
        for template in spec.get("volumeClaimTemplates", []):
            yield from [_claim(template)] * int(spec.get("replicas", 1))


def _claim(document: Document) -> Claim:
    spec = document["spec"]
    return Claim(document["metadata"]["name"], parse_quantity(spec["resources"]["requests"]["storage"]), spec.get("storageClassName", ""))


def _secrets(spec: Document) -> Iterator[str]:
    yield from (secret["name"] for secret in spec.get("imagePullSecrets", []))
    for container in _containers(spec):
        for entry in container.get("env", []):
            reference = entry.get("valueFrom", {}).get("secretKeyRef")
            if reference and not reference.get("optional"):
                yield reference["name"]


def _volume_claims(spec: Document) -> Iterator[str]:
    for volume in spec.get("volumes", []):
        if "persistentVolumeClaim" in volume:
            yield volume["persistentVolumeClaim"]["claimName"]
