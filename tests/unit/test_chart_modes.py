# SPDX-License-Identifier: Apache-2.0
"""The chart as a whole: its modes and many other values render, and Kubernetes' schemas take every document."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from charts import CHART, MODES, NAME, ROOT, VERSIONS, check, helm, mode_file, names, pods, render, template_arguments
from tandem_protocol.version import VERSION

EVERYTHING = ("monitoring.podMonitor.enabled=true", "monitoring.dashboards.enabled=true", 'model.cache.kind="claim"',
              'model.tokenSecret="hub"', 'worker.rdmaResource="rdma/hca"', 'image.pullSecrets=["registry"]',
              'gateway.kind="inferencePool"', 'gateway.name="front"')
SPAN = ("worker.nodes=2", "worker.tensorParallelSize=16")
SPREAD = ("worker.nodes=2", "worker.dataParallelSize=16", 'worker.multiNodeStrategy="data"')
TIERS = ('worker.sharedMemory="32Gi"', "worker.kvTiers.hostGB=20")
ENCODE = ("encode.enabled=true", 'encode.embeddings.storageClass="fast"', "encode.embeddings.maxGB=0.5")
AGG_ROUTER = ("router.enabled=true", 'discovery.kind="etcd"')
IN_ZONE_A = json.dumps({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
    {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}]}}})
COMBINATIONS: tuple[tuple[str, Sequence[str]], ...] = (
    ("agg", ("worker.replicas=3",)),
    ("agg", ("worker.replicas=0",)),
    ("agg", ('platform="cpu"', 'worker.resources.requests={"cpu":"2"}')),
    ("agg", ("worker.tensorParallelSize=4", "worker.pipelineParallelSize=2")),
    ("agg", ("worker.dataParallelSize=4",)),
    ("agg", SPAN),
    ("agg", SPREAD),
    ("agg", (*AGG_ROUTER, *SPAN)),
    ("agg", (*AGG_ROUTER, "router.replicas=3", "router.instances=4")),
    ("agg", (*AGG_ROUTER, "router.kvEvents=false", 'router.mode="least-loaded"')),
    ("agg", (*AGG_ROUTER, *TIERS, 'worker.connector="kvbm"')),
    ("agg", (*AGG_ROUTER, 'worker.connector="kvbm"', "worker.kvTiers.diskGB=500", "worker.kvTiers.consolidator=false")),
    ("agg", ("router.enabled=true", 'discovery.kind="folder"', 'discovery.folderClaim="meet"')),
    ("agg", ("router.enabled=true", 'discovery.kind="etcd"', 'discovery.etcd.endpoint="etcd.infra:2379"', 'discovery.prefix="a/b"')),
    ("agg", (*AGG_ROUTER, "discovery.etcd.persistence.enabled=true", 'discovery.etcd.persistence.storageClass="fast"')),
    ("agg", ("router.enabled=true", 'discovery.kind="kubernetes"', "discovery.kubernetes.leaseSeconds=30", *SPREAD)),
    ("disagg_planner", ('discovery.kind="kubernetes"', 'serviceAccount.annotations={"a/b":"c"}', "roles.decode.nodes=2",
                        "roles.decode.tensorParallelSize=16")),
    ("agg", ('worker.autoscaling.kind="hpa"', "worker.autoscaling.maxReplicas=8")),
    ("agg", ('worker.autoscaling.kind="keda"', 'worker.autoscaling.prometheusUrl="http://prometheus:9090"', *SPREAD)),
    ("agg", ('model.cache.kind="hostPath"', 'model.cache.hostPath="/srv/models"', "model.offline=true")),
    ("agg", ('model.cache.kind="claim"', 'model.cache.existingClaim="models"', 'model.tokenSecret="hub"')),
    ("agg", ('gateway.kind="route"', 'gateway.name="front"', 'gateway.namespace="edge"', 'gateway.hostnames=["llm.example.org"]')),
    ("agg", (*AGG_ROUTER, 'gateway.kind="standalone"')),
    ("agg", ('service.type="LoadBalancer"', "service.httpPort=80", 'service.annotations={"a/b":"c"}', 'fullnameOverride="llm"')),
    ("agg", ("networkPolicy.enabled=false", "worker.podDisruptionBudget.enabled=false", "worker.topologySpread.enabled=false")),
    ("agg", ('networkPolicy.clients=[{"namespaceSelector":{"matchLabels":{"team":"a"}}},{"ipBlock":{"cidr":"10.0.0.0/8"}}]',)),
    ("agg", ('worker.nodeSelector={"gpu":"h200"}', 'worker.tolerations=[{"key":"gpu","operator":"Exists","effect":"NoSchedule"}]',
             f"worker.affinity={IN_ZONE_A}", 'worker.priorityClassName="high"', 'worker.runtimeClassName="nvidia"')),
    ("disagg", (*TIERS, 'roles.prefill.connector="kvbm nixl"', 'roles.decode.kvTiers.hostGB=0', 'roles.prefill.kvTiers.hostGB=20',
                "worker.kvTiers.hostGB=0")),
    ("disagg", ("roles.prefill.tensorParallelSize=2", "roles.decode.tensorParallelSize=4", "roles.decode.replicas=3")),
    ("disagg", SPAN),
    ("disagg", ("roles.decode.nodes=4", "roles.decode.dataParallelSize=32", 'roles.decode.multiNodeStrategy="data"')),
    ("disagg", ('platform="cpu"',)),
    ("agg", (*AGG_ROUTER, *TIERS, 'worker.connector="kvbm"', *ENCODE)),
    ("disagg", (*ENCODE, "roles.encode.replicas=3", 'roles.encode.autoscaling.kind="hpa"', 'encode.embeddings.existingClaim="images"')),
    ("disagg", ('roles.decode.autoscaling.kind="hpa"',)),
    ("disagg_router", EVERYTHING),
    ("disagg_router", ("roles.prefill.podDisruptionBudget.enabled=false", "router.podDisruptionBudget.enabled=false")),
    ("disagg_planner", (*ENCODE, "planner.maxEncode=3")),
    ("disagg_planner", (*ENCODE, 'roles.encode.autoscaling.kind="hpa"')),
    ("disagg_planner", ('planner.profileConfigMap="profile"', 'planner.args=["--ttft=300"]')),
    ("disagg_planner", ("roles.decode.nodes=2", "roles.decode.tensorParallelSize=16", "monitoring.podMonitor.enabled=false")),
)


def test_the_version_is_the_projects() -> None:
    """Chart and application have one version, that of the package."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (VERSION, VERSION)


