# SPDX-License-Identifier: Apache-2.0
"""The chart's discovery in the cluster's API: who may do what with Leases, and that it is enough and not more for what our code does."""

from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from charts import NAME, NAMESPACE, Document, container, environment, find, names, pod, pods, render
from discovery_contract import ids, until, worker
from kubernetes_double import NAMESPACE as CLUSTER_NAMESPACE
from kubernetes_server import KubernetesServer
from tandem_protocol.discovery import open_collection, open_discovery
from tandem_protocol.discovery.kubernetes import parse_address
from tandem_protocol.routers import RouterRecord

PLANNED = ('discovery.kind="kubernetes"',)
TENSOR = ("roles.decode.nodes=2", "roles.decode.tensorParallelSize=16")


def rights(documents: list[Document], account: str) -> list[dict[str, list[str]]]:
    """The rules of all Roles that are bound to an account."""
    bound = [one["roleRef"]["name"] for one in documents if one["kind"] == "RoleBinding"
             and {"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE} in one["subjects"]]
    return [rule for name in bound for rule in find(documents, "Role", name)["rules"]]


def lease_verbs(documents: list[Document], account: str) -> set[str]:
    """What it may do with Leases."""
    return {verb for rule in rights(documents, account) if "leases" in rule["resources"] for verb in rule["verbs"]}


def test_each_component_has_the_least_rights() -> None:
    """Workers read nothing; the planner only lists; a router alone writes no record of its own. Nothing is cluster-wide."""
    documents = render("disagg_planner", *PLANNED)
    accounts = {owner.removeprefix(f"{NAME}-"): template["spec"]["serviceAccountName"] for owner, template in pods(documents)}
    verbs = {component: lease_verbs(documents, accounts[component]) for component in ("prefill", "decode", "router", "planner")}
    writes, reads = {"create", "patch", "delete"}, {"list", "watch"}
    assert verbs == {"prefill": writes, "decode": writes, "router": writes | reads, "planner": {"list"}}
    alone = render("disagg", *PLANNED)
    assert lease_verbs(alone, pod(alone, f"{NAME}-router")["spec"]["serviceAccountName"]) == reads | {"delete"}
    assert names(documents, "ClusterRole") == names(documents, "ClusterRoleBinding") == set()


def test_with_etcd_nobody_may_touch_leases() -> None:
    """And no pod of a worker or router has a token."""
    documents = render("disagg_planner")
    assert {one["metadata"]["name"] for one in documents if one["kind"] == "Role"} == {f"{NAME}-planner"}
    assert lease_verbs(documents, f"{NAME}-planner") == set()
    assert pod(documents, f"{NAME}-prefill")["spec"]["automountServiceAccountToken"] is False


def test_no_etcd_is_left() -> None:
    """No object, no variable and no policy."""
    assert "etcd" not in str(render("disagg_kubernetes"))


def test_a_pod_knows_who_it_is() -> None:
    """So that it owns its Leases; followers of an engine are in no discovery and get no token."""
    documents = render("disagg_kubernetes", *TENSOR)
    for owner in ("router", "prefill", "decode/leaderTemplate"):
        template = pod(documents, f"{NAME}-{owner}")
        fields = {entry["name"]: entry["valueFrom"]["fieldRef"]["fieldPath"] for entry in template["spec"]["containers"][0]["env"]
                  if "fieldRef" in entry.get("valueFrom", {})}
        assert fields == {"POD_IP": "status.podIP", "POD_NAME": "metadata.name", "POD_UID": "metadata.uid",
                          "POD_NAMESPACE": "metadata.namespace"}, owner
        assert template["spec"]["automountServiceAccountToken"] is True, owner
    assert pod(documents, f"{NAME}-decode/workerTemplate")["spec"]["automountServiceAccountToken"] is False


def test_two_releases_are_two_fleets() -> None:
    """Also in one namespace."""
    one = parse_address(_url(render("disagg_kubernetes")).removeprefix("kubernetes:"))
    other = parse_address(_url(render("disagg_kubernetes", 'fullnameOverride="second"')).removeprefix("kubernetes:"))
    assert (one.namespace, one.fleet, one.lease_s, other.fleet) == (NAMESPACE, NAME, 10.0, "second")
    assert one.name("workers", "x") != other.name("workers", "x")


def _url(documents: list[Document]) -> str:
    router = next(template for owner, template in pods(documents) if owner.endswith("-router"))
    return environment(container(router, "router"))["TANDEM_DISCOVERY"]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    """An API server in the chart's namespace that allows nothing yet."""
    server = KubernetesServer(tmp_path / "kubernetes").begin()
    assert CLUSTER_NAMESPACE == NAMESPACE
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
    for name in ("KUBERNETES_SERVICE_HOST", "POD_NAME", "POD_UID", "POD_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.end()


async def test_our_own_code_does_with_these_rights_what_it_has_to(server: KubernetesServer) -> None:
    """Worker, routers and planner in turn, each with its own account's rules."""
    documents = render("disagg_planner", *PLANNED)
    url = _url(documents)

    def become(account: str) -> None:
        server.double.rules = rights(documents, account)

    workers, routers = open_discovery(url), open_collection(url, RouterRecord)
    try:
        become(NAME)
        registration = await workers.register(worker())
        await registration.update(worker(total_blocks=7))
        become(f"{NAME}-router")
        async with aclosing(workers.watch()) as watch:
            assert ids(await until(watch, lambda snapshot: snapshot.current)) == ["vllm-1"]
        own = await routers.register(RouterRecord(id="r", model="m", events_endpoint="tcp://h:1", state_endpoint="tcp://h:2"))
        assert len(await routers.list()) == 1
        await own.close()
        become(f"{NAME}-planner")
        assert await workers.list() == (worker(total_blocks=7),)
        become(NAME)
        await registration.close()
        assert server.double.leases.objects == {}
    finally:
        server.double.rules = rights(documents, f"{NAME}-router")
        for store in (workers, routers):
            await store.close()
