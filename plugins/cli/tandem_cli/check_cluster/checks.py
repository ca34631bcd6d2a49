# SPDX-License-Identifier: Apache-2.0
"""The checks of `tandem check-cluster`: each a pure function from facts to one finding, with the command that mends it."""

import re
from collections.abc import Callable, Sequence

from tandem_cli.check_cluster.facts import ClusterFacts, Node, Quota
from tandem_cli.check_cluster.needs import CustomKind, Needs
from tandem_cli.check_cluster.quantities import show_quantity
from tandem_cli.doctor.checks import Finding, failure, ok, skipped, warning

OLDEST_SERVER = (1, 29)
"""The chart's kubeVersion."""
_INSTALL_KUBECTL = ("curl -fLO https://dl.k8s.io/release/$(curl -fLs https://dl.k8s.io/release/stable.txt)/bin/linux/amd64/kubectl && "
                    "sudo install -m 755 kubectl /usr/local/bin/")
_INSTALL_HELM = "curl -fL https://raw.githubusercontent.com/helm/helm/main/scripts/get-helm-3 | bash"
_INSTALL_OPERATOR = ("helm install gpu-operator gpu-operator --repo https://helm.ngc.nvidia.com/nvidia --namespace gpu-operator "
                     "--create-namespace")
_LOOK_AT_NODES = "kubectl get nodes -o custom-columns=NAME:.metadata.name,GPUS:.status.allocatable"
_REGISTRY_LOGIN = "create secret docker-registry NAME --docker-server=... --docker-username=... --docker-password=..."
_INSTALL_KINDS = {
    "leaderworkerset.x-k8s.io": "kubectl apply --server-side -f https://github.com/kubernetes-sigs/lws/releases/latest/download/manifests.yaml",
    "monitoring.coreos.com": "helm install prometheus oci://ghcr.io/prometheus-community/charts/kube-prometheus-stack "
                             "--namespace monitoring --create-namespace",
    "keda.sh": "helm install keda keda --repo https://kedacore.github.io/charts --namespace keda --create-namespace",
    "gateway.networking.k8s.io": "kubectl apply -f https://github.com/kubernetes-sigs/gateway-api/releases/latest/download/"
                                 "standard-install.yaml",
    "inference.networking.k8s.io": "kubectl apply -f https://github.com/kubernetes-sigs/gateway-api-inference-extension/releases/latest/"
                                   "download/manifests.yaml",
}


def check_kubectl(facts: ClusterFacts) -> Finding:
    """The program."""
    return failure(facts.client_error, _INSTALL_KUBECTL) if facts.client_error else ok(f"kubectl {facts.client_version}")


def check_server(facts: ClusterFacts) -> Finding:
    """The cluster answers, and is new enough for the chart."""
    if facts.client_error:
        return skipped("there is no kubectl to ask with", "see kubectl")
    if facts.server_error:
        return failure(f"no cluster answers: {facts.server_error}", "kubectl config get-contexts; kubectl config use-context NAME")
    numbers = re.findall(r"\d+", facts.server_version)
    if tuple(map(int, numbers[:2])) < OLDEST_SERVER:
        return failure(f"Kubernetes {facts.server_version} is older than {'.'.join(map(str, OLDEST_SERVER))}, the chart's oldest",
                       "upgrade the cluster: kubectl get nodes shows its versions")
    return ok(f"Kubernetes {facts.server_version}")


def check_values(facts: ClusterFacts) -> Finding:
    """The chart renders with them."""
    if facts.values_error:
        fix = _INSTALL_HELM if "no helm" in facts.values_error else "correct the values; helm/tandem/values.yaml tells their meaning"
        return failure(facts.values_error, fix)
    needs = _needs(facts)
    gpus = ", ".join(f"{count} {name}" for name, count in needs.gpus.items()) or "no GPU"
    return ok(f"{needs.pods} pods, {show_quantity('cpu', needs.requests.get('cpu', 0))} cores, "
              f"{show_quantity('memory', needs.requests.get('memory', 0))} of memory, {gpus}")


def check_namespace(facts: ClusterFacts) -> Finding:
    """It is there."""
    if facts.server_version and not facts.namespace_error:
        return ok(facts.namespace)
    return _unasked(facts, "namespace") or failure(facts.namespace_error, f"kubectl create namespace {facts.namespace}")


