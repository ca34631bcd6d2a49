# SPDX-License-Identifier: Apache-2.0
"""The chart's workers: arguments that the launcher takes, variables that are settings, probes, drain, GPUs, engines over several nodes."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from chart_workers import launched, parsed, worker_of
from charts import NAME, NAMESPACE, RELEASE, container, environment, find, names, pod, pods, render
from tandem_cli.serve.engine_arguments import known_engine_arguments, parse_engine_arguments
from tandem_kvbm.config import KvbmSettings
from tandem_kvbm.consolidator.config import ConsolidatorSettings
from tandem_kvbm.consolidator.config import load_settings as load_consolidator
from tandem_planner.arguments import parse as parse_planner
from tandem_planner.config import PlannerConfig
from tandem_planner.service_config import ServiceSettings
from tandem_protocol.roles import Role
from tandem_protocol.settings import specs_of
from tandem_router.config import RouterSettings
from tandem_router.config import load_settings as load_router
from tandem_worker.config import WorkerSettings, load_settings
from tandem_worker.connectors import transfer_config

AGG_ROUTER = ("router.enabled=true", 'discovery.kind="etcd"')
TIERS = ('worker.connector="kvbm"', "worker.kvTiers.hostGB=20", 'worker.sharedMemory="32Gi"')
SPAN = ("worker.nodes=2", "worker.tensorParallelSize=16")
FOREIGN = {"POD_IP", "HF_HOME", "HF_HUB_OFFLINE", "VLLM_CACHE_ROOT", "TANDEM_PLATFORM", "URL", "PROMPT", "EXPECT", "TIMEOUT_S", "NAMESPACE",
           "POD_NAME", "HF_TOKEN"}
"""Variables that are not settings of ours."""
TRITON_EXIT_S, TRITON_KILL_S, LAUNCHER_DRAIN_S = 30, 15, 20
"""What `tandem serve` may take to end after SIGTERM, besides draining (docs/configuration.md)."""


@pytest.mark.parametrize(("mode", "role", "only"), [("agg", "aggregated", None), ("disagg", "prefill", Role.PREFILL),
                                                    ("disagg", "decode", Role.DECODE)])
def test_the_entry_point_and_the_launcher_take_the_arguments(mode: str, role: str, only: Role | None, tmp_path: Path) -> None:
    """One engine of the right role, without a router beside it."""
    sets = ("worker.tensorParallelSize=2", 'worker.args=["--max-model-len","8192","--enforce-eager"]', "worker.startTimeoutSeconds=1200",
            'platform="cpu"')
    options = parsed(launched(worker_of(render(mode, *sets), role), tmp_path))
    assert (options.only, options.counts.routers, options.counts.aggregated, options.start_timeout_s) == (only, 0, 1, 1200)
    assert options.engine_arguments == {"tensor_parallel_size": 2, "max_model_len": 8192, "enforce_eager": True}


def test_the_workers_settings_are_those_of_its_pod() -> None:
    """Reachable at its own address, with the first port of each kind."""
    found = load_settings({"role": "prefill", "worker_index": "1"}, environment(worker_of(render("disagg"), "prefill")))
    assert (found.grpc_url, found.side_channel_host, found.admin_host) == ("10.1.2.3:8001", "10.1.2.3", "0.0.0.0")
    assert (found.effective_admin_port, found.worker_index) == (8081, 0)
    assert found.discovery == f"etcd://{NAME}-etcd.{NAMESPACE}.svc:2379/{NAMESPACE}/{RELEASE}"
    assert found.health_check_enabled


@pytest.mark.parametrize(("mode", "sets"), [("disagg_planner", ('planner.profileConfigMap="p"', 'model.tokenSecret="hub"')),
                                            ("agg", (*AGG_ROUTER, *TIERS, "worker.kvTiers.diskGB=5", "router.replicas=2"))])
def test_every_variable_is_a_setting_that_takes_its_value(mode: str, sets: tuple[str, ...]) -> None:
    """No container has a variable that nobody reads."""
    kinds = (WorkerSettings, RouterSettings, KvbmSettings, ConsolidatorSettings, PlannerConfig, ServiceSettings)
    specs = {spec.env: spec for kind in kinds for spec in specs_of(kind).values()}
    unknown = set()
    for _, template in pods(render(mode, *sets)):
        for one in template["spec"]["containers"]:
            for name, value in environment(one).items():
                if name in specs:
                    specs[name].parse(value)
                elif name not in FOREIGN and name != "DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR":
                    unknown.add(name)
    assert unknown == set()


def test_settings_that_belong_together_are_taken_together() -> None:
    """Router, planner and consolidator resolve what their containers have."""
    planned = render("disagg_planner", "roles.prefill.tensorParallelSize=4", 'planner.profileConfigMap="p"')
    router = load_router({}, environment(container(pod(planned, f"{NAME}-router"), "router")))
    assert (router.router_replica_sync, router.router_replica_host, router.router_replica_port) == (True, "10.1.2.3", 7079)
    planner = parse_planner([], environment(container(pod(planned, f"{NAME}-planner"), "planner")))
    assert (planner.service.connector.value, planner.service.fleet, planner.config.mode.value) == ("kubernetes", NAME, "disagg")
    assert (planner.config.prefill_engine_num_gpu, planner.config.decode_engine_num_gpu) == (4, 1)
    sidecar = container(pod(render("agg", *AGG_ROUTER, *TIERS), f"{NAME}-aggregated"), "consolidator")
    assert load_consolidator({}, environment(sidecar)).published_port == 57001


def test_probes_ask_the_admin_server() -> None:
    """Restarts follow /live, traffic follows /health, and the start may take as long as it was given."""
    one = worker_of(render("agg", "worker.startTimeoutSeconds=605"))
    assert one["livenessProbe"]["httpGet"] == {"path": "/live", "port": "admin"}
    assert one["readinessProbe"]["httpGet"] == {"path": "/health", "port": "admin"}
    assert one["startupProbe"]["failureThreshold"] * one["startupProbe"]["periodSeconds"] >= 605
    assert {port["name"]: port["containerPort"] for port in one["ports"]}["admin"] == 8081


def test_the_grace_period_covers_leaving_draining_and_the_end() -> None:
    """Else the kubelet would kill requests that were promised their time."""
    template = pod(render("agg", "worker.leaveDelaySeconds=7", "worker.drainTimeoutSeconds=300"), f"{NAME}-aggregated")
    grace = template["spec"]["terminationGracePeriodSeconds"]
    assert grace >= 7 + 300 + LAUNCHER_DRAIN_S + TRITON_EXIT_S + TRITON_KILL_S
    assert "time.sleep(7)" in container(template, "worker")["lifecycle"]["preStop"]["exec"]["command"][2]


def test_before_its_end_a_worker_is_drained(tmp_path: Path) -> None:
    """The hook's own command, run against a server that plays the admin port."""
    hook = worker_of(render("agg", "worker.leaveDelaySeconds=0", "worker.drainTimeoutSeconds=9"))["lifecycle"]["preStop"]["exec"]["command"]
    assert hook[0] == "python"
    played = tmp_path / "urllib"
    played.mkdir()
    (played / "__init__.py").write_text("")
    (played / "request.py").write_text(
        "def Request(url, data): return (url, data)\n"
        "def urlopen(request, timeout): print(request[0], request[1].decode(), timeout)\n")
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(["python3", *hook[1:]], env=variables, capture_output=True, text=True, timeout=20, check=True)
    url, body = done.stdout.split(" ", 1)
    assert url == "http://127.0.0.1:8081/engine/drain"
    assert json.loads(body.rsplit(" ", 1)[0]) == {"timeout_s": 9}


