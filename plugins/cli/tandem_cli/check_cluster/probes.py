# SPDX-License-Identifier: Apache-2.0
"""Finds out the facts about a cluster. No probe raises: what can't be asked is noted with its reason, and the others go on."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import msgspec

from tandem_cli.check_cluster import answers
from tandem_cli.check_cluster.facts import ClusterFacts, Node, OperatorPod, Quota, StorageClass
from tandem_cli.check_cluster.kubectl import Kubectl
from tandem_cli.check_cluster.needs import CustomKind, Needs, needs_of
from tandem_cli.check_cluster.pulls import try_pulls
from tandem_cli.check_cluster.quantities import parse_quantity
from tandem_cli.check_cluster.rendering import Chosen, documents_of, render, text_of, without_hooks
from tandem_protocol.errors import ConfigError, UnavailableError

T = TypeVar("T")
_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
_GPU_LABEL = "nvidia.com/gpu.present"
_OPERATOR = "app=gpu-operator"


def gather(kubectl: Kubectl, chosen: Chosen, pull_timeout_s: float) -> ClusterFacts:
    """All facts. `pull_timeout_s` 0: no image is pulled. Without a server nothing further is asked of it."""
    manifest, facts = _needs(chosen)
    facts = _versions(kubectl, facts)
    if facts.client_error or facts.server_error:
        return facts
    facts = _cluster(kubectl, facts)
    return _install(kubectl, facts, manifest, pull_timeout_s) if facts.needs is not None and not facts.namespace_error else facts


def _needs(chosen: Chosen) -> tuple[str, ClusterFacts]:
    facts = ClusterFacts(namespace=chosen.namespace)
    try:
        documents = without_hooks(documents_of(render(chosen)))
        return text_of(documents), replace(facts, needs=needs_of(documents))
    except (ConfigError, ValueError) as exc:
        return "", replace(facts, values_error=str(exc))


def _versions(kubectl: Kubectl, facts: ClusterFacts) -> ClusterFacts:
    """The client alone first: it answers without a server."""
    try:
        facts = replace(facts, client_version=kubectl.decode(answers.Versions, "version", "--client").client_version.git_version)
    except UnavailableError as exc:
        return replace(facts, client_error=str(exc))
    try:
        server = kubectl.decode(answers.Versions, "version").server_version
    except UnavailableError as exc:
        return replace(facts, server_error=str(exc))
    return replace(facts, server_version=server.git_version) if server else replace(facts, server_error="the server tells no version")


def _cluster(kubectl: Kubectl, facts: ClusterFacts) -> ClusterFacts:
    unanswered: dict[str, str] = {}

    def ask(question: str, probe: Callable[[Kubectl], T]) -> T | None:
        try:
            return probe(kubectl)
        except (UnavailableError, ValueError) as exc:
            unanswered[question] = str(exc)
            return None

    found = replace(facts, storage_classes=ask("storage class", _storage_classes), nodes=ask("GPU nodes", _nodes),
                    operator_pods=ask("GPU operator", _operator_pods), quotas=ask("quota", _quotas),
                    namespace_error=_namespace_error(kubectl), unanswered=unanswered)
    needs = facts.needs or Needs()
    return replace(found, served_kinds={kind: _is_served(kubectl, kind) for kind in sorted(needs.custom_kinds)})


def _install(kubectl: Kubectl, facts: ClusterFacts, manifest: str, pull_timeout_s: float) -> ClusterFacts:
    """What needs namespace and values."""
    needs = facts.needs or Needs()
    pulls = try_pulls(kubectl, needs.images, needs.pull_secrets, pull_timeout_s) if pull_timeout_s else None
    return replace(facts, missing_objects=_missing_objects(kubectl, needs), dry_run_errors=_dry_run(kubectl, manifest), pulls=pulls)


def _storage_classes(kubectl: Kubectl) -> tuple[StorageClass, ...]:
    found = kubectl.decode(answers.StorageClassList, "get", "storageclasses")
    return tuple(StorageClass(one.metadata.name, one.metadata.annotations.get(_DEFAULT_CLASS) == "true") for one in found.items)


def _nodes(kubectl: Kubectl) -> tuple[Node, ...]:
    found = kubectl.decode(answers.NodeList, "get", "nodes")
    return tuple(Node(one.metadata.name, not one.spec.unschedulable, one.metadata.labels.get(_GPU_LABEL) == "true",
                      _numbers(one.status.allocatable)) for one in found.items)


def _numbers(quantities: Mapping[str, str]) -> dict[str, float]:
    return {name: parse_quantity(value) for name, value in quantities.items()}


def _operator_pods(kubectl: Kubectl) -> tuple[OperatorPod, ...]:
    found = kubectl.decode(answers.PodList, "get", "pods", "--all-namespaces", f"--selector={_OPERATOR}")
    return tuple(OperatorPod(one.metadata.name, one.status.phase) for one in found.items)


def _quotas(kubectl: Kubectl) -> tuple[Quota, ...]:
    found = kubectl.decode(answers.QuotaList, "get", "resourcequotas")
    return tuple(Quota(one.metadata.name, _numbers(one.status.hard), _numbers(one.status.used)) for one in found.items)


def _namespace_error(kubectl: Kubectl) -> str:
    try:
        kubectl.text("get", "namespace", kubectl.namespace, "--output=name")
    except UnavailableError as exc:
        return str(exc)
    return ""


def _is_served(kubectl: Kubectl, kind: CustomKind) -> bool:
    """No such group, or no answer at all, is no such kind."""
    try:
        text = kubectl.text("get", "--raw", f"/apis/{kind.group}/{kind.version}")
        return kind.kind in {resource.kind for resource in msgspec.json.decode(text, type=answers.ApiResourceList).resources}
    except (UnavailableError, msgspec.MsgspecError):
        return False


def _missing_objects(kubectl: Kubectl, needs: Needs) -> tuple[str, ...]:
    """Objects that could not be read count as missing: the pods could not use them either, or nobody may look."""
    wanted = [*(f"secret/{name}" for name in needs.secrets), *(f"persistentvolumeclaim/{name}" for name in needs.volume_claims)]
    return tuple(one for one in wanted if kubectl.call("get", one, "--output=name").returncode != 0)


def _dry_run(kubectl: Kubectl, manifest: str) -> tuple[str, ...]:
    """What the server has against the manifests, one line each; it checks rights, kinds, fields and policies, and changes nothing."""
    try:
        done = kubectl.call("apply", "--dry-run=server", "--server-side", "--force-conflicts", "--filename=-", given=manifest)
    except UnavailableError as exc:
        return (str(exc),)
    return () if done.returncode == 0 else tuple(line.strip() for line in done.stderr.splitlines() if line.strip())