def check_storage(facts: ClusterFacts) -> Finding:
    """A default StorageClass, or those that are named."""
    classes = facts.storage_classes
    if classes is None:
        return _unasked(facts, "storage class") or skipped("it was not asked for", "see server")
    names = {one.name for one in classes}
    default = [one.name for one in classes if one.is_default]
    claims = _needs(facts).claims
    if unknown := [claim for claim in claims if claim.storage_class and claim.storage_class not in names]:
        return failure(f"claim {unknown[0].name} wants the StorageClass {unknown[0].storage_class}, which is not there",
                       f"choose one of: {', '.join(sorted(names)) or 'none is there'} (kubectl get storageclass)")
    if len(default) > 1:
        return warning(f"several default StorageClasses: {', '.join(default)}", _set_default(default[1], "false"))
    if default:
        return ok(f"{default[0]} is the default")
    fix = _set_default(min(names), "true") if names else "install a storage provisioner: the cluster has no StorageClass at all"
    needed = [claim.name for claim in claims if not claim.storage_class]
    if needed:
        return failure(f"no StorageClass is the default, and claim {needed[0]} names none", fix)
    return warning("no StorageClass is the default; these values don't need one", fix)


def _set_default(name: str, value: str) -> str:
    return (f"kubectl patch storageclass {name} -p "
            f"'{{\"metadata\": {{\"annotations\": {{\"storageclass.kubernetes.io/is-default-class\": \"{value}\"}}}}}}'")


def check_gpu_nodes(facts: ClusterFacts) -> Finding:
    """As many GPUs as the values ask for, and on one node as many as the largest pod does."""
    needs = _needs(facts)
    if facts.nodes is None:
        return _unasked(facts, "GPU nodes") or skipped("they were not asked for", "see server")
    if not needs.gpus:
        return ok("these values need none")
    found = [_gpus_of(facts.nodes, resource, wanted, needs.largest_gpus.get(resource, 0)) for resource, wanted in needs.gpus.items()]
    return next((one for one in found if one.fix), ok(", ".join(one.says for one in found)))


def _gpus_of(nodes: Sequence[Node], resource: str, wanted: int, largest: int) -> Finding:
    """Of one kind of GPU."""
    per_node = [int(node.allocatable.get(resource, 0)) for node in nodes if node.schedulable]
    total, most = sum(per_node), max(per_node, default=0)
    if not total:
        labelled = sum(node.gpu_label for node in nodes)
        if labelled:
            return failure(f"no schedulable node offers {resource}, though {labelled} have the label of GPU nodes",
                           f"look at the device plugin: kubectl get pods -A; {_LOOK_AT_NODES}")
        return failure(f"no schedulable node offers {resource}", _INSTALL_OPERATOR)
    if most < largest:
        return failure(f"one pod asks for {largest} {resource}, and no node has more than {most}",
                       f"lower tensorParallelSize, or spread the engine (worker.nodes); {_LOOK_AT_NODES}")
    if total < wanted:
        return failure(f"{wanted} {resource} are asked for, and the nodes have {total}", f"lower replicas, or add nodes; {_LOOK_AT_NODES}")
    return ok(f"{wanted} {resource} asked for, {total} on the nodes (others' use not taken off)")


def check_gpu_operator(facts: ClusterFacts) -> Finding:
    """Its pods run, where there are any; a device plugin can also be installed without it."""
    pods = facts.operator_pods
    if pods is None:
        return _unasked(facts, "GPU operator") or skipped("it was not asked for", "see server")
    if not _needs(facts).gpus:
        return ok("these values need no GPU")
    if not pods:
        return warning("there is no GPU operator: fine if GPUs are offered by a device plugin of another kind", _INSTALL_OPERATOR)
    bad = [pod for pod in pods if pod.phase not in {"Running", "Succeeded"}]
    if bad:
        return failure(f"{bad[0].name} is {bad[0].phase}", "kubectl describe pods -A -l app=gpu-operator")
    return ok(f"{len(pods)} pods run")


def check_kinds(facts: ClusterFacts) -> Finding:
    """The CustomResourceDefinitions of what is installed."""
    if facts.served_kinds is None:
        return skipped("they were not asked for", "see server")
    missing = sorted(kind for kind, served in facts.served_kinds.items() if not served)
    if missing:
        groups = dict.fromkeys(kind.group for kind in missing)
        fixes = [_INSTALL_KINDS.get(group, f"install the CustomResourceDefinitions of {group}") for group in groups]
        return failure(f"the cluster does not know {', '.join(map(_name, missing))}", "; ".join(fixes))
    return ok(", ".join(map(_name, sorted(facts.served_kinds))) or "these values need none")


def _name(kind: CustomKind) -> str:
    return f"{kind.kind} ({kind.group}/{kind.version})"