def test_gpus_follow_from_the_parallel_sizes() -> None:
    """Per pod; none on CPUs."""
    eight = render("agg", "worker.tensorParallelSize=4", "worker.dataParallelSize=2")
    assert worker_of(eight)["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert worker_of(render("agg", 'platform="cpu"'))["resources"]["limits"] == {}
    span = render("agg", *SPAN, 'worker.gpuResource="amd.com/gpu"')
    assert worker_of(span, "aggregated/leaderTemplate")["resources"]["limits"] == {"amd.com/gpu": "8"}


def test_rdma_is_a_device_and_a_capability() -> None:
    """Memory must be pinned for it."""
    one = worker_of(render("agg", 'worker.rdmaResource="rdma/hca"'))
    assert one["resources"]["limits"]["rdma/hca"] == "1"
    assert one["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}


def test_shared_memory_and_models_are_volumes() -> None:
    """/dev/shm of 64 MB, the default, is too small for Triton."""
    template = pod(render("agg", 'worker.sharedMemory="32Gi"', 'model.cache.kind="claim"'), f"{NAME}-aggregated")
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Gi"}
    assert volumes["models"]["persistentVolumeClaim"] == {"claimName": f"{NAME}-models"}
    mounts = {mount["name"]: mount["mountPath"] for mount in container(template, "worker")["volumeMounts"]}
    assert mounts == {"shared-memory": "/dev/shm", "models": environment(container(template, "worker"))["HF_HOME"]}


def test_the_hubs_token_comes_from_a_secret() -> None:
    """By reference only."""
    one = worker_of(render("agg", 'model.tokenSecret="hub"', 'model.tokenKey="token"'))
    sources = [entry["valueFrom"] for entry in one["env"] if entry["name"] == "HF_TOKEN"]
    assert sources == [{"secretKeyRef": {"name": "hub", "key": "token"}}]


def test_a_consolidator_stands_beside_workers_with_tiers() -> None:
    """Where routers listen; the worker then starts none and names the consolidator's port. Decode workers publish nothing."""
    documents = render("disagg", 'worker.connector="kvbm nixl"', "worker.kvTiers.hostGB=20", 'worker.sharedMemory="32Gi"')
    prefill, decode = (pod(documents, f"{NAME}-{role}") for role in ("prefill", "decode"))
    assert [one["name"] for one in prefill["spec"]["containers"]] == ["worker", "consolidator"]
    assert environment(container(prefill, "worker"))["TANDEM_CONSOLIDATED_PORT"] == "57001"
    assert [one["name"] for one in decode["spec"]["containers"]] == ["worker"]
    assert environment(container(decode, "worker"))["DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR"] == "false"


def test_an_engine_over_several_nodes_has_one_leader() -> None:
    """The leader serves. Followers compute, have no probes, know leader and rank from LeaderWorkerSet, and wait for its name."""
    documents = render("disagg", *SPAN)
    workload = find(documents, "LeaderWorkerSet", f"{NAME}-prefill")
    assert workload["spec"]["leaderWorkerTemplate"]["size"] == 2
    assert f"{NAME}-prefill" not in names(documents, "Deployment")
    leader, follower = (pod(documents, f"{NAME}-prefill/{which}") for which in ("leaderTemplate", "workerTemplate"))
    computing = follower["spec"]["containers"][0]
    assert computing["args"][:4] == ["vllm", "serve", "HuggingFaceTB/SmolLM2-135M-Instruct", "--headless"]
    assert not {"livenessProbe", "readinessProbe", "startupProbe", "lifecycle"} & computing.keys()
    assert "--node-rank=$(LWS_WORKER_INDEX)" in computing["args"]
    assert "--master-addr=$(LWS_LEADER_ADDRESS)" in computing["args"]
    assert "LWS_LEADER_ADDRESS" in follower["spec"]["initContainers"][0]["args"][2]
    assert (leader["metadata"]["labels"]["tandem.dev/serves"], follower["metadata"]["labels"]["tandem.dev/serves"]) == ("true", "false")


@pytest.mark.parametrize("role", ["aggregated", "prefill", "decode"])
def test_leader_and_follower_have_the_same_engine(role: str, tmp_path: Path) -> None:
    """But for rank and role; what Tandem gives an engine of itself is spelled out for the follower, and all of it is vLLM's."""
    documents = render("agg" if role == "aggregated" else "disagg", *SPAN, 'platform="cuda"', 'worker.args=["--max-model-len","8192"]')
    command = launched(worker_of(documents, f"{role}/leaderTemplate"), tmp_path)
    leader = parsed(command).engine_arguments
    follower_args = [argument.replace("$(LWS_LEADER_ADDRESS)", "leader.example").replace("$(LWS_WORKER_INDEX)", "1")
                     for argument in pod(documents, f"{NAME}-{role}/workerTemplate")["spec"]["containers"][0]["args"][4:]]
    follower = parse_engine_arguments(follower_args)
    assert {**leader, "node_rank": 1} == follower
    assert follower.keys() <= known_engine_arguments()
    expected = None if role == "aggregated" else transfer_config(("nixl",), Role(role), installed=lambda _: True)
    assert follower.get("kv_transfer_config") == expected


def test_ranks_over_several_nodes_each_serve(tmp_path: Path) -> None:
    """Hybrid load balancing: every pod has its ranks, beginning after those of the pods before."""
    documents = render("agg", "worker.nodes=2", "worker.dataParallelSize=16", 'worker.multiNodeStrategy="data"')
    one = worker_of(documents, "aggregated/workerTemplate")
    engine = parsed(launched(one, tmp_path, index="1")).engine_arguments
    assert (engine["data_parallel_start_rank"], engine["data_parallel_size"], engine["data_parallel_size_local"]) == (8, 16, 8)
    assert engine["data_parallel_hybrid_lb"] is True
    assert engine["data_parallel_address"] == "leader.example"
    assert one["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert "readinessProbe" in one


def test_what_scales_workers_instead_of_the_planner() -> None:
    """The autoscaler's target is the role's workload, also a LeaderWorkerSet."""
    scaled = render("disagg", 'roles.decode.autoscaling={"kind":"hpa","maxReplicas":9}')
    scaler = find(scaled, "HorizontalPodAutoscaler", f"{NAME}-decode")
    assert scaler["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": f"{NAME}-decode"}
    assert (scaler["spec"]["minReplicas"], scaler["spec"]["maxReplicas"]) == (1, 9)
    queried = render("agg", *SPAN, 'worker.autoscaling={"kind":"keda","prometheusUrl":"http://p:9090"}')
    keda = find(queried, "ScaledObject", f"{NAME}-aggregated")
    assert keda["spec"]["scaleTargetRef"]["kind"] == "LeaderWorkerSet"
    assert f'namespace="{NAMESPACE}"' in keda["spec"]["triggers"][0]["metadata"]["query"]


def test_pods_of_a_role_are_spread_and_guarded() -> None:
    """Over hosts, and one at a time in voluntary disruptions; where pods are parts of engines there is no budget."""
    documents = render("disagg_router")
    spread: dict[str, Any] = pod(documents, f"{NAME}-decode")["spec"]["topologySpreadConstraints"][0]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    assert spread["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == "decode"
    assert names(documents, "PodDisruptionBudget") == {f"{NAME}-{which}" for which in ("prefill", "decode", "router")}
    assert names(render("agg", *SPAN, "worker.replicas=2"), "PodDisruptionBudget") == set()


def test_a_rollout_waits_for_slow_engines() -> None:
    """GPUs of the old pod are needed for the new one, and loading takes long."""
    spec = find(render("agg", "worker.startTimeoutSeconds=3600"), "Deployment", f"{NAME}-aggregated")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert spec["progressDeadlineSeconds"] > 3600
