# SPDX-License-Identifier: Apache-2.0
"""The checks of `tandem check-cluster`: what each finds in facts, and the command that it gives."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from charts import MODES, render
from tandem_cli.check_cluster.checks import CHECKS, examine
from tandem_cli.check_cluster.facts import ClusterFacts, Node, OperatorPod, Pull, Quota, StorageClass
from tandem_cli.check_cluster.needs import Claim, CustomKind, Needs, needs_of
from tandem_cli.check_cluster.quantities import parse_quantity, show_quantity
from tandem_cli.check_cluster.rendering import without_hooks
from tandem_cli.doctor.checks import Verdict

LWS = CustomKind("leaderworkerset.x-k8s.io", "v1", "LeaderWorkerSet")
NEEDS = Needs(pods=4, requests={"cpu": 10.0, "memory": 2.0**36, "nvidia.com/gpu": 16.0}, largest_gpus={"nvidia.com/gpu": 8},
              claims=(Claim("models", 2.0**37),), secrets=("hub",), custom_kinds=frozenset({LWS}))
GOOD = ClusterFacts(
    namespace="llm", client_version="v1.33.1", server_version="v1.33.4", needs=NEEDS,
    storage_classes=(StorageClass("fast", is_default=True), StorageClass("slow", is_default=False)),
    nodes=(Node("a", True, True, {"nvidia.com/gpu": 8.0}), Node("b", True, True, {"nvidia.com/gpu": 8.0}), Node("c", True, False, {})),
    operator_pods=(OperatorPod("gpu-operator-1", "Running"),), served_kinds={LWS: True},
    quotas=(Quota("team", {"pods": 10.0, "requests.cpu": 20.0}, {"pods": 6.0, "requests.cpu": 5.0}),),
    missing_objects=(), dry_run_errors=(), pulls=(Pull("tandem:1"),),
)
NO_GPUS = replace(NEEDS, requests={"cpu": 1.0}, largest_gpus={})


def test_a_good_cluster_has_nothing_to_mend() -> None:
    """Every check is ok."""
    assert {name: one.verdict for name, one in examine(GOOD).items()} == dict.fromkeys(CHECKS, Verdict.OK)


FAILURES: tuple[tuple[str, Mapping[str, object], str, str], ...] = (
    ("kubectl", {"client_error": "there is no kubectl on the PATH", "client_version": ""}, "no kubectl", "dl.k8s.io/release"),
    ("server", {"server_error": "connection refused", "server_version": ""}, "no cluster answers: connection refused", "kubectl config"),
    ("server", {"server_version": "v1.28.15-eks"}, "is older than 1.29", "upgrade the cluster"),
    ("values", {"values_error": "mode disagg needs a router"}, "mode disagg needs a router", "correct the values"),
    ("values", {"values_error": "there is no helm on the PATH"}, "there is no helm", "get-helm-3"),
    ("namespace", {"namespace_error": 'namespaces "llm" not found'}, "not found", "kubectl create namespace llm"),
    ("storage class", {"storage_classes": (StorageClass("slow", is_default=False),)}, "claim models names none",
     "kubectl patch storageclass slow -p '{\"metadata\": {\"annotations\": {\"storageclass.kubernetes.io/is-default-class\": \"true\"}}}'"),
    ("storage class", {"storage_classes": ()}, "no StorageClass is the default", "install a storage provisioner"),
    ("storage class", {"needs": replace(NEEDS, claims=(Claim("models", 1.0, "gold"),))}, "wants the StorageClass gold", "fast, slow"),
    ("GPU nodes", {"nodes": (Node("c", True, False, {}),)}, "no schedulable node offers nvidia.com/gpu", "helm install gpu-operator"),
    ("GPU nodes", {"nodes": (Node("a", True, True, {}),)}, "though 1 have the label of GPU nodes", "device plugin"),
    ("GPU nodes", {"nodes": (Node("a", False, True, {"nvidia.com/gpu": 8.0}),)}, "though 1 have the label", "device plugin"),
    ("GPU nodes", {"nodes": tuple(Node(str(i), True, True, {"nvidia.com/gpu": 4.0}) for i in range(8))},
     "one pod asks for 8 nvidia.com/gpu, and no node has more than 4", "worker.nodes"),
    ("GPU nodes", {"nodes": (Node("a", True, True, {"nvidia.com/gpu": 8.0}),)}, "16 nvidia.com/gpu are asked for, and the nodes have 8",
     "add nodes"),
    ("GPU operator", {"operator_pods": (OperatorPod("operator-1", "Pending"),)}, "operator-1 is Pending", "kubectl describe pods"),
    ("custom kinds", {"served_kinds": {LWS: False}}, "does not know LeaderWorkerSet (leaderworkerset.x-k8s.io/v1)", "kubernetes-sigs/lws"),
    ("quota", {"quotas": (Quota("team", {"pods": 10.0}, {"pods": 7.0}),)}, "quota team has 3 of pods left, and these values ask for 4",
     "kubectl -n llm edit resourcequota team"),
    ("quota", {"quotas": (Quota("team", {"requests.nvidia.com/gpu": 8.0}, {}),)}, "8 of requests.nvidia.com/gpu", "edit resourcequota"),
    ("quota", {"quotas": (Quota("team", {"requests.storage": 2.0**30}, {}),)}, "1.0 GiB of requests.storage left", "edit resourcequota"),
    ("secrets and claims", {"missing_objects": ("secret/hub",)}, "secret/hub can't be read", "kubectl -n llm create secret generic hub"),
    ("secrets and claims", {"missing_objects": ("secret/hub",), "needs": replace(NEEDS, pull_secrets=("hub",))}, "secret/hub",
     "create secret docker-registry hub"),
    ("secrets and claims", {"missing_objects": ("persistentvolumeclaim/models",)}, "persistentvolumeclaim/models", "the claim models"),
    ("dry run", {"dry_run_errors": ('deployments.apps is forbidden: User "a" cannot create',)}, "forbidden",
     "kubectl auth can-i --list -n llm"),
    ("dry run", {"dry_run_errors": ("unknown field", "another")}, "unknown field (and 1 more)", "--dry-run=server"),
    ("images", {"pulls": (Pull("a:1"), Pull("b:1", "ImagePullBackOff: unauthorized"))}, "b:1: ImagePullBackOff: unauthorized",
     "create secret docker-registry"),
)


@pytest.mark.parametrize(("check", "changes", "says", "fix"), FAILURES, ids=[f"{case[0]}: {case[2][:30]}" for case in FAILURES])
def test_failures_say_what_and_how_to_mend_it(check: str, changes: Mapping[str, object], says: str, fix: str) -> None:
    """A sentence, and the command."""
    found = CHECKS[check](replace(GOOD, **changes))  # type: ignore[arg-type]
    assert found.verdict is Verdict.FAILURE
    assert says in found.says
    assert fix in found.fix


@pytest.mark.parametrize(("check", "changes", "verdict"), [
    ("storage class", {"storage_classes": (StorageClass("slow", is_default=False),), "needs": replace(NEEDS, claims=())}, Verdict.WARNING),
    ("storage class", {"storage_classes": (StorageClass("a", is_default=True), StorageClass("b", is_default=True))}, Verdict.WARNING),
    ("storage class", {"storage_classes": None, "unanswered": {"storage class": "forbidden"}}, Verdict.WARNING),
    ("GPU nodes", {"needs": NO_GPUS, "nodes": ()}, Verdict.OK),
    ("GPU operator", {"operator_pods": ()}, Verdict.WARNING),
    ("GPU operator", {"operator_pods": (), "needs": NO_GPUS}, Verdict.OK),
    ("quota", {"quotas": ()}, Verdict.OK),
    ("quota", {"quotas": None, "server_version": ""}, Verdict.SKIPPED),
    ("images", {"pulls": None}, Verdict.SKIPPED),
    ("dry run", {"dry_run_errors": None}, Verdict.SKIPPED),
    ("secrets and claims", {"missing_objects": None}, Verdict.SKIPPED),
    ("custom kinds", {"served_kinds": None}, Verdict.SKIPPED),
])
def test_what_does_not_hinder_the_install_is_no_failure(check: str, changes: Mapping[str, object], verdict: Verdict) -> None:
    """What could not be asked is never called good, either."""
    assert CHECKS[check](replace(GOOD, **changes)).verdict is verdict  # type: ignore[arg-type]


def test_without_a_server_the_rest_is_skipped() -> None:
    """One failure, not ten."""
    facts = ClusterFacts(namespace="llm", client_version="v1.33", server_error="refused", needs=NEEDS)
    assert {name for name, one in examine(facts).items() if one.verdict is Verdict.FAILURE} == {"server"}


def test_needs_are_counted_over_replicas_and_groups() -> None:
    """Two groups of two pods with 8 GPUs each, beside router, etcd and one decode worker."""
    documents = without_hooks(render("disagg", "roles.prefill.nodes=2", "roles.prefill.tensorParallelSize=16", "roles.prefill.replicas=2"))
    needs = needs_of(documents)
    assert (needs.gpus, needs.largest_gpus) == ({"nvidia.com/gpu": 33}, {"nvidia.com/gpu": 8})
    assert needs.pods == 4 + 1 + 1 + 1
    assert needs.custom_kinds == {LWS}
    assert needs.requests["cpu"] == pytest.approx(5 * 4 + 2 + 0.1)


def test_needs_name_what_must_be_there_before() -> None:
    """Secrets, claims that nobody here makes, images; and storage that is asked for."""
    documents = without_hooks(render("disagg", 'model.tokenSecret="hub"', 'image.pullSecrets=["registry"]',
                                     "discovery.etcd.persistence.enabled=true", 'model.cache={"kind":"claim","existingClaim":"models"}'))
    needs = needs_of(documents)
    assert set(needs.secrets) == {"hub", "registry"}
    assert (needs.volume_claims, needs.pull_secrets) == (("models",), ("registry",))
    assert [claim.size_bytes for claim in needs.claims] == [2.0**30]
    assert any("etcd" in image for image in needs.images)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_needs(mode: str) -> None:
    """None of the chart's own objects is taken for a custom kind that it isn't."""
    needs = needs_of(without_hooks(render(mode)))
    groups = {kind.group for kind in needs.custom_kinds}
    assert groups == ({"monitoring.coreos.com"} if mode == "disagg_planner" else set())
    assert needs.pods >= 1


@pytest.mark.parametrize(("text", "value"), [("500m", 0.5), ("2", 2.0), (3, 3.0), ("16Gi", 2.0**34), ("1e3", 1000.0), ("1.5G", 1.5e9),
                                             ("128k", 128e3)])
def test_quantities(text: object, value: float) -> None:
    """As Kubernetes writes them."""
    assert parse_quantity(text) == pytest.approx(value)


def test_what_is_no_quantity() -> None:
    """Is refused."""
    with pytest.raises(ValueError, match="is no quantity"):
        parse_quantity("8 GB")
    assert show_quantity("requests.memory", 2.0**31) == "2.0 GiB"
    assert show_quantity("pods", 3.0) == "3"