def check_quota(facts: ClusterFacts) -> Finding:
    """What is left of every quota of the namespace is enough."""
    if facts.quotas is None:
        return _unasked(facts, "quota") or skipped("it was not asked for", "see server")
    needs = _needs(facts)
    for quota in facts.quotas:
        for resource, hard in quota.hard.items():
            wanted, left = _wanted(needs, resource), hard - quota.used.get(resource, 0.0)
            if wanted > left:
                return failure(f"quota {quota.name} has {show_quantity(resource, max(0.0, left))} of {resource} left, and these values ask "
                               f"for {show_quantity(resource, wanted)}", _raise_quota(facts, quota))
    return ok(f"{len(facts.quotas)} quotas leave enough" if facts.quotas else "the namespace has none")


def _raise_quota(facts: ClusterFacts, quota: Quota) -> str:
    return (f"kubectl -n {facts.namespace} edit resourcequota {quota.name}, or lower the values; before an upgrade, what runs already "
            "counts twice")


def _wanted(needs: Needs, resource: str) -> float:
    """What the values ask of a quota's resource; nothing for resources that they don't touch."""
    if resource in {"pods", "count/pods"}:
        return float(needs.pods)
    if resource == "persistentvolumeclaims":
        return float(len(needs.claims))
    if resource == "requests.storage":
        return sum(claim.size_bytes for claim in needs.claims)
    return needs.requests.get(resource.removeprefix("requests."), 0.0)


def check_objects(facts: ClusterFacts) -> Finding:
    """Secrets and claims that pods refer to."""
    if facts.missing_objects is None:
        return skipped("they were not asked for", "see namespace and values")
    if not facts.missing_objects:
        needs = _needs(facts)
        return ok(", ".join([*needs.secrets, *needs.volume_claims]) or "these values refer to none")
    first = facts.missing_objects[0]
    kind, _, name = first.partition("/")
    command = f"create secret generic {name} --from-literal=HF_TOKEN=..." if kind == "secret" else f"apply -f FILE with the claim {name}"
    if name in _needs(facts).pull_secrets:
        command = _REGISTRY_LOGIN.replace("NAME", name)
    return failure(f"{', '.join(facts.missing_objects)} can't be read in the namespace", f"kubectl -n {facts.namespace} {command}")


def check_dry_run(facts: ClusterFacts) -> Finding:
    """The server itself takes every object: rights, kinds, fields, admission policies."""
    errors = facts.dry_run_errors
    if errors is None:
        return skipped("it was not tried", "see namespace and values")
    if not errors:
        return ok("the server takes every object")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    rights = f"kubectl auth can-i --list -n {facts.namespace}"
    fix = rights if "forbidden" in errors[0].lower() else "helm template ... | kubectl apply --dry-run=server -f -"
    return failure(f"{errors[0]}{more}", fix)


def check_images(facts: ClusterFacts) -> Finding:
    """Every image can be pulled."""
    if facts.pulls is None:
        return skipped("no image was pulled", "give --pull: a pod is made for it and removed again")
    bad = [pull for pull in facts.pulls if pull.failure]
    if bad:
        return failure(f"{bad[0].image}: {bad[0].failure}", f"kubectl -n {facts.namespace} {_REGISTRY_LOGIN} and name it in "
                       "image.pullSecrets, or correct image.repository and image.tag")
    return ok(f"{len(facts.pulls)} images were pulled")


def _needs(facts: ClusterFacts) -> Needs:
    return facts.needs or Needs()


def _unasked(facts: ClusterFacts, question: str) -> Finding | None:
    """A question without an answer is no good news; without a server nothing was asked."""
    if not facts.server_version:
        return skipped("no cluster answers", "see server")
    reason = facts.unanswered.get(question)
    return warning(f"it can't be looked at: {reason}", f"kubectl auth can-i --list -n {facts.namespace}") if reason else None


CHECKS: dict[str, Callable[[ClusterFacts], Finding]] = {
    "kubectl": check_kubectl, "server": check_server, "values": check_values, "namespace": check_namespace, "storage class": check_storage,
    "GPU nodes": check_gpu_nodes, "GPU operator": check_gpu_operator, "custom kinds": check_kinds, "quota": check_quota,
    "secrets and claims": check_objects, "dry run": check_dry_run, "images": check_images,
}
"""In the order of the report."""


def examine(facts: ClusterFacts) -> dict[str, Finding]:
    """Every check's finding by name."""
    return {name: check(facts) for name, check in CHECKS.items()}
