# SPDX-License-Identifier: Apache-2.0
"""The chart's network: who may reach which port, what Prometheus scrapes, and the ways in from outside."""

from typing import Any

import pytest
import yaml

from charts import CHART, NAME, Document, container, find, names, pod, pods, render

AGG_ROUTER = ("router.enabled=true", 'discovery.kind="etcd"')
SELECTOR = {"app.kubernetes.io/name": "tandem", "app.kubernetes.io/instance": "demo"}
PROMETHEUS = {"namespace": {"kubernetes.io/metadata.name": "monitoring"}, "labels": {}}
STRANGER: dict[str, dict[str, str]] = {"namespace": {"kubernetes.io/metadata.name": "other"}, "labels": {}}
ADMIN_PORTS = (8081, 8481)


def own(component: str) -> dict[str, dict[str, str]]:
    """A pod of this release as a peer."""
    return {"namespace": {}, "labels": {**SELECTOR, "app.kubernetes.io/component": component}}


def _matches(selector: Document, labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", []))


def _is_peer(peer: Document, who: dict[str, dict[str, str]]) -> bool:
    if "namespaceSelector" in peer:
        return _matches(peer["namespaceSelector"], who["namespace"]) and _matches(peer.get("podSelector", {}), who["labels"])
    return who["namespace"] == {} and _matches(peer["podSelector"], who["labels"])


def may_reach(documents: list[Document], component: str, port: int, who: dict[str, dict[str, str]]) -> bool:
    """As Kubernetes decides it: a pod that no policy selects is open, else some rule must let `who` in."""
    labels = {**SELECTOR, "app.kubernetes.io/component": component}
    policies = [one["spec"] for one in documents if one["kind"] == "NetworkPolicy" and _matches(one["spec"]["podSelector"], labels)]
    rules = [rule for policy in policies for rule in policy["ingress"]]
    return not policies or any(_allows(rule, port, who) for rule in rules)


def _allows(rule: dict[str, Any], port: int, who: dict[str, dict[str, str]]) -> bool:
    ports = rule.get("ports")
    in_ports = ports is None or any(one["port"] <= port <= one.get("endPort", one["port"]) for one in ports)
    return in_ports and ("from" not in rule or any(_is_peer(peer, who) for peer in rule["from"]))


@pytest.mark.parametrize("component", ["prefill", "decode"])
def test_admin_ports_are_closed_to_the_outside(component: str) -> None:
    """Whoever reaches them can drain a worker: routers, the planner and Prometheus may, nobody else."""
    documents = render("disagg_planner")
    for port in ADMIN_PORTS:
        assert not may_reach(documents, component, port, STRANGER)
        assert not may_reach(documents, component, port, own("test"))
        assert may_reach(documents, component, port, PROMETHEUS)
    assert may_reach(documents, component, 8081, own("router"))
    assert may_reach(documents, component, 8081, own("planner"))
    assert not may_reach(documents, "router", 8079, STRANGER)
    assert not may_reach(documents, "planner", 8078, STRANGER)
    assert not may_reach(documents, "etcd", 2379, STRANGER)


def test_what_routers_need_of_workers_is_open_to_them() -> None:
    """Requests, events and replays of every rank and of consolidators."""
    documents = render("disagg_router", "roles.prefill.dataParallelSize=4", "roles.prefill.tensorParallelSize=1")
    for port in (8001, 20080, 20083, 21080, 21083, 57001, 58001):
        assert may_reach(documents, "prefill", port, own("router")), port
        assert not may_reach(documents, "prefill", port, STRANGER), port
    assert not may_reach(documents, "prefill", 20084, own("router"))


def test_engines_reach_each_other_on_any_port() -> None:
    """NIXL and NCCL choose theirs."""
    documents = render("disagg")
    assert may_reach(documents, "prefill", 45678, own("decode"))
    assert may_reach(documents, "prefill", 5600, own("decode"))
    assert not may_reach(documents, "prefill", 45678, own("router"))


def test_clients_reach_the_front_only() -> None:
    """With routers these, else the workers; a list of clients closes it to others, but not to our own test."""
    routed, direct = render("disagg"), render("agg")
    assert may_reach(routed, "router", 8000, STRANGER)
    assert not may_reach(routed, "decode", 8001, STRANGER)
    assert may_reach(direct, "aggregated", 8001, STRANGER)
    closed = render("agg", 'networkPolicy.clients=[{"namespaceSelector":{"matchLabels":{"team":"a"}}}]')
    assert not may_reach(closed, "aggregated", 8000, STRANGER)
    assert may_reach(closed, "aggregated", 8000, {"namespace": {"team": "a"}, "labels": {}})
    assert may_reach(closed, "aggregated", 8000, own("test"))


def test_routers_share_their_books_among_themselves() -> None:
    """Two ports per instance, and only for routers."""
    documents = render("disagg_router", "router.instances=2")
    assert [may_reach(documents, "router", port, own("router")) for port in (7079, 7082, 7083)] == [True, True, False]
    assert not may_reach(documents, "router", 7079, STRANGER)


def test_every_scraped_port_is_one_of_a_container() -> None:
    """And every admin port is scraped."""
    documents = render("disagg_planner", "router.instances=2", 'worker.connector="kvbm nixl"', "worker.kvTiers.hostGB=1",
                       'monitoring.podMonitor.labels={"release":"prometheus"}')
    monitor = find(documents, "PodMonitor", NAME)
    scraped = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    ports = {port["name"] for _, template in pods(documents) for one in template["spec"]["containers"] for port in one.get("ports", [])}
    assert scraped <= ports
    assert {name for name in ports if "admin" in name} <= scraped
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_a_policy_can_be_left_out() -> None:
    """Where another mechanism is in force."""
    assert names(render("disagg_planner", "networkPolicy.enabled=false"), "NetworkPolicy") == set()


def test_routes_lead_to_the_service() -> None:
    """HTTP and gRPC, attached to the given Gateway."""
    documents = render("agg", 'gateway={"kind":"route","name":"front","namespace":"edge","hostnames":["llm.example.org"]}')
    for kind, port in (("HTTPRoute", 8000), ("GRPCRoute", 8001)):
        spec = find(documents, kind, NAME)["spec"]
        assert spec["parentRefs"] == [{"name": "front", "namespace": "edge"}]
        assert spec["hostnames"] == ["llm.example.org"]
        assert spec["rules"][0]["backendRefs"] == [{"name": NAME, "port": port}]


def test_an_inference_pool_holds_the_routers() -> None:
    """HTTP goes to the pool, gRPC to the service; the pool's picker is ours and reads no bodies."""
    documents = render("agg", *AGG_ROUTER, 'gateway={"kind":"inferencePool","name":"front"}')
    pool = find(documents, "InferencePool", NAME)["spec"]
    assert pool["selector"]["matchLabels"].items() <= pod(documents, f"{NAME}-router")["metadata"]["labels"].items()
    assert pool["endpointPickerRef"]["name"] in names(documents, "Service")
    assert find(documents, "HTTPRoute", NAME)["spec"]["rules"][0]["backendRefs"][0]["kind"] == "InferencePool"
    assert find(documents, "GRPCRoute", NAME)["spec"]["rules"][0]["backendRefs"] == [{"name": NAME, "port": 8001}]
    config = yaml.safe_load(find(documents, "ConfigMap", f"{NAME}-gateway")["data"]["picker.yaml"])
    plugins = {plugin["name"]: plugin["type"] for plugin in config["plugins"]}
    assert plugins[config["parser"]["pluginRef"]] == "passthrough-parser"
    rules = find(documents, "Role", f"{NAME}-gateway")["rules"]
    assert {verb for rule in rules for verb in rule["verbs"]} == {"get", "list", "watch"}


def test_the_standalone_gateway_needs_no_custom_resource() -> None:
    """Picker and Envoy in one pod; Envoy asks the picker and goes where its header says. It may reach the routers."""
    documents = render("agg", *AGG_ROUTER, 'gateway.kind="standalone"', 'networkPolicy.clients=[{"podSelector":{"matchLabels":{"a":"b"}}}]')
    assert {one["kind"] for one in documents} & {"InferencePool", "HTTPRoute", "GRPCRoute"} == set()
    template = pod(documents, f"{NAME}-gateway")
    selector = next(argument for argument in container(template, "picker")["args"] if argument.startswith("--endpoint-selector="))
    wanted = dict(pair.split("=") for pair in selector.removeprefix("--endpoint-selector=").split(","))
    assert wanted.items() <= pod(documents, f"{NAME}-router")["metadata"]["labels"].items()
    envoy = yaml.safe_load((CHART / "files" / "envoy.yaml").read_text())
    clusters = {cluster["name"]: cluster for cluster in envoy["static_resources"]["clusters"]}
    assert clusters["picked"]["original_dst_lb_config"]["http_header_name"] == "x-gateway-destination-endpoint"
    listeners = {listener["address"]["socket_address"]["port_value"] for listener in envoy["static_resources"]["listeners"]}
    assert listeners == {port["containerPort"] for port in container(template, "envoy")["ports"]}
    assert may_reach(documents, "router", 8000, own("gateway"))