def test_the_chart_is_clean_for_its_linter() -> None:
    """In the mode with most objects; warnings count."""
    done = helm("lint", "--strict", str(CHART), "-f", str(mode_file("disagg_planner")))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_valid_for_the_newest_kubernetes(mode: str) -> None:
    """Strictly: unknown fields count."""
    assert check(render(mode), VERSIONS[-1]) == []


@pytest.mark.parametrize("version", VERSIONS[:-1])
def test_most_of_the_chart_is_valid_for_older_kubernetes(version: str) -> None:
    """The mode with most objects, and what else there is."""
    assert check(render("disagg_planner", *EVERYTHING), version) == []


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", COMBINATIONS, ids=lambda case: f"{case[0]}-{COMBINATIONS.index(case)}")
def test_every_combination_is_valid(case: tuple[str, Sequence[str]], version: str) -> None:
    """The matrix of values against three versions of Kubernetes."""
    assert check(render(case[0], *case[1]), version) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_clean_for_the_linter(mode: str) -> None:
    """Warnings count."""
    done = helm("lint", "--strict", str(CHART), "-f", str(mode_file(mode)))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_modes_have_their_workloads() -> None:
    """Who runs in which mode."""
    workloads = {mode: names(render(mode), "Deployment") | names(render(mode), "StatefulSet") for mode in MODES}
    disagg = {f"{NAME}-prefill", f"{NAME}-decode", f"{NAME}-router", f"{NAME}-etcd"}
    planned = disagg | {f"{NAME}-planner"}
    assert workloads == {"agg": {f"{NAME}-aggregated"}, "disagg": disagg, "disagg_router": disagg, "disagg_planner": planned,
                         "disagg_kubernetes": disagg - {f"{NAME}-etcd"}}


