# SPDX-License-Identifier: Apache-2.0
"""The chart's routers, planner, discovery and services: what they are told, who may do what, and how they leave."""

import argparse
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from kubernetes import client

from charts import CHART, NAME, NAMESPACE, RELEASE, ROOT, Document, container, environment, find, names, pod, render
from kubernetes_double import KubernetesDouble, Object
from tandem_cli.serve import options as serve_options
from tandem_planner.connectors import kubernetes_api
from tandem_planner.connectors.interface import FLEET_LABEL, ROLE_LABEL, Bounds
from tandem_planner.connectors.kubernetes import KubernetesConnector
from tandem_planner.connectors.kubernetes_api import KubernetesApi
from tandem_protocol.discovery import check_url
from tandem_protocol.kubernetes_access import api_client
from tandem_protocol.roles import Role
from tandem_router.config import load_settings

BOUNDS = Bounds(call_s=5, scale_s=20, check_s=0.01, drain_s=0)
AGG_ROUTER = ("router.enabled=true", 'discovery.kind="etcd"')


def router_of(documents: list[Document]) -> Document:
    """The router's container."""
    return container(pod(documents, f"{NAME}-router"), "router")


def test_the_entry_point_and_the_launcher_take_a_routers_arguments(tmp_path: Path) -> None:
    """Routers alone, as many processes as were asked for."""
    one = router_of(render("agg", *AGG_ROUTER, "router.instances=3"))
    (tmp_path / "tandem").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "tandem").chmod(0o755)
    variables = {**environment(one), "PATH": f"{tmp_path}:{os.environ['PATH']}", "TANDEM_HOME": str(tmp_path)}
    script = str(ROOT / "container" / "entrypoint.sh")
    done = subprocess.run([script, *one["args"]], env=variables, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    serve_options.add_arguments(parser)
    args, args.passthrough = parser.parse_known_args(command[1:])
    options = serve_options.parse_options(args)
    assert (command[0], options.counts.aggregated, options.counts.routers, options.engine_arguments) == ("serve", 0, 3, {})


def test_routers_follow_the_values() -> None:
    """Mode and events; several routers share their books, one has nobody to tell."""
    settings = load_settings({}, environment(router_of(render("disagg"))))
    assert (settings.router_mode, settings.kv_events, settings.router_replica_sync) == ("round-robin", False, False)
    settings = load_settings({}, environment(router_of(render("disagg_router"))))
    assert (settings.router_mode, settings.kv_events, settings.router_replica_sync) == ("kv", True, True)
    assert settings.router_snapshot_folder == "/snapshots"


def test_every_instance_of_a_router_has_its_admin_port() -> None:
    """From 8079 on; probes ask the first."""
    one = router_of(render("agg", *AGG_ROUTER, "router.instances=2"))
    ports = {port["name"]: port["containerPort"] for port in one["ports"]}
    assert (ports["admin"], ports["admin-1"]) == (8079, 8080)
    assert one["readinessProbe"]["httpGet"] == {"path": "/health", "port": "admin"}


def test_a_router_serves_on_until_proxies_have_left_it_out() -> None:
    """And a new one is up before an old one goes, since it needs no GPU."""
    documents = render("disagg_router", "router.leaveDelaySeconds=9")
    assert router_of(documents)["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "9"]
    assert pod(documents, f"{NAME}-router")["spec"]["terminationGracePeriodSeconds"] >= 9 + 30 + 15
    assert find(documents, "Deployment", f"{NAME}-router")["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_clients_reach_routers_or_else_workers() -> None:
    """Of engines over several pods only those that serve."""
    front = find(render("disagg"), "Service", NAME)["spec"]
    assert front["selector"]["app.kubernetes.io/component"] == "router"
    assert "tandem.dev/serves" not in front["selector"]
    direct = find(render("agg", "worker.nodes=2", "worker.tensorParallelSize=2"), "Service", NAME)["spec"]
    assert direct["selector"]["tandem.dev/serves"] == "true"
    assert [port["port"] for port in direct["ports"]] == [8000, 8001]


@pytest.mark.parametrize(("sets", "url"), [
    (('discovery.kind="etcd"',), f"etcd://{NAME}-etcd.{NAMESPACE}.svc:2379/{NAMESPACE}/{RELEASE}"),
    (('discovery.kind="etcd"', 'discovery.etcd.endpoint="etcd.infra:2379"', 'discovery.prefix="team/a"'), "etcd://etcd.infra:2379/team/a"),
    (('discovery.kind="kubernetes"', "discovery.kubernetes.leaseSeconds=30"), f"kubernetes://{NAMESPACE}/{NAME}?lease_s=30"),
    (('discovery.kind="folder"', 'discovery.folderClaim="meet"'), f"file:/discovery/{NAMESPACE}/{RELEASE}"),
])
def test_routers_and_workers_meet_in_one_place(sets: tuple[str, ...], url: str) -> None:
    """Which is one that discovery knows."""
    documents = render("agg", "router.enabled=true", *sets)
    worker = container(pod(documents, f"{NAME}-aggregated"), "worker")
    told = {environment(one)["TANDEM_DISCOVERY"] for one in (router_of(documents), worker)}
    assert told == {url}
    assert check_url(url) == url


def test_an_etcd_of_ones_own_is_taken_as_it_is() -> None:
    """The chart then runs none; without discovery it runs none either."""
    assert names(render("disagg", 'discovery.etcd.endpoint="etcd.infra:2379"'), "StatefulSet") == set()
    assert names(render("agg"), "StatefulSet") == set()


def test_pods_that_meet_in_a_folder_share_a_node() -> None:
    """The folder tells the living by times of files, as one host has them."""
    documents = render("agg", "router.enabled=true", 'discovery.kind="folder"', 'discovery.folderClaim="meet"')
    for owner in ("router", "aggregated"):
        template = pod(documents, f"{NAME}-{owner}")
        term = template["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0]
        assert term["topologyKey"] == "kubernetes.io/hostname"
        assert term["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_the_planner_may_list_workloads_and_scale_its_own() -> None:
    """Exactly the verbs that its connector uses, on exactly the pools of this release; nothing cluster-wide."""
    documents = render("disagg_planner", "roles.decode.nodes=2", "roles.decode.dataParallelSize=2", 'roles.decode.multiNodeStrategy="data"')
    rights = {(group, resource, verb, tuple(rule.get("resourceNames", ())))
              for rule in find(documents, "Role", f"{NAME}-planner")["rules"]
              for group in rule["apiGroups"] for resource in rule["resources"] for verb in rule["verbs"]}
    lists = {("apps", "deployments", "list", ()), ("apps", "statefulsets", "list", ()),
             ("leaderworkerset.x-k8s.io", "leaderworkersets", "list", ())}
    scales = {("apps", "deployments/scale", verb, (f"{NAME}-prefill",)) for verb in ("get", "update")}
    sets = {("leaderworkerset.x-k8s.io", "leaderworkersets/scale", verb, (f"{NAME}-decode",)) for verb in ("get", "update")}
    assert rights == lists | scales | sets
    assert names(documents, "ClusterRole") == set()


def test_the_planner_finds_one_workload_per_role_by_labels() -> None:
    """Those that its connector selects by."""
    documents = render("disagg_planner")
    fleet = environment(container(pod(documents, f"{NAME}-planner"), "planner"))["TANDEM_PLANNER_FLEET"]
    found = {one["metadata"]["labels"][ROLE_LABEL]: one["metadata"]["name"] for one in documents
             if one["kind"] == "Deployment" and one["metadata"]["labels"].get(FLEET_LABEL) == fleet}
    assert found == {Role.PREFILL: f"{NAME}-prefill", Role.DECODE: f"{NAME}-decode"}


async def test_the_planners_own_connector_scales_with_those_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels, workloads and rules as rendered, in an API server that enforces them: both pools grow, also the LeaderWorkerSet."""
    monkeypatch.setattr(kubernetes_api, "FIRST_WAIT_S", 0.01)
    documents = render("disagg_planner", "roles.decode.nodes=2", "roles.decode.dataParallelSize=2", 'roles.decode.multiNodeStrategy="data"')
    kinds = {"Deployment": "deployments", "LeaderWorkerSet": "leaderworkersets", "StatefulSet": "statefulsets"}
    found = [(kinds[one["kind"]], one["metadata"], one["spec"]["replicas"]) for one in documents if one["kind"] in kinds]
    objects = [Object(kind, metadata["name"], metadata["labels"], replicas, replicas) for kind, metadata, replicas in found]
    double = KubernetesDouble(find(documents, "Role", f"{NAME}-planner")["rules"], objects, has_lws=True)
    settings = client.Configuration(host=await double.start())
    fleet = environment(container(pod(documents, f"{NAME}-planner"), "planner"))["TANDEM_PLANNER_FLEET"]
    settings.proxy = None
    connector = KubernetesConnector(KubernetesApi(api_client(settings), NAMESPACE, BOUNDS.call_s), fleet, BOUNDS)
    try:
        assert {role: pool.wanted for role, pool in (await connector.pools()).items()} == {Role.PREFILL: 1, Role.DECODE: 1}
        await connector.scale(Role.PREFILL, 3)
        await connector.scale(Role.DECODE, 2)
    finally:
        await connector.close()
        await double.stop()
    replicas = {one.name: one.replicas for one in objects}
    assert (replicas[f"{NAME}-prefill"], replicas[f"{NAME}-decode"], replicas[f"{NAME}-router"]) == (3, 2, 2)


def test_there_is_one_planner_at_a_time() -> None:
    """The old one ends before the new one begins."""
    spec = find(render("disagg_planner"), "Deployment", f"{NAME}-planner")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


class _Paris(BaseHTTPRequestHandler):
    """Answers as Triton's generate endpoint."""

    text = "Paris."
    paths: list[str]

    def do_POST(self) -> None:
        """Any question."""
        type(self).paths.append(self.path)
        self.rfile.read(int(self.headers["Content-Length"]))
        body = f'{{"model_name": "router", "text_output": "{self.text}"}}'.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.mark.parametrize(("text", "code"), [("The capital of France is Paris.", 0), ("It is London.", 1)])
def test_the_test_pod_asks_for_paris(text: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own program, against a server that plays Triton: another answer fails the test."""
    one = container(find(render("disagg"), "Pod", f"{NAME}-test"), "ask")
    assert one["args"][:2] == ["python", "-c"]
    monkeypatch.setattr(_Paris, "text", text)
    monkeypatch.setattr(_Paris, "paths", [], raising=False)
    server = HTTPServer(("127.0.0.1", 0), _Paris)
    thread = threading.Thread(target=server.handle_request, daemon=True)
    thread.start()
    variables = environment(one)
    assert variables["URL"] == f"http://{NAME}:8000/v2/models/router/generate"
    variables["URL"] = variables["URL"].replace(f"{NAME}:8000", f"127.0.0.1:{server.server_port}")
    done = subprocess.run([sys.executable, "-c", one["args"][2]], env=variables, capture_output=True, text=True, timeout=20, check=False)
    thread.join(5)
    server.server_close()
    assert done.returncode == code, done.stderr
    assert _Paris.paths == ["/v2/models/router/generate"]
    assert (CHART / "files" / "ask.py").read_text().strip() == one["args"][2].strip()