def test_nothing_runs_as_root_or_with_a_token() -> None:
    """No pod but the planner's and the picker's may talk to the API server, and none gains rights."""
    documents = render("disagg_planner", *EVERYTHING)
    tokens = set()
    for owner, template in pods(documents):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, owner
        if spec.get("automountServiceAccountToken") is not False:
            tokens.add(owner)
        for one in [*spec["containers"], *spec.get("initContainers", [])]:
            assert one["securityContext"]["allowPrivilegeEscalation"] is False, owner
            assert one["securityContext"]["capabilities"]["drop"] == ["ALL"], owner
    assert tokens == {f"{NAME}-planner", f"{NAME}-gateway"}


def test_every_container_asks_for_memory_and_cores() -> None:
    """A quota in the namespace would refuse it otherwise, and the scheduler would guess."""
    for owner, template in pods(render("disagg_planner", *EVERYTHING)):
        for one in template["spec"]["containers"]:
            assert {"cpu", "memory"} <= one["resources"]["requests"].keys(), (owner, one["name"])


def test_selectors_find_their_pods_and_only_theirs() -> None:
    """Every workload's and service's selector matches pods of exactly one component."""
    documents = render("disagg_planner", *EVERYTHING)
    components = [(owner, template["metadata"]["labels"]) for owner, template in pods(documents)]
    selectors = {(one["kind"], one["metadata"]["name"]): one["spec"]["selector"].get("matchLabels", one["spec"]["selector"])
                 for one in documents if one["kind"] in {"Deployment", "StatefulSet", "Service", "PodDisruptionBudget", "InferencePool"}}
    for where, selector in selectors.items():
        matched = [owner for owner, labels in components if selector.items() <= labels.items()]
        assert len(matched) == 1, f"{where} selects {matched}"


def test_roles_change_what_workers_have_in_common_even_to_nothing() -> None:
    """Zero, false and the empty string of a role win over the common value."""
    documents = render("disagg_router", "roles.prefill.replicas=0", "roles.prefill.canary=false",
                       "roles.decode.podDisruptionBudget.enabled=false")
    replicas = {one["metadata"]["name"]: one["spec"]["replicas"] for one in documents if one["kind"] == "Deployment"}
    assert (replicas[f"{NAME}-prefill"], replicas[f"{NAME}-decode"]) == (0, 2)
    assert f"{NAME}-decode" not in names(documents, "PodDisruptionBudget")
    canaries = {entry["value"] for owner, template in pods(documents) if owner == f"{NAME}-prefill"
                for entry in template["spec"]["containers"][0]["env"] if entry["name"] == "DYN_HEALTH_CHECK_ENABLED"}
    assert canaries == {"false"}


def test_the_boards_are_those_of_the_project() -> None:
    """One ConfigMap each, with the file's very content."""
    documents = render("agg", "monitoring.dashboards.enabled=true")
    boards = {name: text for one in documents if one["kind"] == "ConfigMap" for name, text in one["data"].items()}
    assert boards.keys() == {path.name for path in (ROOT / "dashboards").glob("*.json")}
    for name, text in boards.items():
        assert json.loads(text) == json.loads((ROOT / "dashboards" / name).read_text())


def test_the_chart_packs_with_its_boards(tmp_path: Path) -> None:
    """A package of the chart renders as the folder does."""
    done = helm("package", str(CHART), "--destination", str(tmp_path))
    assert done.returncode == 0, done.stderr
    arguments = template_arguments("agg", ["monitoring.dashboards.enabled=true"])
    arguments[2] = f"{tmp_path}/tandem-{VERSION}.tgz"
    packed = helm(*arguments)
    assert packed.returncode == 0, packed.stderr
    assert len(list(yaml.safe_load_all(packed.stdout))) >= len(render("agg", "monitoring.dashboards.enabled=true"))


def test_two_releases_in_one_namespace_share_no_names() -> None:
    """Every object carries the release in its name."""
    named = {one["metadata"]["name"] for one in render("disagg_planner", *EVERYTHING)}
    assert {name for name in named if not name.startswith(NAME)} == set()
